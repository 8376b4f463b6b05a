# SPDX-License-Identifier: MIT
"""What every rank of tests/test_distributed.py runs: the ops on sharded heatmaps beside the whole map on one rank.

All ranks draw the same numbers, so each can compute the single-process result itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kpfused
from kpfused import SoftArgmax2d, SpatialMoments, reference
from tests import cases

inf, nan = torch.inf, torch.nan
BATCH, KEYPOINT, H, W = map(Shard, range(4))
ALL = Replicate()


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: str

    @functools.cache  # noqa: B019  a mesh makes process groups
    def mesh(self, dims: int = 1) -> DeviceMesh:
        return init_device_mesh(self.device, (self.size,) if dims == 1 else (2, self.size // 2))


class Sent(TorchDispatchMode):
    """Bytes that this rank hands to collectives, one entry a call."""

    def __enter__(self) -> Any:
        self.bytes: list[int] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what the DTensor does with its local tensors is what counts
        if "c10d" in func.namespace and func._opname not in ("wait_tensor", "_wrap_tensor_autograd"):
            first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.bytes.append(first.nbytes)
        return func(*args, **(kwargs or {}))


def shard(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's share of a tensor that all ranks hold, as a leaf."""
    return distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None).requires_grad_()


def whole(tensor: Tensor | None) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outcome(heatmap: Tensor, beta: Tensor | float, upstream: Tensor, coordinates: str = "pixel") -> list[Tensor]:
    """Coordinates and the gradients of the leaves."""
    points = kpfused.soft_argmax2d(heatmap, beta, coordinates=coordinates)
    leaves = [heatmap, beta] if isinstance(beta, Tensor) else [heatmap]
    if isinstance(points, DTensor):
        upstream = shard(upstream, points.device_mesh, points.placements).detach()
    return [points.detach(), *torch.autograd.grad(points, leaves, upstream)]


def upstream_of(heatmap: Tensor) -> Tensor:
    shape = (*heatmap.shape[:-2], 2)
    return torch.randn(shape, device=heatmap.device, dtype=torch.promote_types(heatmap.dtype, torch.float32))


def both(
    heatmap: Tensor,
    beta: Tensor | float,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    beta_placements: Sequence[Placement] | None = None,
    coordinates: str = "pixel",
) -> tuple[list[Tensor], list[Tensor]]:
    """The sharded outcome and that of one process."""
    upstream = upstream_of(heatmap)
    own: Tensor | float = beta
    if isinstance(beta, Tensor):
        beta = beta.detach().requires_grad_()
        own = shard(beta, mesh, beta_placements or [ALL] * mesh.ndim)
    actual = outcome(shard(heatmap, mesh, placements), own, upstream, coordinates)
    assert actual[1].placements == tuple(placements)  # type: ignore[attr-defined]
    return actual, outcome(heatmap.detach().requires_grad_(), beta, upstream, coordinates)


def assert_close(actual: list[Tensor], expected: list[Tensor], coordinates: str = "pixel") -> None:
    """To a few roundings: of a coordinate on the map's longer axis, and of the largest gradient."""
    height, width = expected[1].shape[-2:]
    size = max(height, width)
    scale = max(reference.coordinate_units(n, coordinates)[0] for n in (height, width))
    cases.assert_coordinates(whole(actual[0]), expected[0].double(), size, scale)
    cases.assert_gradients(whole(actual[1]), expected[1].double(), size * scale)
    for a, e in zip(actual[2:], expected[2:], strict=True):
        # A sum over the map of terms of either sign, each the size of one pixel's distance from the mean.
        cases.assert_gradients(whole(a), e.double(), size * scale)


def maps(world: World, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(world.device, dtype)


def betas(world: World, *shape: int) -> Tensor:
    return (torch.rand(shape) + 0.5).to(world.device)


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


Function: TypeAlias = Callable[..., Any]
FUNCTIONS: tuple[Function, ...] = (kpfused.soft_argmax2d, kpfused.spatial_moments2d)


def fields_of(result: Tensor | SpatialMoments) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else cases.real_fields(result)


def everything(function: Function, heatmap: Tensor, beta: Tensor | float, **settings: Any) -> list[Tensor]:
    """All results, the peak last, and the gradients of a mixture of them: of heatmap and beta."""
    result = function(heatmap, beta, **settings)
    fields = fields_of(result)
    upstream = [cases.upstream_of(field).to(field.dtype) for field in fields]
    if isinstance(fields[0], DTensor):
        pairs = zip(upstream, fields, strict=True)
        upstream = [shard(u, f.device_mesh, f.placements).detach() for u, f in pairs]  # type: ignore[attr-defined]
    leaves = [heatmap, beta] if isinstance(beta, Tensor) else [heatmap]
    gradients = torch.autograd.grad(fields, leaves, upstream)
    return [*(f.detach() for f in fields), *([] if len(fields) == 1 else [result.peak]), *gradients]


def assert_same(
    function: Function,
    heatmap: Tensor,
    beta: Tensor | float,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    own_pixels: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """What one process gives, in float64: all that a mistake could hide behind is then a few of its roundings.

    ``own_pixels``: mask and valid size as the sharded call gets them.
    """
    own = shard(heatmap, mesh, placements)
    leaf = heatmap.detach().requires_grad_()
    own_beta = shard(beta, mesh, [ALL] * mesh.ndim) if isinstance(beta, Tensor) else beta
    beta = beta.detach().requires_grad_() if isinstance(beta, Tensor) else beta
    actual = everything(function, own, own_beta, **settings | (own_pixels or {}))
    expected = everything(function, leaf, beta, **settings)
    for a, e in zip(actual, expected, strict=True):
        assert whole(a).dtype == e.dtype
        atol = 1e-11 * max(1.0, e.nan_to_num(0, 0, 0).abs().max().item()) if e.is_floating_point() else 0
        torch.testing.assert_close(whole(a), e, rtol=1e-9, atol=atol, equal_nan=True)
    return actual


def layouts(world: World) -> list[tuple[DeviceMesh, list[Placement]]]:
    one, two = world.mesh(), world.mesh(2)
    return [(one, [H]), (one, [W]), (two, [BATCH, H]), (two, [W, KEYPOINT]), (two, [W, H]), (two, [H, H])]


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


def one_field_alone(world: World) -> None:
    """The gradients of the others are absent. Of the log-sum-exp, beta's is the mean logit: it counts once."""
    heatmap = 1e3 + maps(world, 2, 3, 7, 6, dtype=torch.float64)
    for placements in ([H], [W]):
        for name in SpatialMoments._fields:
            if name != "peak":
                assert_same(field_alone(name), heatmap, betas(world, 3).double(), world.mesh(), placements)


class LogsumexpGradients(TorchDispatchMode):
    """Of the log-sum-exp, as the backward op gets them on this rank, and the pixel of the peak beside them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func.namespace == "kpfused" and "backward" in func.__name__:
            self.got, self.peak = args[3], args[7]
        return func(*args, **(kwargs or {}))


def the_peak_is_given_to_one_rank(world: World) -> None:
    """Kernels add what the log-sum-exp gives to beta's gradient once a map, some of them wherever the peak lies."""
    for placement in (H, W):
        heatmap = shard(maps(world, 4, 8, 8, 8), world.mesh(), [placement])
        with LogsumexpGradients() as seen:
            kpfused.spatial_moments2d(heatmap).logsumexp.sum().backward()
        assert ((seen.got == 1) == (seen.peak >= 0).all(-1)).all()
        everyone = DTensor.from_local(seen.got[None], world.mesh(), [BATCH]).full_tensor()
        assert torch.equal(everyone.sum(0), torch.ones_like(seen.got))


def field_alone(name: str) -> Function:
    return lambda *args, **settings: getattr(kpfused.spatial_moments2d(*args, **settings), name)


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


def shard_bool(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


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


class MaskBytes(TorchDispatchMode):
    """Of the mask in memory, at each call of a kernel."""

    def __enter__(self) -> Any:
        self.bytes: list[int] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func.namespace == "kpfused":
            self.bytes += [
                a.untyped_storage().nbytes() for a in args if isinstance(a, Tensor) and a.dtype == torch.bool
            ]
        return func(*args, **(kwargs or {}))


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


def rows_and_volumes(world: World) -> None:
    """By the same ops; slices merge in torch."""
    beta = betas(world, 3).double()
    one, two = world.mesh(), world.mesh(2)
    layouts = [(one, [Shard(dim)]) for dim in range(5)] + [(two, [Shard(2), H]), (two, [KEYPOINT, Shard(2)])]
    for mesh, placements in layouts:
        volume, mask = maps(world, 2, 3, 4, 6, 5, dtype=torch.float64), (torch.rand(3, 4, 6, 5) < 0.6).to(world.device)
        for settings in ({}, {"mask": mask}):
            assert_same(kpfused.spatial_moments3d, volume, beta, mesh, placements, **settings)
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


def layers(world: World) -> None:
    """A layer's plain parameter is the same on all ranks, and so is its gradient; temperatures; a sharded beta."""
    heatmap, target = maps(world, 4, 5, 9, 8), maps(world, 4, 5, 2)
    alone = SoftArgmax2d(2.0, learnable=True, num_keypoints=5).to(world.device)
    (alone(heatmap) - target).square().sum().backward()
    for placement in (BATCH, KEYPOINT, H, W, ALL):
        layer = SoftArgmax2d(2.0, learnable=True, num_keypoints=5).to(world.device)
        points = layer(shard(heatmap, world.mesh(), [placement]))
        (points - shard(target, world.mesh(), points.placements)).square().sum().backward()
        torch.testing.assert_close(layer.log_beta.grad, alone.log_beta.grad)
        temperature = shard(betas(world, 5), world.mesh(), [BATCH])
        torch.testing.assert_close(
            whole(kpfused.soft_argmax2d(shard(heatmap, world.mesh(), [placement]), temperature=temperature)),
            kpfused.soft_argmax2d(heatmap, temperature=whole(temperature)),
        )


def ops_themselves(world: World) -> None:
    """The stats are those of the whole map, too; arguments by name."""
    heatmap = maps(world, 2, 3, 9, 8)
    expected = torch.ops.kpfused.soft_argmax2d(heatmap, None, -2.0, 1)
    for op in (torch.ops.kpfused.soft_argmax2d, torch.ops.kpfused._soft_argmax2d):
        for placement in (KEYPOINT, H):
            own = shard(heatmap, world.mesh(), [placement]).detach()
            for a, e in zip(op(own, beta=None, beta_value=-2.0, coordinates=1), expected, strict=True):
                torch.testing.assert_close(whole(a), e)


def compiled(world: World) -> None:
    """One graph, merging included, forward and backward."""
    for placement in (H, KEYPOINT):
        leaves = shard(maps(world, 2, 3, 7, 9), world.mesh(), [placement]), shard(betas(world, 3), world.mesh(), [ALL])
        results = []
        for function in (
            torch.compile(kpfused.soft_argmax2d, backend="aot_eager", fullgraph=True),
            kpfused.soft_argmax2d,
        ):
            points = function(*leaves, coordinates="unit")
            results.append([points.detach(), *torch.autograd.grad(points.square().sum(), leaves)])
        for a, e in zip(*results, strict=True):
            assert a.placements == e.placements
            torch.testing.assert_close(whole(a), whole(e), rtol=0, atol=0)
    heatmap, mask = shard(maps(world, 2, 3, 7, 9), world.mesh(), [H]), maps(world, 2, 1, 7, 9) > -2
    beta, settings = betas(world, 3).requires_grad_(), {"mask": mask, "valid_size": (5, 9)}
    for eager in (
        kpfused.spatial_moments2d,
        kpfused.spatial_softmax2d,
        lambda *args, **pixels: kpfused.window_mass(args[0], 3, args[1], **pixels),
        lambda *args, **pixels: kpfused.spatial_expectation2d(args[0], mask.float().unsqueeze(2), args[1], **pixels),
    ):
        function = torch.compile(eager, backend="aot_eager", fullgraph=True)
        pairs = (everything(f, heatmap, beta, **settings) for f in (function, eager))
        for a, e in zip(*pairs, strict=True):
            torch.testing.assert_close(whole(a), whole(e), rtol=0, atol=0)


def bad_input(world: World) -> None:
    heatmap, beta = maps(world, 2, 3, 7, 9), betas(world, 3)
    with pytest.raises(TypeError, match="heatmap must be a DTensor"):
        kpfused.soft_argmax2d(heatmap, shard(beta, world.mesh(), [ALL]))
    with pytest.raises(TypeError, match="heatmap must be a DTensor"):
        kpfused.spatial_moments2d(heatmap, mask=shard_bool(heatmap > 0, world.mesh(), [ALL]))
    mask = shard_bool(heatmap > 0, world.mesh(2), [ALL, ALL])
    with pytest.raises(ValueError, match="mask must be on the mesh of heatmap"):
        kpfused.spatial_moments2d(shard(heatmap, world.mesh(), [H]), mask=mask)
    leaf = shard(heatmap, world.mesh(), [BATCH])
    for function in (kpfused.soft_argmax2d, lambda h: kpfused.spatial_expectation2d(h, h.detach().unsqueeze(2))):
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.square().sum().backward()
    with pytest.raises(TypeError, match="heatmap must be a DTensor"):
        kpfused.spatial_expectation2d(heatmap, shard(heatmap.unsqueeze(2), world.mesh(), [ALL]))
    with pytest.raises(ValueError, match="beta must be on the mesh of heatmap"):
        kpfused.soft_argmax2d(shard(heatmap, world.mesh(), [H]), shard(beta, world.mesh(2), [ALL, ALL]))


class Net(nn.Module):
    """Images to points. ``num_keypoints=1`` is one beta as FSDP takes it: it shards no parameter without dimensions."""

    def __init__(self, num_keypoints: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = SoftArgmax2d(2.0, learnable=True, num_keypoints=num_keypoints)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images))


def train(net: nn.Module, images: Tensor, targets: Tensor) -> list[Tensor]:
    """Two steps, so that the second one starts from what the first one learnt."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (net(images) - targets).square().mean().backward()
        optimizer.step()
    return [whole(p.detach()) for p in net.parameters()]


def data_parallel(world: World) -> None:
    for wrap in (DistributedDataParallel, fully_sharded):
        for num_keypoints in (6, 1):
            net = Net(num_keypoints).to(world.device)
            images, targets = maps(world, 2 * world.size, 3, 10, 12), 10 * betas(world, 2 * world.size, 6, 2)
            start = [p.detach().clone() for p in net.parameters()]
            expected = train(copy.deepcopy(net), images, targets)
            share = slice(2 * world.rank, 2 * world.rank + 2)
            actual = train(wrap(net), images[share], targets[share])
            for a, e, s in zip(actual, expected, start, strict=True):
                assert not torch.equal(e, s)
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def fully_sharded(net: Net) -> nn.Module:
    fully_shard(net.head)
    return fully_shard(net)


CASES: list[Callable[[World], None]] = [
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
    moments,
    moments_in_float32,
    moments_sharded_over_leading_dimensions,
    whole_maps,
    parts_of_the_map_itself,
    parts_of_degenerate_maps,
    numbers_of_parts,
    values_beside_sharded_maps,
    one_field_alone,
    the_peak_is_given_to_one_rank,
    the_first_of_equal_peaks,
    pixels_that_do_not_count,
    empty_maps,
    sharded_masks,
    masks_are_not_expanded,
    rows_and_volumes,
    without_background,
    a_sum_yet_to_be_carried_out,
    layers,
    ops_themselves,
    bad_input,
    data_parallel,
    compiled,
]


def cases_of(size: int) -> dict[str, Callable[[World], None]]:
    """By name. To compile takes long, and longer with more processes than cores."""
    return {case.__name__: case for case in CASES if case is not compiled or size == 2}
