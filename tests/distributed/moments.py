# SPDX-License-Identifier: MIT
"""Every field of the moments, and the peak, which one rank has."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

import kpfused
from kpfused import SpatialMoments
from tests import cases
from tests.distributed.outcomes import Function, assert_same, everything
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


def moments(world: World) -> None:
    """Every field and preset, over uneven shares and empty ones."""
    for shape in [(2, 3, 8, 6), (3, 5, 7, 9), (2, 2, 1, 5), (1, 2, 5, 1)]:
        for mesh, placements in layouts(world):
            for coordinates in ("pixel", "corners", "unit"):
                heatmap, beta = maps(world, *shape, dtype=torch.float64), betas(world, shape[1]).double() - 0.8
                assert_same(kpfused.spatial_moments2d, heatmap, beta, mesh, placements, coordinates=coordinates)


def moments_in_float32(world: World) -> None:
    """To the roundings that one process is allowed."""
    for make in (cases.random, cases.flat, cases.peaked, cases.two_peaked, cases.masked):
        for mesh, placements in layouts(world)[::2]:
            for dtype in (torch.float32, torch.bfloat16):
                heatmap = make((2, 3, 40, 33)).to(world.device, dtype)
                wide = heatmap.double().requires_grad_()
                expected = kpfused.spatial_moments2d(wide)
                leaf = shard(heatmap, mesh, placements)
                actual = kpfused.spatial_moments2d(leaf)
                cases.assert_moments(SpatialMoments(*map(whole, actual)), expected, 40, 33)
                got = everything(kpfused.spatial_moments2d, leaf, 1.0)[-1]
                want = everything(kpfused.spatial_moments2d, wide, 1.0)[-1]
                cases.assert_gradients(whole(got), want, 40**2 * 4)


def moments_sharded_over_leading_dimensions(world: World) -> None:
    """Bit for bit, with a mask and a valid size, and without communication."""
    mesh, shape = world.mesh(), (3, 5, 8, 6)
    heatmap, mask = maps(world, *shape), (torch.rand(3, 1, 8, 6) < 0.7).to(world.device)
    sizes = torch.randint(0, 9, (3, 1), device=world.device), torch.randint(1, 7, (5,), device=world.device)
    expected = everything(kpfused.spatial_moments2d, heatmap.requires_grad_(), 1.5, mask=mask, valid_size=sizes)
    for placement in (BATCH, KEYPOINT):
        shards = shard_bool(mask, mesh, [placement if placement == BATCH else ALL])
        for own_mask in (mask, shards):
            with Sent() as sent:
                own = shard(heatmap, mesh, [placement])
                actual = everything(kpfused.spatial_moments2d, own, 1.5, mask=own_mask, valid_size=sizes)
            assert sent.bytes == []
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(whole(a).nan_to_num(), e.nan_to_num())


def one_field_alone(world: World) -> None:
    """The gradients of the others are absent. Of the log-sum-exp, beta's is the mean logit: it counts once."""
    heatmap = 1e3 + maps(world, 2, 3, 7, 6, dtype=torch.float64)
    for placements in ([H], [W]):
        for name in SpatialMoments._fields:
            if name != "peak":
                assert_same(field_alone(name), heatmap, betas(world, 3).double(), world.mesh(), placements)


def field_alone(name: str) -> Function:
    return lambda *args, **settings: getattr(kpfused.spatial_moments2d(*args, **settings), name)


class LogsumexpGradients(LocalCalls):
    """Of the log-sum-exp, as the backward op gets them on this rank, and the pixel of the peak beside them."""

    def see(self, func: Any, args: Any) -> None:
        if func.namespace == "kpfused" and "backward" in func.__name__:
            self.got, self.peak = args[3], args[7]


def the_peak_is_given_to_one_rank(world: World) -> None:
    """Kernels add what the log-sum-exp gives to beta's gradient once a map, some of them wherever the peak lies."""
    for placement in (H, W):
        heatmap = shard(maps(world, 4, 8, 8, 8), world.mesh(), [placement])
        with LogsumexpGradients() as seen:
            kpfused.spatial_moments2d(heatmap).logsumexp.sum().backward()
        assert ((seen.got == 1) == (seen.peak >= 0).all(-1)).all()
        everyone = DTensor.from_local(seen.got[None], world.mesh(), [BATCH]).full_tensor()
        assert torch.equal(everyone.sum(0), torch.ones_like(seen.got))


def the_first_of_equal_peaks(world: World) -> None:
    """In row order, which over W is not the order of the ranks; the lowest logits beside a share without pixels."""
    for mesh, placements in layouts(world):
        heatmap = torch.randint(2, (2, 3, 7, 9)).to(world.device, torch.float64)
        for beta in (1.0, -1.0):
            assert_same(kpfused.spatial_moments2d, heatmap, beta, mesh, placements)
    heatmap = torch.full((1, 1, 4, 6), torch.finfo(torch.float32).min, device=world.device)
    mask = torch.ones(4, 6, dtype=torch.bool, device=world.device)
    mask[:2], mask[:, :3] = False, False
    for placement in (H, W):
        peak = kpfused.spatial_moments2d(shard(heatmap, world.mesh(), [placement]), mask=mask).peak
        assert whole(peak).tolist() == [[[3, 2]]]


CASES: list[Case] = [
    moments,
    moments_in_float32,
    moments_sharded_over_leading_dimensions,
    one_field_alone,
    the_peak_is_given_to_one_rank,
    the_first_of_equal_peaks,
]
