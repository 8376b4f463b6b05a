# SPDX-License-Identifier: MIT
"""Sharding rules: the ops on ``DTensor``.

Heatmaps sharded over leading dimensions are computed where they are, without communication. A map sharded over H or W
is never gathered: each rank reduces its own pixels to a state, these are all-gathered, four numbers a map and rank or
with moments ten, and every rank merges them in the same order, to the same bits. The merged stats, and the peak's
pixel, are all that backward needs. Volumes sharded over depth gather what their slices leave.

``kpfused.ops`` imports this module when it first meets a ``DTensor``: ``torch.distributed.tensor`` is slow to import.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from kpfused import reference
from kpfused.results import SpatialMoments

_ops = torch.ops.kpfused
_PIXEL, _CENTERED = map(reference.COORDINATES.index, ("pixel", "unit_centered"))
_PEAK = SpatialMoments._fields.index("peak")
_STATS, _MOMENT_STATS = 4, 8  # kStats and kMomentStats of csrc/params.h
_SMALLEST_SCALE = {torch.float32: 2.0**-121, torch.float64: 2.0**-1013}  # Limits of csrc/moments.h
_NOWHERE = 2.0**40  # kNowhere of csrc/moments.h
_BESIDE = ("beta", "mask", "valid_size")  # arguments that may be plain where the heatmap is a DTensor


def prepare(heatmap: Tensor, beta: Tensor | None, *pixels: Any) -> tuple[Any, ...]:
    """The arguments as the rules want them, with a gradient: plain ones are the same on all ranks.

    ``pixels``: mask, valid size and empty value, or nothing.
    """
    if not isinstance(heatmap, DTensor):
        raise TypeError("heatmap must be a DTensor where beta, temperature, mask or valid_size is one")
    mesh = heatmap.device_mesh
    beside = [None if tensor is None else _replicated(tensor, mesh) for tensor in (beta, *pixels[:2])]
    for name, tensor in zip(_BESIDE, beside, strict=False):
        if tensor is not None and tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of heatmap, {mesh}; got {tensor.device_mesh}")
    return (_readable(heatmap), *beside, *pixels[2:])


def with_whole_depth(slices: SpatialMoments, stats: Tensor) -> tuple[SpatialMoments, Tensor]:
    """Moments and stats of slices ``(..., D)``, of which all ranks get those of a whole volume: one all-gather."""
    if not isinstance(stats, DTensor):
        return slices, stats
    depth = stats.dim() - 2
    placements = [Replicate() if p.is_shard(depth) else p for p in stats.placements]
    if placements == list(stats.placements):
        return slices, stats
    flat: list[Any] = [slices.mean, slices.covariance.flatten(-2), *(field[..., None] for field in slices[2:4])]
    flat += [slices.peak.to(stats.dtype), slices.peak_probability[..., None], stats]  # a pixel's index is exact
    packed: Any = torch.cat(flat, -1)
    gathered = packed.redistribute(placements=placements)
    # Not by split, in whose backward a field that no loss uses is a plain tensor.
    ends = list(itertools.accumulate(tensor.shape[-1] for tensor in flat))
    mean, covariance, entropy, logsumexp, peak, chance, stats = (
        gathered[..., begin:end] for begin, end in itertools.pairwise([0, *ends])
    )
    return SpatialMoments(
        mean,
        covariance.reshape(*covariance.shape[:-1], 2, 2),
        entropy.squeeze(-1),
        logsumexp.squeeze(-1),
        peak.to(torch.int64),
        chance.squeeze(-1),
    ), stats.detach()


def prepare_values(heatmap: Tensor, values: Tensor) -> DTensor:
    """Values beside a heatmap that :func:`prepare` returned, placed as the rules can take them apart."""
    if not isinstance(heatmap, DTensor):
        raise TypeError("heatmap must be a DTensor where values are one")
    values = _replicated(values, heatmap.device_mesh)
    if values.device_mesh != heatmap.device_mesh:
        raise ValueError(f"values must be on the mesh of heatmap, {heatmap.device_mesh}; got {values.device_mesh}")
    share = _Share(heatmap)
    placements = share.beside_broadcast(values, trailing=3)
    for i in share.spread:
        placements[i] = Shard(values.dim() - heatmap.dim() + share.dim(i))
    return values.redistribute(placements=placements)


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of which one is a ``DTensor``, as such: torch mixes no others."""
    mesh = next(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    return tuple(_replicated(tensor, mesh) for tensor in tensors)


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A plain tensor, the same on all ranks, as a ``DTensor``; others as they are."""
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


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
        self.dtype = torch.promote_types(self.local.dtype, torch.float32)  # of results
        # Mesh dimensions over which the pixels of one map are spread.
        self.spread = [i for i, p in enumerate(self.placements) if isinstance(p, Shard) and p.dim >= len(self.leading)]

    def dim(self, index: int) -> int:
        """The heatmap's dimension that is sharded over a mesh dimension."""
        placement = self.placements[index]
        assert isinstance(placement, Shard)
        return placement.dim

    def beside(self, over_pixels: Placement | None = None) -> list[Placement]:
        """Placements of a tensor ``(..., n)``: as the maps, and ``over_pixels`` where those are spread."""
        return [(over_pixels or Replicate()) if i in self.spread else p for i, p in enumerate(self.placements)]

    def take(self, tensor: DTensor, placements: Sequence[Placement] | None = None) -> Tensor:
        """This rank's part of what belongs to its maps, such as results and gradients of results."""
        return tensor.redistribute(placements=placements or self.beside()).to_local().contiguous()

    def take_broadcast(self, tensor: DTensor | None, trailing: int = 0) -> Tensor | None:
        """Likewise of what broadcasts against the leading dimensions; ``trailing``: dimensions it has behind those."""
        return None if tensor is None else self.take(tensor, self.beside_broadcast(tensor, trailing))

    def beside_broadcast(self, tensor: DTensor, trailing: int) -> list[Placement]:
        """Placements of such a tensor: sharded as the maps are, and whole where it is the same for several of them."""
        missing = len(self.leading) - (tensor.dim() - trailing)
        placements: list[Placement] = []
        for placement in self.beside():
            dim = placement.dim - missing if isinstance(placement, Shard) else -1
            is_split = dim >= 0 and tensor.shape[dim] == self.leading[dim + missing]
            placements.append(Shard(dim) if is_split else Replicate())
        return placements

    def take_pixels(
        self, mask: DTensor | None = None, valid_size: DTensor | None = None, empty_value: float | None = None
    ) -> tuple[Any, ...]:
        """Which of this rank's pixels count, as an op takes it."""
        if mask is None and valid_size is None and empty_value is None:
            return ()
        size = self.take_broadcast(valid_size, trailing=1)
        if size is not None and self.spread:
            # What is left of it from this rank's first pixel on. Kernels take less than nothing for nothing.
            size = torch.stack([n - self.first(dim) for n, dim in zip(size.unbind(-1), (-2, -1), strict=True)], -1)
        return None if mask is None else self._take_mask(mask), size, empty_value

    def _take_mask(self, mask: DTensor) -> Tensor:
        """This rank's part of a mask of the heatmap's shape, as a view where it can be: a mask that was expanded is
        the size of the heatmap, but not in memory."""
        if not self._holds_part(mask):
            mask = _gathered(mask)
        own = mask.to_local()
        for dim, size in enumerate(self.local.shape):
            if own.shape[dim] != size:
                own = own.narrow(dim, self.first(dim), size)
        return own

    def _holds_part(self, tensor: DTensor) -> bool:
        """Whether this rank has its part of a tensor of the heatmap's shape: every dimension is whole, or sharded as
        that of the heatmap is."""
        if not all(type(p) in (Shard, Replicate) for p in tensor.placements):
            return False

        def mesh_dims(placements: Sequence[Placement], dim: int) -> list[int]:
            return [i for i, p in enumerate(placements) if p.is_shard(dim)]

        return all(
            mesh_dims(tensor.placements, dim) in ([], mesh_dims(self.placements, dim)) for dim in range(tensor.dim())
        )

    def wrap(self, local: Tensor, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
        """A contiguous tensor of a global shape."""
        strides = tuple(itertools.accumulate(reversed(shape), operator.mul, initial=1))[-2::-1]
        return _from_local(local, self, placements, shape, strides)

    def wrap_nothing(self) -> DTensor:
        """A tensor without elements, for a gradient that nobody asked for."""
        return self.wrap(self.local.new_empty((0,), dtype=self.dtype), [Replicate()] * self.mesh.ndim, (0,))

    def wrap_grad_beta(self, local: Tensor, is_needed: bool) -> DTensor:
        """Of every map, of which ranks that have pixels of it each have a part."""
        return self.wrap(local, self.beside(Partial()), self.leading) if is_needed else self.wrap_nothing()

    def wrap_result(self, local: Tensor) -> DTensor:
        """What belongs to the maps."""
        return self.wrap(local, self.beside(), (*self.leading, *local.shape[len(self.leading) :]))

    def wrap_heatmap(self, local: Tensor) -> DTensor:
        return _from_local(local, self, self.placements, self.heatmap.shape, self.heatmap.stride())

    def of_maps(self, *size: int, value: float = 0.0) -> Tensor:
        """One number, or ``size`` of them, for every map of this rank."""
        return self.local.new_full((*self.local.shape[:-2], *size), value, dtype=self.dtype)

    def sum_of_ranks(self, own: Tensor) -> Tensor:
        """Of all that have pixels of the same maps, in one order, to the same bits on each."""
        for index in self.spread:
            own = self.gather(own.to(self.dtype), index).double().sum(0)
        return own.to(self.dtype)

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
        return [self.first(d) + (self.local.shape[d] - 1) / 2 - (self.heatmap.shape[d] - 1) / 2 for d in (-1, -2)]

    def first(self, dim: int) -> int:
        """Global index of this rank's first pixel along a dimension; shards are what ``torch.chunk`` makes."""
        first, size, dim = 0, self.heatmap.shape[dim], dim % self.heatmap.dim()
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


def _gathered(mask: DTensor) -> DTensor:
    """The whole mask on every rank. What was expanded is sent once, and expanded again."""
    repeats = [mask.stride(d) == 0 and not any(p.is_shard(d) for p in mask.placements) for d in range(mask.dim())]
    own, shape = mask.to_local(), list(mask.shape)
    for dim, repeated in enumerate(repeats):
        if repeated:
            own, shape[dim] = own.narrow(dim, 0, 1), 1
    strides = tuple(itertools.accumulate(reversed(shape), operator.mul, initial=1))[-2::-1]
    # As bytes: not every backend sends bool.
    sent = DTensor.from_local(
        own.contiguous().view(torch.uint8),
        mask.device_mesh,
        mask.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )
    return _replicated(sent.full_tensor().view(torch.bool).expand(mask.shape), mask.device_mesh)


# ---- Forward --------------------------------------------------------------------------------------------------------


def _forward(
    op: Callable[..., Any],
    heatmap: DTensor,
    beta: DTensor | None,
    beta_value: float,
    coordinates: int,
    *pixels: Any,
    values: int,
    **named_pixels: Any,
) -> tuple[DTensor, ...]:
    """Both forward ops; ``values``: of a map's stats."""
    share = _Share(heatmap)
    own_beta, own_pixels = share.take_broadcast(beta), share.take_pixels(*pixels, **named_pixels)
    if not share.spread:
        results = op(share.local, own_beta, beta_value, coordinates, *own_pixels)
        return tuple(share.wrap_result(result) for result in results)
    state, sharpness = _merged_state(op, share, own_beta, beta_value, own_pixels, values)
    fields = [_fill_empty(field, state, own_pixels) for field in _fields(state, sharpness, share.units(coordinates))]
    results = [field.to(share.dtype) for field in (*fields, state[..., :values])]
    if values == _MOMENT_STATS:
        results.insert(_PEAK, _whole_numbers(state[..., values:]))
    return tuple(share.wrap_result(result) for result in results)


def _merged_state(
    op: Callable[..., Any],
    share: _Share,
    beta: Tensor | None,
    beta_value: float,
    pixels: tuple[Any, ...],
    values: int,
) -> tuple[Tensor, Tensor | float]:
    """The state of whole maps, in float64, from one all-gather; and the size of beta.

    As the kernels do on the CPU, and as costs nothing for a few numbers a map: between two roundings, float64.
    """
    state = _own_state(op, share, beta, beta_value, pixels, values)
    sharpness = _sharpness(beta, beta_value)
    for index in share.spread:
        state = _merge(share.gather(state.to(share.dtype), index).double(), _scale(sharpness, share.dtype))
    return state, sharpness


def _sharpness(beta: Tensor | None, beta_value: float) -> Tensor | float:
    return abs(beta_value) if beta is None else beta.double().abs()


def _fill_empty(field: Tensor, state: Tensor, pixels: tuple[Any, ...]) -> Tensor:
    """With what a map gives in which nothing weighs. Without a mask or such, kernels let that be as it comes."""
    if not pixels:
        return field
    empty = state[..., 1] == 0
    fill = math.nan if pixels[2] is None else pixels[2]
    return field.masked_fill(empty[(..., *[None] * (field.dim() - empty.dim()))], fill)


def _own_state(
    op: Callable[..., Any],
    share: _Share,
    beta: Tensor | None,
    beta_value: float,
    pixels: tuple[Any, ...],
    values: int,
) -> Tensor:
    """Stats of this rank's pixels, from the centre of the whole map, and of moments also (x, y) of their peak."""
    size = values + 2 if values == _MOMENT_STATS else values
    if not share.has_pixels:
        state = share.of_maps(size)
        state[..., 0] = torch.finfo(share.dtype).min  # as empty_state of csrc/moments.h
        state[..., values:] = _NOWHERE
        return state
    results = op(share.local, beta, beta_value, _PIXEL, *pixels)
    stats = _shifted(results[-1], share.shift())
    if size == values:
        return stats
    # Without weight, the peak is the first pixel in place of none.
    nothing = stats[..., 1] == 0
    at = [results[_PEAK][..., i] + share.first(dim) for i, dim in enumerate((-1, -2))]
    at = [n.to(stats.dtype).masked_fill(nothing, _NOWHERE) for n in at]
    return torch.cat((stats, torch.stack(at, -1)), -1)


def _shifted(stats: Tensor, shift: Sequence[float]) -> Tensor:
    peak, total, x, y, *others = stats.unbind(-1)
    return torch.stack((peak, total, x + shift[0], y + shift[1], *others), -1)


def _scale(sharpness: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """As in ``sharpness`` of csrc/moments.h, of the size of beta."""
    log2_e, smallest = math.log2(math.e), _SMALLEST_SCALE[dtype]
    if isinstance(sharpness, Tensor):
        return (sharpness * log2_e).clamp(min=smallest)
    return max(sharpness * log2_e, smallest)


def _merge(states: Tensor, scale: Tensor | float) -> Tensor:
    """``merge`` of csrc/moments.h over the first dimension, that of the ranks: the same sum, in one order, on each.

    A covariance is what the ranks have within, and what lies between their means.
    """
    peaks, totals, x, y, *others = states.unbind(-1)
    peak, total, down, mean = _weighed(peaks, totals, scale)
    merged = [peak, total, mean(x), mean(y)]
    if others:
        xx, xy, yy, distance, at_x, at_y = others
        dx, dy = x - merged[2], y - merged[3]
        merged += [mean(xx + dx * dx), mean(xy + dx * dy), mean(yy + dy * dy), mean(distance + down)]
        # The first in row order of the highest.
        at_y = at_y.masked_fill(peaks != peak, _NOWHERE)
        first_y = at_y.amin(0)
        merged += [at_x.masked_fill((peaks != peak) | (at_y != first_y), _NOWHERE).amin(0), first_y]
    return torch.stack(merged, -1)


def _weighed(
    peaks: Tensor, totals: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Peak and total of all ranks, how far below that peak theirs are, and the mean of what they have."""
    peak = peaks.amax(0)
    down = peaks - peak
    weights = totals * torch.exp2(down * scale)
    total = weights.sum(0)

    def mean(values: Tensor) -> Tensor:
        # Without weight a value is 0 / 0, and adds nothing.
        return (values * weights).masked_fill(weights == 0, 0).sum(0) / total

    return peak, total, down, mean


def _fields(state: Tensor, sharpness: Tensor | float, units: Sequence[tuple[float, float]]) -> list[Tensor]:
    """``write_fields`` of csrc/fields.h: all results but the peak's pixel."""
    peak, total, x, y, *others = state.unbind(-1)
    (scale_x, offset_x), (scale_y, offset_y) = units
    mean = torch.stack((x * scale_x + offset_x, y * scale_y + offset_y), -1)
    if not others:
        return [mean]
    xx, xy, yy, distance, *_ = others
    log_sum = total.log()
    return [
        mean,
        _in_units(torch.stack((torch.stack((xx, xy), -1), torch.stack((xy, yy), -1)), -2), scale_x, scale_y),
        log_sum - sharpness * distance,
        sharpness * peak + log_sum,
        total / total / total,
    ]


def _in_units(covariance: Tensor, scale_x: float, scale_y: float) -> Tensor:
    """A covariance, or the gradient of one, with its elements times those of the scales' outer product."""
    (xx, xy), (yx, yy) = (row.unbind(-1) for row in covariance.unbind(-2))
    rows = (xx * scale_x * scale_x, xy * scale_x * scale_y), (yx * scale_y * scale_x, yy * scale_y * scale_y)
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _whole_numbers(at: Tensor) -> Tensor:
    """The pixel of a peak; the first where no pixel has it."""
    return at.masked_fill(at >= _NOWHERE, 0).to(torch.int64)


# ---- Backward -------------------------------------------------------------------------------------------------------


def _backward(
    op: Callable[..., Any],
    grad_coordinates: DTensor,
    heatmap: DTensor,
    stats: DTensor,
    beta: DTensor | None,
    beta_value: float,
    coordinates: int,
    needs_grad_beta: bool,
    *pixels: Any,
    **named_pixels: Any,
) -> tuple[DTensor, DTensor]:
    share = _Share(heatmap)
    grad, own_stats = share.take(grad_coordinates), share.take(stats)
    if share.spread:
        grad, own_stats, coordinates = *_as_of_own_map(share, grad, own_stats, coordinates), _PIXEL
    settings = (share.take_broadcast(beta), beta_value, coordinates, needs_grad_beta)
    return _gradients(op, share, (grad,), (own_stats,), (*settings, *share.take_pixels(*pixels, **named_pixels)))


def _as_of_own_map(share: _Share, grad_mean: Any, stats: Tensor, coordinates: int) -> tuple[Any, Tensor]:
    """The kernel takes a rank's pixels for the map: so pixels for units, and their centre for the map's."""
    (scale_x, _), (scale_y, _) = share.units(coordinates)
    if grad_mean is not None:
        grad_mean = torch.stack((grad_mean[..., 0] * scale_x, grad_mean[..., 1] * scale_y), -1)
    return grad_mean, _shifted(stats, [-shift for shift in share.shift()])


def _moments_backward(
    op: Callable[..., Any],
    grad_mean: DTensor | None,
    grad_covariance: DTensor | None,
    grad_entropy: DTensor | None,
    grad_logsumexp: DTensor | None,
    grad_peak_probability: DTensor | None,
    heatmap: DTensor,
    stats: DTensor,
    peak: DTensor,
    beta: DTensor | None,
    beta_value: float,
    coordinates: int,
    needs_grad_beta: bool,
    *pixels: Any,
    **named_pixels: Any,
) -> tuple[DTensor, DTensor]:
    share = _Share(heatmap)
    grads = (grad_mean, grad_covariance, grad_entropy, grad_logsumexp, grad_peak_probability)
    mean, covariance, entropy, logsumexp, chance = (None if g is None else share.take(g) for g in grads)
    own_stats, own_peak = share.take(stats), share.take(peak)
    if share.spread:
        (scale_x, _), (scale_y, _) = share.units(coordinates)
        mean, own_stats = _as_of_own_map(share, mean, own_stats, coordinates)
        covariance = None if covariance is None else _in_units(covariance, scale_x, scale_y)
        coordinates = _PIXEL
        own_peak, is_here = _local_peak(share, own_peak)
        if logsumexp is not None:
            # With the log-sum-exp goes a term of beta's gradient that counts once a map: with the rank of the peak. On
            # others, what is left of its gradient, one constant for all pixels, goes with the probability of the peak,
            # which takes that constant away from all pixels but its own.
            constant = logsumexp * own_stats[..., 1]
            logsumexp = logsumexp.masked_fill(~is_here, 0)
            chance = torch.zeros_like(logsumexp) if chance is None else chance
            chance = torch.where(is_here, chance, chance - constant)
    settings = (share.take_broadcast(beta), beta_value, coordinates, needs_grad_beta)
    return _gradients(
        op,
        share,
        (mean, covariance, entropy, logsumexp, chance),
        (own_stats, own_peak),
        (*settings, *share.take_pixels(*pixels, **named_pixels)),
    )


def _local_peak(share: _Share, peak: Tensor) -> tuple[Tensor, Tensor]:
    """The peak's pixel among this rank's, a negative one where it is another's; and whether it is this rank's."""
    local = [at - share.first(dim) for at, dim in zip(peak.unbind(-1), (-1, -2), strict=True)]
    inside = [(at >= 0) & (at < share.local.shape[dim]) for at, dim in zip(local, (-1, -2), strict=True)]
    is_here = inside[0] & inside[1]
    return torch.stack([at.masked_fill(~is_here, -1) for at in local], -1), is_here


def _gradients(
    op: Callable[..., Any],
    share: _Share,
    grads: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...],
    settings: tuple[Any, ...],
) -> tuple[DTensor, DTensor]:
    needs_grad_beta = settings[3]
    if share.has_pixels:
        grad_heatmap, grad_beta = op(*grads, share.local, *kept, *settings)
    else:
        grad_heatmap, grad_beta = _no_gradients(share, needs_grad_beta)
    return share.wrap_heatmap(grad_heatmap), share.wrap_grad_beta(grad_beta, needs_grad_beta)


def _no_gradients(share: _Share, needs_grad_beta: bool) -> tuple[Tensor, Tensor]:
    """Of a rank without pixels: of the heatmap nothing, of beta zero."""
    return torch.empty_like(share.local), share.of_maps(*(() if needs_grad_beta else (0,)))


# ---- Ops around the probability map itself --------------------------------------------------------------------------


def _map_forward(
    op: Callable[..., Any],
    heatmap: DTensor,
    beta: DTensor | None,
    beta_value: float,
    setting: int,
    *pixels: Any,
    spread: Callable[..., Any],
    **named_pixels: Any,
) -> tuple[DTensor, ...]:
    """``spread(op, share, beta, beta_value, setting, pixels)``: the rule of maps whose pixels are spread over ranks."""
    share = _Share(heatmap)
    own_beta, own_pixels = share.take_broadcast(beta), share.take_pixels(*pixels, **named_pixels)
    if share.spread:
        results = spread(op, share, own_beta, beta_value, setting, own_pixels)
    else:
        results = op(share.local, own_beta, beta_value, setting, *own_pixels)
    # A result of the heatmap's shape is a map, in its memory format.
    return tuple((share.wrap_heatmap if r.shape == share.local.shape else share.wrap_result)(r) for r in results)


def _map_backward(
    op: Callable[..., Any],
    grad: DTensor,
    heatmap: DTensor,
    *rest: Any,
    kept: int,
    spread: Callable[..., Any],
    **named_pixels: Any,
) -> tuple[DTensor, DTensor]:
    """``kept``: how many results of forward follow the heatmap."""
    share = _Share(heatmap)
    own = tuple(share.take(tensor) for tensor in rest[:kept])
    is_map = grad.shape == heatmap.shape
    own_grad = grad.redistribute(placements=share.placements).to_local() if is_map else share.take(grad)
    beta, beta_value, setting, needs_grad_beta, *pixels = rest[kept:]
    own_pixels = share.take_pixels(*pixels, **named_pixels)
    settings = (share.take_broadcast(beta), beta_value, setting, needs_grad_beta, *own_pixels)
    if not share.spread:
        return _gradients(op, share, (own_grad,), own, settings)
    # Also on ranks without pixels, which may have to take part in merging.
    grad_heatmap, grad_beta = spread(op, share, own_grad, *own, *settings)
    return share.wrap_heatmap(grad_heatmap), share.wrap_grad_beta(grad_beta, needs_grad_beta)


def _expectation(
    share: _Share,
    values: Tensor,
    beta: Tensor | None,
    beta_value: float,
    pixels: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Of whole maps, from each rank's pixels: peak and total, and the expectation, in float64; one all-gather."""
    channels = values.shape[-3]
    if share.has_pixels:
        expectation, stats = _ops._spatial_expectation2d(share.local, values, beta, beta_value, *pixels)
        state = torch.cat((stats[..., :2], expectation), -1)
    else:
        state = share.of_maps(2 + channels)
        state[..., 0] = torch.finfo(share.dtype).min
    scale = _scale(_sharpness(beta, beta_value), share.dtype)
    scale = scale[..., None] if isinstance(scale, Tensor) else scale
    for index in share.spread:
        peaks, totals, expectations = torch.split(
            share.gather(state.to(share.dtype), index).double(), [1, 1, channels], -1
        )
        peak, total, _, mean = _weighed(peaks, totals, scale)
        state = torch.cat((peak, total, mean(expectations)), -1)
    return state[..., :2], state[..., 2:]


def _as_values(tensor: Tensor) -> Tensor:
    """A map as values of one channel."""
    return tensor.unsqueeze(-3)


def _spread_softmax(
    op: Callable[..., Any],
    share: _Share,
    beta: Tensor | None,
    beta_value: float,
    setting: int,
    pixels: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """The map is what an expectation's gradient is with respect to its values."""
    state, _ = _merged_state(_ops._soft_argmax2d, share, beta, beta_value, pixels, _STATS)
    stats = state.to(share.dtype)
    if not share.has_pixels:
        return torch.empty_like(share.local), stats
    _, probabilities, _ = _ops._spatial_expectation2d_backward(
        share.of_maps(1, value=1.0),
        share.local,
        _as_values(share.local),
        share.of_maps(1),
        stats,
        beta,
        beta_value,
        False,
        True,
        False,
        *pixels,
    )
    return _fill_empty(probabilities.squeeze(-3), state, pixels), stats


def _spread_softmax_backward(
    op: Callable[..., Any],
    share: _Share,
    grad: Tensor,
    stats: Tensor,
    beta: Tensor | None,
    beta_value: float,
    setting: int,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor, Tensor]:
    """That of the expectation of the upstream gradient, if that were no function of the heatmap."""
    values = _as_values(grad)
    _, mean = _expectation(share, values, beta, beta_value, pixels)
    if not share.has_pixels:
        return _no_gradients(share, needs_grad_beta)
    one, mean = share.of_maps(1, value=1.0), mean.to(share.dtype)
    needs = (True, False, needs_grad_beta)
    gradients = _ops._spatial_expectation2d_backward(
        one, share.local, values, mean, stats, beta, beta_value, *needs, *pixels
    )
    return gradients[0], gradients[2]


def _spread_coordinates(
    op: Callable[..., Any],
    share: _Share,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    pixels: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Sums over this rank's pixels, counted from its first and from their middle: the difference tells their mass."""
    own = share.of_maps(2)
    if share.has_pixels:
        from_first, from_middle = (
            op(share.local, beta, beta_value, preset, *pixels)[0].double() for preset in (_PIXEL, _CENTERED)
        )
        sums = []
        for axis, dim in enumerate((-1, -2)):
            size = share.local.shape[dim]
            mass = 2 * (from_first[..., axis] / size - from_middle[..., axis])
            scale, offset = share.units(coordinates)[axis]
            centre = (share.heatmap.shape[dim] - 1) / 2
            sums.append(scale * (from_first[..., axis] + (share.first(dim) - centre) * mass) + offset * mass)
        own = torch.stack(sums, -1)
    return share.sum_of_ranks(own), share.of_maps(0)


def _spread_coordinates_backward(
    op: Callable[..., Any],
    share: _Share,
    grad: Tensor,
    nothing: Tensor,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor, Tensor]:
    """Coordinates times the upstream gradient: nothing to read, so that torch writes it as fast as a kernel."""
    heatmap, along = share.local, []
    for dim, (scale, offset) in zip((-1, -2), share.units(coordinates), strict=True):
        pixel = torch.arange(heatmap.shape[dim], dtype=share.dtype, device=heatmap.device) + share.first(dim)
        along.append((pixel - (share.heatmap.shape[dim] - 1) / 2) * scale + offset)
    x, y = along[0] * grad[..., 0, None, None], along[1][:, None] * grad[..., 1, None, None]
    gradient = torch.add(x, y, out=torch.empty_like(heatmap))
    if pixels:
        mask, valid_size, _ = pixels
        counts = reference.counting(heatmap, mask, None if valid_size is None else valid_size.unbind(-1))
        gradient = gradient if counts is None else gradient.masked_fill_(~counts, 0)
    return gradient, share.of_maps(0)


def _window_pixel(share: _Share, window: int, stats: Tensor, peak: Tensor) -> Tensor:
    """The pixel that a window is around, counted from this rank's first; which may be none of its own."""
    if window > 0:
        # As window_of in csrc/fields.h, of the whole map.
        sizes = [share.heatmap.shape[dim] for dim in (-1, -2)]
        pixels = [stats[..., 2 + axis] + (size - 1) / 2 for axis, size in enumerate(sizes)]
        nearest = [p.nan_to_num(0).round().clamp(0, n - 1) for p, n in zip(pixels, sizes, strict=True)]
        peak = torch.stack(nearest, -1).to(torch.int64)
    return torch.stack([at - share.first(dim) for at, dim in zip(peak.unbind(-1), (-1, -2), strict=True)], -1)


def _spread_window(
    op: Callable[..., Any],
    share: _Share,
    beta: Tensor | None,
    beta_value: float,
    window: int,
    pixels: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    state, _ = _merged_state(_ops._spatial_moments2d, share, beta, beta_value, pixels, _MOMENT_STATS)
    stats, peak = state[..., :_MOMENT_STATS].to(share.dtype).contiguous(), _whole_numbers(state[..., _MOMENT_STATS:])
    own = share.of_maps()
    if share.has_pixels:
        at = _window_pixel(share, window, stats, peak)
        own = _ops._window_mass2d_at(share.local, stats, at, beta, beta_value, -abs(window), *pixels)
    return _fill_empty(share.sum_of_ranks(own), state, pixels), stats, peak


def _spread_window_backward(
    op: Callable[..., Any],
    share: _Share,
    grad: Tensor,
    mass: Tensor,
    stats: Tensor,
    peak: Tensor,
    beta: Tensor | None,
    beta_value: float,
    window: int,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor, Tensor]:
    if not share.has_pixels:
        return _no_gradients(share, needs_grad_beta)
    settings = (beta, beta_value, -abs(window), needs_grad_beta, *pixels)
    gradients: tuple[Tensor, Tensor] = op(
        grad, share.local, mass, stats, _window_pixel(share, window, stats, peak), *settings
    )
    return gradients


def _expectation_forward(
    op: Callable[..., Any],
    heatmap: DTensor,
    values: DTensor,
    beta: DTensor | None,
    beta_value: float,
    *pixels: Any,
    **named_pixels: Any,
) -> tuple[DTensor, ...]:
    share, own_values = _Share(heatmap), values.to_local()
    own_beta, own_pixels = share.take_broadcast(beta), share.take_pixels(*pixels, **named_pixels)
    if not share.spread:
        results = op(share.local, own_values, own_beta, beta_value, *own_pixels)
    else:
        state, mean = _expectation(share, own_values, own_beta, beta_value, own_pixels)
        stats = torch.nn.functional.pad(state, (0, _STATS - state.shape[-1]))
        results = [tensor.to(share.dtype) for tensor in (_fill_empty(mean, state, own_pixels), stats)]
    return tuple(share.wrap_result(result) for result in results)


def _expectation_backward(
    op: Callable[..., Any],
    grad: DTensor,
    heatmap: DTensor,
    values: DTensor,
    expectation: DTensor,
    stats: DTensor,
    beta: DTensor | None,
    beta_value: float,
    *rest: Any,
    **named_pixels: Any,
) -> tuple[DTensor, DTensor, DTensor]:
    share, own_values = _Share(heatmap), values.to_local()
    needs_grad_heatmap, needs_grad_values, needs_grad_beta, *pixels = rest
    needs_grad_heatmap |= needs_grad_beta
    own_grad, *of_maps = (share.take(tensor) for tensor in (grad, expectation, stats))
    own_pixels = share.take_pixels(*pixels, **named_pixels)
    if share.has_pixels:
        settings = (share.take_broadcast(beta), beta_value, *rest[:3], *own_pixels)
        gradients = op(own_grad, share.local, own_values, *of_maps, *settings)
    else:
        of_heatmap, of_beta = _no_gradients(share, needs_grad_beta)
        gradients = of_heatmap, torch.empty_like(own_values), of_beta
    # Ranks with different maps each have a part of what is summed over maps.
    of_values = [
        Partial() if own.is_replicate() and maps.is_shard() else own
        for own, maps in zip(values.placements, share.placements, strict=True)
    ]
    return (
        share.wrap_heatmap(gradients[0]) if needs_grad_heatmap else share.wrap_nothing(),
        _from_local(gradients[1], share, of_values, values.shape, values.stride())
        if needs_grad_values
        else share.wrap_nothing(),
        share.wrap_grad_beta(gradients[2], needs_grad_beta),
    )


# ---- Registration ---------------------------------------------------------------------------------------------------


def _register(name: str, rule: Callable[..., Any]) -> None:
    def dispatch(_: type, op: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.no_grad():  # autograd is above: DTensors come apart here without a trace
            return rule(op, *args, **(kwargs or {}))

    torch.library.register_torch_dispatch(name, DTensor, dispatch)


for _prefix in ("kpfused::", "kpfused::_"):
    _register(f"{_prefix}soft_argmax2d", functools.partial(_forward, values=_STATS))
    _register(f"{_prefix}soft_argmax2d_backward", _backward)
    _register(f"{_prefix}spatial_moments2d", functools.partial(_forward, values=_MOMENT_STATS))
    _register(f"{_prefix}spatial_moments2d_backward", _moments_backward)
    for _name, _kept, _spread, _spread_backward in (
        ("spatial_softmax2d", 1, _spread_softmax, _spread_softmax_backward),
        ("expectation2d", 1, _spread_coordinates, _spread_coordinates_backward),
        ("window_mass2d", 3, _spread_window, _spread_window_backward),
    ):
        _register(f"{_prefix}{_name}", functools.partial(_map_forward, spread=_spread))
        _register(f"{_prefix}{_name}_backward", functools.partial(_map_backward, kept=_kept, spread=_spread_backward))
    _register(f"{_prefix}spatial_expectation2d", _expectation_forward)
    _register(f"{_prefix}spatial_expectation2d_backward", _expectation_backward)
