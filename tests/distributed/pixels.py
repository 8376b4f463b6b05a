# SPDX-License-Identifier: MIT
"""Pixels that do not count: masks, valid sizes and empty values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, inf, nan

import kpfused
from kpfused import reference
from tests.distributed.outcomes import FUNCTIONS, assert_same
from tests.distributed.world import (
    ALL,
    BATCH,
    KEYPOINT,
    Case,
    H,
    LocalCalls,
    Sent,
    W,
    World,
    betas,
    layouts,
    maps,
    shard,
    shard_bool,
    whole,
)


def pixels_that_do_not_count(world: World) -> None:
    """Masks of every broadcast and valid sizes, which hide NaN and leave shares and maps empty."""
    shape = (3, 2, 7, 9)
    heights, widths = torch.tensor([[7], [3], [0]]).to(world.device), torch.tensor([9, 2]).to(world.device)
    masks = [torch.rand(size) < 0.6 for size in [shape, (7, 9), (3, 1, 7, 9), (2, 1, 9), (3, 2, 1, 1)]]
    masks[0][1, 0], masks[0][2, :, 2:] = False, False
    settings = [{"mask": mask.to(world.device)} for mask in masks]
    settings += [{"valid_size": (5, widths)}, {"valid_size": (heights, widths), "mask": masks[0].to(world.device)}]
    for function in FUNCTIONS:
        for mesh, placements in layouts(world):
            for pixels in settings:
                heatmap, beta = maps(world, *shape, dtype=torch.float64), betas(world, 2).double()
                counts = reference.counting(heatmap, pixels.get("mask"), pixels.get("valid_size")).expand(shape)
                heatmap[~counts] = nan
                results = assert_same(
                    function, heatmap, beta, mesh, placements, **pixels, empty_value=2.5, coordinates="centers"
                )
                assert not whole(results[-2])[~counts].any()
                empty = ~counts.flatten(-2).any(-1)
                for field in results[: -2 if function is kpfused.soft_argmax2d else -3]:
                    assert (whole(field)[empty] == 2.5).all()


def empty_maps(world: World) -> None:
    """Which no rank can tell: of -inf alone, with and without a value for them; NaN is not taken for one."""
    heatmap = maps(world, 4, 2, 8, 6, dtype=torch.float64)
    heatmap[0] = -inf
    heatmap[1, :, :4] = -inf
    heatmap[2, 0, 0, 0] = nan
    for function in FUNCTIONS:
        for settings in ({}, {"empty_value": -1.0}, {"valid_size": (8, 6)}):
            results = assert_same(function, heatmap, 1.0, world.mesh(), [H], **settings)
            value = settings.get("empty_value", nan)
            torch.testing.assert_close(
                whole(results[0])[0], torch.full_like(whole(results[0])[0], value), equal_nan=True
            )


def sharded_masks(world: World) -> None:
    """A mask and sizes as a DTensor, with other placements than the heatmap's: they are brought to its own."""
    two, shape = world.mesh(2), (2, 4, 7, 9)
    mask = (torch.rand(2, 1, 7, 9) < 0.6).to(world.device)
    heights = torch.randint(1, 8, (2, 1), device=world.device)
    widths = torch.randint(1, 10, (4,), device=world.device)
    for placements in ([BATCH, H], [W, H], [KEYPOINT, W], [H, H]):
        for of_mask in ([ALL, ALL], placements, [H, ALL], [W, BATCH], [H, H]):
            if KEYPOINT in of_mask:
                continue  # of one element
            own = {
                "mask": shard_bool(mask, two, of_mask),
                "valid_size": (shard_bool(heights, two, [BATCH, ALL]), widths),
            }
            assert_same(
                kpfused.spatial_moments2d,
                maps(world, *shape, dtype=torch.float64),
                1.5,
                two,
                placements,
                own,
                mask=mask,
                valid_size=(heights, widths),
            )


class MaskBytes(LocalCalls):
    """Of the mask in memory, at each call of a kernel."""

    def __enter__(self) -> Any:
        self.bytes: list[int] = []
        return super().__enter__()

    def see(self, func: Any, args: Any) -> None:
        if func.namespace == "kpfused":
            self.bytes += [
                a.untyped_storage().nbytes() for a in args if isinstance(a, Tensor) and a.dtype == torch.bool
            ]


def masks_are_not_expanded(world: World) -> None:
    """Neither in memory nor on the way: a plain one is cut where it is, one with other placements is sent as it is."""
    mesh, mask = world.mesh(), (torch.rand(2, 1, 16, 8) < 0.6).to(world.device)
    for placement in (BATCH, KEYPOINT, H, W):
        heatmap = shard(maps(world, 2, 32, 16, 8), mesh, [placement])
        with MaskBytes() as held, Sent() as sent:
            kpfused.soft_argmax2d(heatmap, mask=mask).sum().backward()
        assert held.bytes == [mask.nbytes] * 2
        assert len(sent.bytes) == (placement in (H, W))
    heatmap, columns = shard(maps(world, 2, 32, 16, 8), mesh, [H]), shard_bool(mask, mesh, [W])
    with MaskBytes() as held, Sent() as sent:
        kpfused.soft_argmax2d(heatmap, mask=columns)
    assert held.bytes == [mask.nbytes]
    assert sent.bytes == [columns.to_local().nbytes, 2 * 32 * 4 * 4]


CASES: list[Case] = [
    pixels_that_do_not_count,
    empty_maps,
    sharded_masks,
    masks_are_not_expanded,
]
