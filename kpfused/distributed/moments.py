# SPDX-License-Identifier: MIT
"""Rules of the ops of means and moments: maps whose pixels are spread over ranks are merged from the ranks' states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kpfused.distributed.share import MOMENT_STATS, PIXEL, Share
from kpfused.results import SpatialMoments

_PEAK = SpatialMoments._fields.index("peak")
_SMALLEST_SCALE = {torch.float32: 2.0**-121, torch.float64: 2.0**-1013}  # Limits of csrc/moments.h
_NOWHERE = 2.0**40  # kNowhere of csrc/moments.h

# ---- Forward --------------------------------------------------------------------------------------------------------


def forward(
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
    share = Share(heatmap)
    own_beta, own_pixels = share.take_broadcast(beta), share.take_pixels(*pixels, **named_pixels)
    if not share.spread:
        results = op(share.local, own_beta, beta_value, coordinates, *own_pixels)
        return tuple(share.wrap_result(result) for result in results)
    state, sharpness = merged_state(op, share, own_beta, beta_value, own_pixels, values)
    fields = [fill_empty(field, state, own_pixels) for field in _fields(state, sharpness, share.units(coordinates))]
    results = [field.to(share.dtype) for field in (*fields, state[..., :values])]
    if values == MOMENT_STATS:
        results.insert(_PEAK, whole_numbers(state[..., values:]))
    return tuple(share.wrap_result(result) for result in results)


def merged_state(
    op: Callable[..., Any],
    share: Share,
    beta: Tensor | None,
    beta_value: float,
    pixels: tuple[Any, ...],
    values: int,
) -> tuple[Tensor, Tensor | float]:
    """The state of whole maps, in float64, from one all-gather; and the size of beta.

    As the kernels do on the CPU, and as costs nothing for a few numbers a map: between two roundings, float64.
    """
    state = _own_state(op, share, beta, beta_value, pixels, values)
    sharpness = sharpness_of(beta, beta_value)
    for index in share.spread:
        state = _merge(share.gather(state.to(share.dtype), index).double(), scale_of(sharpness, share.dtype))
    return state, sharpness


def sharpness_of(beta: Tensor | None, beta_value: float) -> Tensor | float:
    return abs(beta_value) if beta is None else beta.double().abs()


def fill_empty(field: Tensor, state: Tensor, pixels: tuple[Any, ...]) -> Tensor:
    """With what a map gives in which nothing weighs. Without a mask or such, kernels let that be as it comes."""
    if not pixels:
        return field
    empty = state[..., 1] == 0
    fill = math.nan if pixels[2] is None else pixels[2]
    return field.masked_fill(empty[(..., *[None] * (field.dim() - empty.dim()))], fill)


def _own_state(
    op: Callable[..., Any],
    share: Share,
    beta: Tensor | None,
    beta_value: float,
    pixels: tuple[Any, ...],
    values: int,
) -> Tensor:
    """Stats of this rank's pixels, from the centre of the whole map, and of moments also (x, y) of their peak."""
    size = values + 2 if values == MOMENT_STATS else values
    if not share.has_pixels:
        state = share.of_maps(size)
        state[..., 0] = torch.finfo(share.dtype).min  # as empty_state of csrc/moments.h
        state[..., values:] = _NOWHERE
        return state
    results = op(share.local, beta, beta_value, PIXEL, *pixels)
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


def scale_of(sharpness: Tensor | float, dtype: torch.dtype) -> Tensor | float:
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
    peak, total, down, mean = weighed(peaks, totals, scale)
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


def weighed(
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


def whole_numbers(at: Tensor) -> Tensor:
    """The pixel of a peak; the first where no pixel has it."""
    return at.masked_fill(at >= _NOWHERE, 0).to(torch.int64)


# ---- Backward -------------------------------------------------------------------------------------------------------


def backward(
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
) -> tuple[DTensor, DTensor | None]:
    share = Share(heatmap)
    grad, own_stats = share.take(grad_coordinates), share.take(stats)
    if share.spread:
        grad, own_stats, coordinates = *_as_of_own_map(share, grad, own_stats, coordinates), PIXEL
    settings = share.take_settings(beta, beta_value, coordinates, needs_grad_beta, *pixels, **named_pixels)
    return kernel_gradients(op, share, (grad,), (own_stats,), settings)


def _as_of_own_map(share: Share, grad_mean: Any, stats: Tensor, coordinates: int) -> tuple[Any, Tensor]:
    """The kernel takes a rank's pixels for the map: so pixels for units, and their centre for the map's."""
    (scale_x, _), (scale_y, _) = share.units(coordinates)
    if grad_mean is not None:
        grad_mean = torch.stack((grad_mean[..., 0] * scale_x, grad_mean[..., 1] * scale_y), -1)
    return grad_mean, _shifted(stats, [-shift for shift in share.shift()])


def moments_backward(
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
) -> tuple[DTensor, DTensor | None]:
    share = Share(heatmap)
    grads = (grad_mean, grad_covariance, grad_entropy, grad_logsumexp, grad_peak_probability)
    mean, covariance, entropy, logsumexp, chance = (None if g is None else share.take(g) for g in grads)
    own_stats, own_peak = share.take(stats), share.take(peak)
    if share.spread:
        (scale_x, _), (scale_y, _) = share.units(coordinates)
        mean, own_stats = _as_of_own_map(share, mean, own_stats, coordinates)
        covariance = None if covariance is None else _in_units(covariance, scale_x, scale_y)
        coordinates = PIXEL
        own_peak, is_here = _local_peak(share, own_peak)
        if logsumexp is not None:
            # With the log-sum-exp goes a term of beta's gradient that counts once a map: with the rank of the peak. On
            # others, what is left of its gradient, one constant for all pixels, goes with the probability of the peak,
            # which takes that constant away from all pixels but its own.
            constant = logsumexp * own_stats[..., 1]
            logsumexp = logsumexp.masked_fill(~is_here, 0)
            chance = torch.zeros_like(logsumexp) if chance is None else chance
            chance = torch.where(is_here, chance, chance - constant)
    settings = share.take_settings(beta, beta_value, coordinates, needs_grad_beta, *pixels, **named_pixels)
    own_grads = (mean, covariance, entropy, logsumexp, chance)
    return kernel_gradients(op, share, own_grads, (own_stats, own_peak), settings)


def _local_peak(share: Share, peak: Tensor) -> tuple[Tensor, Tensor]:
    """The peak's pixel among this rank's, a negative one where it is another's; and whether it is this rank's."""
    local = [at - share.first(dim) for at, dim in zip(peak.unbind(-1), (-1, -2), strict=True)]
    inside = [(at >= 0) & (at < share.local.shape[dim]) for at, dim in zip(local, (-1, -2), strict=True)]
    is_here = inside[0] & inside[1]
    return torch.stack([at.masked_fill(~is_here, -1) for at in local], -1), is_here


def kernel_gradients(
    op: Callable[..., Any],
    share: Share,
    grads: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...],
    settings: tuple[Any, ...],
) -> tuple[DTensor, DTensor | None]:
    if share.has_pixels:
        grad_heatmap, grad_beta = op(*grads, share.local, *kept, *settings)
    else:
        grad_heatmap, grad_beta = no_gradients(share, needs_grad_beta=settings[3])
    return share.wrap_heatmap(grad_heatmap), share.wrap_grad_beta(grad_beta)


def no_gradients(share: Share, needs_grad_beta: bool) -> tuple[Tensor, Tensor | None]:
    """Of a rank without pixels: of the heatmap nothing, of beta zero."""
    return torch.empty_like(share.local), share.of_maps() if needs_grad_beta else None
