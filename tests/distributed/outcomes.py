# SPDX-License-Identifier: MIT
"""Results and gradients of sharded heatmaps beside those of the whole map on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

import kpfused
from kpfused import SpatialMoments, reference
from tests import cases
from tests.distributed.world import ALL, shard, whole

Function: TypeAlias = Callable[..., Any]
FUNCTIONS: tuple[Function, ...] = (kpfused.soft_argmax2d, kpfused.spatial_moments2d)


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
