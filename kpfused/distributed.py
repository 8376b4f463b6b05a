# SPDX-License-Identifier: MIT
"""Sharding rules: the ops on ``DTensor``.

Heatmaps sharded over leading dimensions are computed where they are, without communication. A map sharded over H or W
is never gathered: each rank reduces its own pixels to stats, these are all-gathered, four numbers a map and rank, and
every rank merges them in the same order, to the same bits. The merged stats are all that backward needs.

``kpfused.ops`` imports this module when it first meets a ``DTensor``: ``torch.distributed.tensor`` is slow to import.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from kpfused import reference

_PIXEL = reference.COORDINATES.index("pixel")
_SMALLEST_SCALE = {torch.float32: 2.0**-121, torch.float64: 2.0**-1013}  # Limits of csrc/moments.h


def prepare(heatmap: Tensor, beta: Tensor | None) -> tuple[DTensor, DTensor | None]:
    """The arguments as the rules want them, with a gradient: a plain beta is the same on all ranks."""
    if not isinstance(heatmap, DTensor):
        raise TypeError("heatmap must be a DTensor where beta or temperature is one")
    mesh = heatmap.device_mesh
    if beta is not None and not isinstance(beta, DTensor):
        beta = DTensor.from_local(beta, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if beta is not None and beta.device_mesh != mesh:
        raise ValueError(f"beta must be on the mesh of heatmap, {mesh}; got {beta.device_mesh}")
    return _readable(heatmap), beta


def _readable(heatmap: DTensor) -> DTensor:
    """Makes whole what is a sum yet to be carried out, or sharded otherwise than in runs of indices."""
    placements = tuple(p if type(p) is Shard else Replicate() for p in heatmap.placements)
    return heatmap if placements == heatmap.placements else heatmap.redistribute(placements=placements)


class _Share:
    """This rank's share of a heatmap: where it lies, and how what belongs to the maps is placed beside it."""

    def __init__(self, heatmap: DTensor) -> None:
        heatmap = _readable(heatmap)
        self.heatmap, self.local = heatmap, heatmap.to_local()
        self.mesh, self.placements = heatmap.device_mesh, heatmap.placements
        self.leading = heatmap.shape[:-2]
        self.has_pixels = 0 not in self.local.shape[-2:]
        # Mesh dimensions over which the pixels of one map are spread.
        self.spread = [i for i, p in enumerate(self.placements) if isinstance(p, Shard) and p.dim >= len(self.leading)]

    def beside(self, over_pixels: Placement | None = None) -> list[Placement]:
        """Placements of a tensor ``(..., n)``: as the maps, and ``over_pixels`` where those are spread."""
        return [(over_pixels or Replicate()) if i in self.spread else p for i, p in enumerate(self.placements)]

    def take(self, tensor: DTensor, placements: Sequence[Placement]) -> Tensor:
        return tensor.redistribute(placements=placements).to_local().contiguous()

    def take_beta(self, beta: DTensor | None) -> Tensor | None:
        """The part of beta that belongs to the maps of this rank."""
        if beta is None:
            return None
        missing = len(self.leading) - beta.dim()
        placements: list[Placement] = []
        for placement in self.beside():
            dim = placement.dim - missing if isinstance(placement, Shard) else -1
            is_split = dim >= 0 and beta.shape[dim] == self.leading[dim + missing]
            placements.append(Shard(dim) if is_split else Replicate())
        return self.take(beta, placements)

    def wrap(self, local: Tensor, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
        """A contiguous tensor of a global shape."""
        strides = tuple(itertools.accumulate(reversed(shape), operator.mul, initial=1))[-2::-1]
        return _from_local(local, self, placements, shape, strides)

    def wrap_heatmap(self, local: Tensor) -> DTensor:
        return _from_local(local, self, self.placements, self.heatmap.shape, self.heatmap.stride())

    def gather(self, own: Tensor, index: int) -> Tensor:
        """``own`` of all ranks along one mesh dimension, in a new first dimension: one all-gather."""
        placements = [Shard(0) if i == index else Replicate() for i in range(self.mesh.ndim)]
        return DTensor.from_local(own.unsqueeze(0), self.mesh, placements, run_check=False).full_tensor()

    def units(self, coordinates: int) -> list[tuple[float, float]]:
        """(scale, offset) along x and y for pixels from the centre of the whole map."""
        preset = reference.COORDINATES[coordinates]
        return [reference.coordinate_units(self.heatmap.shape[dim], preset) for dim in (-1, -2)]

    def shift(self) -> list[float]:
        """(x, y) from the centre of the whole map to the centre of this rank's pixels."""
        dims = len(self.leading) + 1, len(self.leading)
        return [self._first(d) + (self.local.shape[d] - 1) / 2 - (self.heatmap.shape[d] - 1) / 2 for d in dims]

    def _first(self, dim: int) -> int:
        """Global index of this rank's first pixel along a dimension; shards are what ``torch.chunk`` makes."""
        first, size = 0, self.heatmap.shape[dim]
        for index, placement in enumerate(self.placements):
            if placement.is_shard(dim):
                chunk = -(-size // self.mesh.size(index))
                start = min(size, chunk * self.mesh.get_local_rank(index))
                first, size = first + start, min(chunk, size - start)
        return first


def _from_local(
    local: Tensor, share: _Share, placements: Sequence[Placement], shape: Sequence[int], stride: tuple[int, ...]
) -> DTensor:
    return DTensor.from_local(local, share.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _forward(
    op: Callable[..., Any], heatmap: DTensor, beta: DTensor | None, beta_value: float, coordinates: int
) -> tuple[DTensor, DTensor]:
    share = _Share(heatmap)
    own_beta = share.take_beta(beta)
    if share.spread:
        stats = _own_stats(op, share, own_beta, beta_value)
        scale = _scale(beta_value if own_beta is None else own_beta, stats.dtype)
        for index in share.spread:
            stats = _merge(share.gather(stats, index), scale)
        units = zip(stats[..., 2:].unbind(-1), share.units(coordinates), strict=True)
        result = torch.stack([mean * scale + offset for mean, (scale, offset) in units], -1)
    else:
        result, stats = op(share.local, own_beta, beta_value, coordinates)
    return (
        share.wrap(result, share.beside(), (*share.leading, 2)),
        share.wrap(stats, share.beside(), (*share.leading, stats.shape[-1])),
    )


def _own_stats(op: Callable[..., Any], share: _Share, beta: Tensor | None, beta_value: float) -> Tensor:
    """(peak, sum, mean x, mean y) of this rank's pixels, from the centre of the whole map."""
    if share.has_pixels:
        return _shifted(op(share.local, beta, beta_value, _PIXEL)[1], share.shift())
    dtype = torch.promote_types(share.local.dtype, torch.float32)
    stats = share.local.new_zeros((*share.local.shape[:-2], 4), dtype=dtype)
    stats[..., 0] = torch.finfo(dtype).min  # as empty_state of csrc/moments.h
    return stats


def _shifted(stats: Tensor, shift: Sequence[float]) -> Tensor:
    peak, total, x, y = stats.unbind(-1)
    return torch.stack((peak, total, x + shift[0], y + shift[1]), -1)


def _scale(beta: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """As in ``sharpness`` of csrc/moments.h."""
    smallest, log2_e = _SMALLEST_SCALE[dtype], math.log2(math.e)
    if isinstance(beta, Tensor):
        return (beta.abs() * log2_e).clamp(min=smallest)
    return max(abs(beta) * log2_e, smallest)


def _merge(stats: Tensor, scale: Tensor | float) -> Tensor:
    """``merge`` of csrc/moments.h over the first dimension, that of the ranks: the same sum, in one order, on each."""
    peaks, totals, *means = stats.unbind(-1)
    peak = peaks.amax(0)
    weights = totals * torch.exp2((peaks - peak) * scale)
    total = weights.sum(0)
    # Without weight a mean is 0 / 0, and adds nothing.
    merged = [(mean * weights).masked_fill(weights == 0, 0).sum(0) / total for mean in means]
    return torch.stack((peak, total, *merged), -1)


def _backward(
    op: Callable[..., Any],
    grad_coordinates: DTensor,
    heatmap: DTensor,
    stats: DTensor,
    beta: DTensor | None,
    beta_value: float,
    coordinates: int,
    needs_grad_beta: bool,
) -> tuple[DTensor, DTensor]:
    share = _Share(heatmap)
    grad, own_stats = (share.take(tensor, share.beside()) for tensor in (grad_coordinates, stats))
    if share.spread:
        # The kernel takes its share for the map: so pixels for units, and its centre for the map's.
        (scale_x, _), (scale_y, _) = share.units(coordinates)
        grad = torch.stack((grad[..., 0] * scale_x, grad[..., 1] * scale_y), -1)
        own_stats = _shifted(own_stats, [-shift for shift in share.shift()])
        coordinates = _PIXEL
    if share.has_pixels:
        own_beta = share.take_beta(beta)
        grad_heatmap, grad_beta = op(grad, share.local, own_stats, own_beta, beta_value, coordinates, needs_grad_beta)
    else:
        grad_heatmap = torch.empty_like(share.local)
        grad_beta = own_stats.new_zeros(share.local.shape[:-2] if needs_grad_beta else (0,))
    if not needs_grad_beta:  # a tensor of no elements
        return share.wrap_heatmap(grad_heatmap), share.wrap(grad_beta, [Replicate()] * share.mesh.ndim, (0,))
    return share.wrap_heatmap(grad_heatmap), share.wrap(grad_beta, share.beside(Partial()), share.leading)


def _register(name: str, rule: Callable[..., Any]) -> None:
    def dispatch(_: type, op: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.no_grad():  # autograd is above: DTensors come apart here without a trace
            return rule(op, *args, **(kwargs or {}))

    torch.library.register_torch_dispatch(name, DTensor, dispatch)


for _prefix in ("kpfused::", "kpfused::_"):
    _register(f"{_prefix}soft_argmax2d", _forward)
    _register(f"{_prefix}soft_argmax2d_backward", _backward)
