# SPDX-License-Identifier: MIT
"""The points, of maps and of rows and volumes; how much is sent for them."""

from __future__ import annotations

import torch
from torch import inf, nan
from torch.distributed.tensor import DTensor, Partial, Shard

import kpfused
from kpfused import reference
from tests import cases
from tests.distributed.outcomes import assert_close, assert_same, both, outcome, upstream_of
from tests.distributed.world import ALL, BATCH, KEYPOINT, Case, H, Sent, W, World, betas, maps, shard, whole


def leading_dimensions(world: World) -> None:
    """Bit for bit the single-process result; nothing is sent, however uneven the shares."""
    mesh = world.mesh()
    for shape in [(4, 8, 12, 8), (3, 5, 12, 8), (1, 1, 16, 8)]:
        for placement in (BATCH, KEYPOINT):
            for beta, of_beta in [
                (2.0, ALL),
                (betas(world, shape[1]), Shard(0) if placement == KEYPOINT else ALL),
                (betas(world, shape[1]), ALL),
                (betas(world, shape[0], 1), Shard(0) if placement == BATCH else ALL),
                (betas(world), ALL),
            ]:
                with Sent() as sent:
                    actual, expected = both(maps(world, *shape), beta, mesh, [placement], [of_beta], "corners")
                assert sent.bytes == []
                assert actual[0].placements == (placement,)  # type: ignore[attr-defined]
                for a, e in zip(actual[:2], expected[:2], strict=True):
                    assert torch.equal(whole(a), e)
                assert_close(actual, expected, "corners")  # beta's gradient is a sum over ranks


def replicated(world: World) -> None:
    actual, expected = both(maps(world, 2, 3, 7, 9), betas(world, 3), world.mesh(), [ALL])
    for a, e in zip(actual, expected, strict=True):
        assert a.placements == (ALL,)  # type: ignore[attr-defined]
        assert torch.equal(whole(a), e)


def rows_and_columns(world: World) -> None:
    """Every preset; one row, and fewer rows than ranks: some have none; two mesh dimensions in every order."""
    one, two = world.mesh(), world.mesh(2)
    layouts = [(one, [H]), (one, [W]), (two, [BATCH, H]), (two, [H, KEYPOINT]), (two, [W, H]), (two, [H, H])]
    for shape in [(2, 3, 8, 6), (3, 5, 7, 9), (2, 2, 1, 5), (1, 2, 5, 1), (2, 1, 67, 130)]:
        for mesh, placements in layouts:
            for coordinates in reference.COORDINATES:
                actual, expected = both(
                    maps(world, *shape), betas(world, shape[1]), mesh, placements, coordinates=coordinates
                )
                assert_close(actual, expected, coordinates)


def every_beta(world: World) -> None:
    for beta in [
        2.0,
        -2.0,
        0.0,
        betas(world),
        -betas(world, 1),
        betas(world, 5),
        betas(world, 4, 1, 1),
        betas(world, 4, 1, 5),
        betas(world, 4, 3, 5) - 1,
    ]:
        for placements in ([BATCH, Shard(3)], [Shard(3), Shard(2)]):
            actual, expected = both(maps(world, 4, 3, 5, 9, 7), beta, world.mesh(2), placements)
            assert_close(actual, expected)


def every_dtype(world: World) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        heatmap = maps(world, 2, 3, 9, 12, dtype=dtype)
        assert_close(*both(heatmap, 1.5, world.mesh(), [H]))
        assert_close(*both(heatmap.contiguous(memory_format=torch.channels_last), 1.5, world.mesh(), [H]))


def every_kind_of_map(world: World) -> None:
    for make in cases.FINITE.values():
        actual, expected = both(make((2, 3, 16, 11)).to(world.device, torch.float32), 1.0, world.mesh(), [H])
        assert_close(actual, expected)


def degenerate_maps(world: World) -> None:
    """What no rank can tell from its own rows."""
    heatmap = maps(world, 9, 2, 8, 6)
    heatmap[0] = -inf
    heatmap[1, :, :4] = -inf
    heatmap[2, :, 4:] = -inf
    heatmap[3, 0, 0, 0] = nan
    heatmap[4, 1, -1, -1] = inf
    heatmap[5, :, 5, 2] = torch.finfo(torch.float32).max
    heatmap[6] = torch.finfo(torch.float32).min
    heatmap[7, :, :-1], heatmap[7, :, -1] = -inf, 1e30
    for beta in (1.0, 0.0, betas(world, 2), torch.zeros((), device=world.device)):
        actual, expected = both(heatmap, beta, world.mesh(), [H])
        assert_close(actual, expected)
        assert expected[0].isnan().any(-1).sum() == 4  # both maps of 0, one of 3, one of 4
    assert_close(*both(-heatmap, -1.0, world.mesh(), [H]))


def weights_in_one_share(world: World) -> None:
    """Logits so far apart that all other weights vanish: the point is the peak, its gradient zero, to the bit."""
    heatmap = torch.zeros(1, 1, 8, 8, device=world.device)
    heatmap[..., 6, 1] = 1e4
    points, gradient = both(heatmap, 1.0, world.mesh(), [H])[0]
    assert whole(points).tolist() == [[[1.0, 6.0]]]
    assert not whole(gradient).any()


def same_bits_on_all_ranks(world: World) -> None:
    heatmap = shard(maps(world, 16, 5, 9, 11), world.mesh(), [H])
    for result in (kpfused.soft_argmax2d(heatmap), *kpfused.spatial_moments2d(heatmap)):
        own = result.to_local()
        everyone = DTensor.from_local(own[None], world.mesh(), [BATCH]).full_tensor()
        assert len(everyone) == world.size
        assert all(torch.equal(own, other) for other in everyone)


def four_numbers_a_map(world: World) -> None:
    """All that is sent, whatever the size of the map: forward's stats; and beta's gradient, once it is asked for."""
    mesh = world.mesh()
    for dtype, number in [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 4)]:
        for size in [(8, 6), (128, 96)]:
            heatmap = shard(maps(world, 2, 3, *size, dtype=dtype), mesh, [H])
            beta = shard(betas(world, 3), mesh, [ALL])
            with Sent() as sent:
                points = kpfused.soft_argmax2d(heatmap, beta)
            assert sent.bytes == [2 * 3 * 4 * number]
            with Sent() as sent:
                points.sum().backward()
            assert sent.bytes == []
            assert heatmap.grad.placements == (H,)
            assert beta.grad.placements == (Partial(),)
            with Sent() as sent:
                whole(beta.grad)
            assert sent.bytes == [3 * 4]
            with Sent() as sent:
                whole(heatmap)  # so that a gathered map would have been seen
            assert sent.bytes == [heatmap.to_local().nbytes]
    with Sent() as sent:
        kpfused.soft_argmax2d(shard(maps(world, 8, 3, 16, 6), world.mesh(2), [BATCH, H]))
    half_of_the_maps = 4 * 3 * 4 * 4
    assert sent.bytes == ([half_of_the_maps] if world.size > 2 else [])
    with Sent() as sent:
        moments = kpfused.spatial_moments2d(shard(maps(world, 2, 3, 16, 6), mesh, [H]), mask=maps(world, 16, 6) > 0)
        moments.entropy.sum().backward()
    assert sent.bytes == [2 * 3 * 10 * 4]  # with moments


def rows_and_volumes(world: World) -> None:
    """By the same ops; slices merge in torch."""
    beta = betas(world, 3).double()
    one, two = world.mesh(), world.mesh(2)
    layouts = [(one, [Shard(dim)]) for dim in range(5)] + [(two, [Shard(2), H]), (two, [KEYPOINT, Shard(2)])]
    for mesh, placements in layouts:
        volume, mask = maps(world, 2, 3, 4, 6, 5, dtype=torch.float64), (torch.rand(3, 4, 6, 5) < 0.6).to(world.device)
        for settings in ({}, {"mask": mask}):
            assert_same(kpfused.spatial_moments3d, volume, beta, mesh, placements, **settings)
    for dim in (1, 2, 3):  # a rank has a single volume, or a part of it
        volume = maps(world, 1, 2, 5, 7, dtype=torch.float64)
        assert_same(kpfused.spatial_moments3d, volume, 2.0, two, [Shard(0), Shard(dim)], empty_value=-1.0)
    merged = 2 * 3 * -(-3 // world.size) * (2 + 4 + 1 + 1 + 2 + 1 + 8) * 4
    with Sent() as sent:
        kpfused.soft_argmax3d(shard(maps(world, 2, 3, 3, 6, 5), one, [Shard(2)])).sum().backward()
    assert sent.bytes == [merged]
    for placement in (BATCH, H):
        row, mask = maps(world, 2, 3, 9, dtype=torch.float64), (torch.rand(3, 9) < 0.6).to(world.device)
        assert_same(kpfused.spatial_moments1d, row, beta, world.mesh(), [placement], mask=mask)


def without_background(world: World) -> None:
    heatmap = maps(world, 2, 3, 7, 9, dtype=torch.float64).relu()
    for placement in (KEYPOINT, H, W):
        assert_same(kpfused.soft_argmax2d, heatmap, 4.0, world.mesh(), [placement], debias=True)


def a_sum_yet_to_be_carried_out(world: World) -> None:
    """A Partial heatmap is summed once, and not again in backward."""
    parts = maps(world, world.size, 2, 3, 7, 9)
    expected = parts.sum(0).requires_grad_()
    upstream = upstream_of(expected)
    leaf = shard(parts, world.mesh(), [BATCH])
    with Sent() as sent:
        actual = outcome(leaf.sum(0), 1.0, upstream)[0]
        (gradient,) = torch.autograd.grad(
            kpfused.soft_argmax2d(leaf.sum(0)), leaf, shard(upstream, world.mesh(), [ALL])
        )
    assert sent.bytes == [expected.nbytes] * 2
    points, whole_gradient = outcome(expected, 1.0, upstream)
    assert_close([actual, whole(gradient)[0]], [points, whole_gradient])
    assert torch.equal(whole(gradient)[0], whole(gradient)[-1])


CASES: list[Case] = [
    leading_dimensions,
    replicated,
    rows_and_columns,
    every_beta,
    every_dtype,
    every_kind_of_map,
    degenerate_maps,
    weights_in_one_share,
    same_bits_on_all_ranks,
    four_numbers_a_map,
    rows_and_volumes,
    without_background,
    a_sum_yet_to_be_carried_out,
]
