# SPDX-License-Identifier: MIT
"""The map itself, the mass of a window, and expectations of coordinates and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import inf, nan
from torch.distributed.tensor import DTensor, Shard

import kpfused
from tests import cases
from tests.distributed.outcomes import Function, assert_same, everything
from tests.distributed.world import ALL, BATCH, KEYPOINT, Case, H, Sent, W, World, betas, layouts, maps, shard, whole


def whole_maps(world: World) -> None:
    """The map, the mass of a window and expectations, sharded over leading dimensions: nothing is sent."""
    mesh, shape = world.mesh(), (3, 5, 8, 6)
    heatmap, mask = maps(world, *shape), (torch.rand(3, 1, 8, 6) < 0.7).to(world.device)
    functions: dict[str, Function] = {
        "softmax": lambda h, b, **k: kpfused.spatial_softmax2d(h, b, **k),
        "window": lambda h, b, **k: kpfused.window_mass(h, 3, b, around="peak", **k),
        "coordinates": lambda h, b, **k: kpfused.expectation2d(h, coordinates="unit", **k),
    }
    for function in functions.values():
        for layout in ("contiguous", "channels_last"):
            own = cases.LAYOUTS[layout](heatmap)
            expected = everything(function, own.clone().requires_grad_(), 1.5, mask=mask)
            for placement in (BATCH, KEYPOINT):
                with Sent() as sent:
                    actual = everything(function, shard(own, mesh, [placement]), 1.5, mask=mask)
                assert sent.bytes == []
                for a, e in zip(actual, expected, strict=True):
                    torch.testing.assert_close(whole(a), e, equal_nan=True)


def parts_of_the_map_itself(world: World) -> None:
    """The map, the mass of a window and expectations of coordinates, of maps over several ranks."""
    functions: list[Function] = [
        lambda h, b, **k: kpfused.spatial_softmax2d(h, b, **k),
        lambda h, b, **k: kpfused.window_mass(h, 3, b, **k),
        lambda h, b, **k: kpfused.window_mass(h, 9, b, around="peak", **k),
        lambda h, b, **k: kpfused.expectation2d(h, coordinates="corners", **without(k, "empty_value")),
    ]
    for shape in [(2, 3, 8, 6), (3, 2, 7, 9), (2, 2, 1, 5), (1, 2, 5, 1)]:
        mask, beta = (torch.rand(shape) < 0.6).to(world.device), betas(world, shape[1]).double()
        mask[-1, 0] = False
        widths = torch.tensor([shape[-1], 2]).to(world.device)[: shape[1]].repeat(2)[: shape[1]]
        for index, function in enumerate(functions):
            for mesh, placements in layouts(world):
                for settings in ({}, {"mask": mask}, {"mask": mask, "empty_value": -3.0}, {"valid_size": (1, widths)}):
                    heatmap = maps(world, *shape, dtype=torch.float64)
                    assert_same(function, heatmap, beta if index < 3 else 1.0, mesh, placements, **settings)


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


def parts_of_degenerate_maps(world: World) -> None:
    """What no rank can tell from its own rows, and halves, which are rounded once."""
    heatmap = maps(world, 5, 2, 8, 6, dtype=torch.float64)
    heatmap[0] = -inf
    heatmap[1, :, :4] = -inf
    heatmap[2, :, 4:] = -inf
    heatmap[3, 0, 0, 0] = nan
    values = torch.randn(5, 2, 2, 8, 6, dtype=torch.float64, device=world.device)
    for function in (
        lambda h, b: kpfused.spatial_softmax2d(h, b),
        lambda h, b: kpfused.window_mass(h, 3, b),
        lambda h, b: kpfused.spatial_expectation2d(
            h, shard(values, world.mesh(), [Shard(3)]) if isinstance(h, DTensor) else values, b
        ),
    ):
        assert_same(function, heatmap, 2.0, world.mesh(), [H])
    one = maps(world, 4, 1, 8, 6, dtype=torch.float64)  # sharded along a dimension of one, to which beta broadcasts
    for function in (
        kpfused.soft_argmax2d,
        lambda h, b: kpfused.spatial_expectation2d(h, torch.ones(8, 6, device=world.device).to(h.dtype)[None], b),
    ):
        assert_same(function, one, torch.ones(1, device=world.device, dtype=torch.float64), world.mesh(), [KEYPOINT])
    for dtype in (torch.float16, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            halves = cases.LAYOUTS[layout](maps(world, 2, 3, 8, 6, dtype=dtype))
            actual = kpfused.spatial_softmax2d(shard(halves, world.mesh(), [H]))
            expected = kpfused.spatial_softmax2d(halves)
            torch.testing.assert_close(whole(actual), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
            assert actual.stride() == expected.stride()


def numbers_of_parts(world: World) -> None:
    """What is sent of maps over several ranks, whatever the size of the map and of the values."""
    mesh = world.mesh()
    for size in [(8, 6), (64, 48)]:
        values = shard(maps(world, 2, 3, 5, *size), mesh, [Shard(3)])
        for function, forward, backward in [
            (lambda h: kpfused.spatial_softmax2d(h), [4], [3]),
            (lambda h: kpfused.window_mass(h, 3), [10, 1], []),
            (lambda h: kpfused.expectation2d(h), [2], []),
            (lambda h, values=values: kpfused.spatial_expectation2d(h, values), [7], []),
        ]:
            heatmap = shard(maps(world, 2, 3, *size), mesh, [H])
            with Sent() as sent:
                result = function(heatmap)
            assert sent.bytes == [2 * 3 * 4 * numbers for numbers in forward]
            with Sent() as sent:
                result.backward(torch.ones_like(result))
            assert sent.bytes == [2 * 3 * 4 * numbers for numbers in backward]
            assert heatmap.grad.placements == (H,)
        assert values.grad.placements == (Shard(3),)


def values_beside_sharded_maps(world: World) -> None:
    """Values of each map, of each image and of all: a gradient that ranks share is summed over them."""
    mesh = world.mesh()
    heatmap, beta = maps(world, 4, 6, 8, 5, dtype=torch.float64), betas(world, 6).double()
    for leading in ((4, 6), (4, 1), (6,), ()):
        values = torch.randn(*leading, 3, 8, 5, dtype=torch.float64, device=world.device)
        leaves = [t.clone().requires_grad_() for t in (heatmap, values, beta)]
        mean = kpfused.spatial_expectation2d(*leaves)
        upstream = torch.randn_like(mean)
        expected = (mean, *torch.autograd.grad(mean, leaves, upstream))
        for placement in (BATCH, KEYPOINT, ALL, H, W):
            for plain in (False, True):
                own = [
                    shard(heatmap, mesh, [placement]),
                    values.clone().requires_grad_(),
                    beta.clone().requires_grad_(),
                ]
                if not plain:
                    own[1:] = [shard(t, mesh, [ALL]) for t in own[1:]]
                result = kpfused.spatial_expectation2d(*own)
                assert isinstance(result, DTensor)
                assert result.placements == (ALL if placement in (H, W) else placement,)
                gradients = torch.autograd.grad(result, own, shard(upstream, mesh, result.placements).detach())
                for a, e in zip((result, *gradients), expected, strict=True):
                    torch.testing.assert_close(whole(a), e)


CASES: list[Case] = [
    whole_maps,
    parts_of_the_map_itself,
    parts_of_degenerate_maps,
    numbers_of_parts,
    values_beside_sharded_maps,
]
