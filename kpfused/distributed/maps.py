# SPDX-License-Identifier: MIT
"""Rules of the ops around the probability map itself: softmax, expectations and windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from kpfused import reference
from kpfused.distributed.moments import (
    fill_empty,
    kernel_gradients,
    merged_state,
    no_gradients,
    scale_of,
    sharpness_of,
    weighed,
    whole_numbers,
)
from kpfused.distributed.share import MOMENT_STATS, PIXEL, STATS, Share, from_local

_ops = torch.ops.kpfused
_CENTERED = reference.COORDINATES.index("unit_centered")


def map_forward(
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
    share = Share(heatmap)
    own_beta, own_pixels = share.take_broadcast(beta), share.take_pixels(*pixels, **named_pixels)
    if share.spread:
        results = spread(op, share, own_beta, beta_value, setting, own_pixels)
    else:
        results = op(share.local, own_beta, beta_value, setting, *own_pixels)
    # A result of the heatmap's shape is a map, in its memory format.
    return tuple((share.wrap_heatmap if r.shape == share.local.shape else share.wrap_result)(r) for r in results)


def map_backward(
    op: Callable[..., Any],
    grad: DTensor,
    heatmap: DTensor,
    *rest: Any,
    kept: int,
    spread: Callable[..., Any],
    **named_pixels: Any,
) -> tuple[DTensor, DTensor | None]:
    """``kept``: how many results of forward follow the heatmap."""
    share = Share(heatmap)
    own = tuple(share.take(tensor) for tensor in rest[:kept])
    is_map = grad.shape == heatmap.shape
    own_grad = grad.redistribute(placements=share.placements).to_local() if is_map else share.take(grad)
    settings = share.take_settings(*rest[kept:], **named_pixels)
    if not share.spread:
        return kernel_gradients(op, share, (own_grad,), own, settings)
    # Also on ranks without pixels, which may have to take part in merging.
    grad_heatmap, grad_beta = spread(op, share, own_grad, *own, *settings)
    return share.wrap_heatmap(grad_heatmap), share.wrap_grad_beta(grad_beta)


def _expectation(
    share: Share,
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
    scale = scale_of(sharpness_of(beta, beta_value), share.dtype)
    scale = scale[..., None] if isinstance(scale, Tensor) else scale
    for index in share.spread:
        peaks, totals, expectations = torch.split(
            share.gather(state.to(share.dtype), index).double(), [1, 1, channels], -1
        )
        peak, total, _, mean = weighed(peaks, totals, scale)
        state = torch.cat((peak, total, mean(expectations)), -1)
    return state[..., :2], state[..., 2:]


def _as_values(tensor: Tensor) -> Tensor:
    """A map as values of one channel."""
    return tensor.unsqueeze(-3)


def spread_softmax(
    op: Callable[..., Any],
    share: Share,
    beta: Tensor | None,
    beta_value: float,
    setting: int,
    pixels: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """The map is what an expectation's gradient is with respect to its values."""
    state, _ = merged_state(_ops._soft_argmax2d, share, beta, beta_value, pixels, STATS)
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
    return fill_empty(probabilities.squeeze(-3), state, pixels), stats


def spread_softmax_backward(
    op: Callable[..., Any],
    share: Share,
    grad: Tensor,
    stats: Tensor,
    beta: Tensor | None,
    beta_value: float,
    setting: int,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor, Tensor | None]:
    """That of the expectation of the upstream gradient, if that were no function of the heatmap."""
    if setting:
        raise NotImplementedError("the result in place of a heatmap whose pixels are spread over ranks")
    values = _as_values(grad)
    _, mean = _expectation(share, values, beta, beta_value, pixels)
    if not share.has_pixels:
        return no_gradients(share, needs_grad_beta)
    one, mean = share.of_maps(1, value=1.0), mean.to(share.dtype)
    needs = (True, False, needs_grad_beta)
    gradients = _ops._spatial_expectation2d_backward(
        one, share.local, values, mean, stats, beta, beta_value, *needs, *pixels
    )
    return gradients[0], gradients[2]


def spread_coordinates(
    op: Callable[..., Any],
    share: Share,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    pixels: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Sums over this rank's pixels, counted from its first and from their middle: the difference tells their mass."""
    own = share.of_maps(2)
    if share.has_pixels:
        from_first, from_middle = (
            op(share.local, beta, beta_value, preset, *pixels)[0].double() for preset in (PIXEL, _CENTERED)
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


def spread_coordinates_backward(
    op: Callable[..., Any],
    share: Share,
    grad: Tensor,
    nothing: Tensor,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor, Tensor | None]:
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
    return gradient, share.of_maps() if needs_grad_beta else None


def _window_pixel(share: Share, window: int, stats: Tensor, peak: Tensor) -> Tensor:
    """The pixel that a window is around, counted from this rank's first; which may be none of its own."""
    if window > 0:
        # As window_of in csrc/fields.h, of the whole map.
        sizes = [share.heatmap.shape[dim] for dim in (-1, -2)]
        pixels = [stats[..., 2 + axis] + (size - 1) / 2 for axis, size in enumerate(sizes)]
        nearest = [p.nan_to_num(0).round().clamp(0, n - 1) for p, n in zip(pixels, sizes, strict=True)]
        peak = torch.stack(nearest, -1).to(torch.int64)
    return torch.stack([at - share.first(dim) for at, dim in zip(peak.unbind(-1), (-1, -2), strict=True)], -1)


def spread_window(
    op: Callable[..., Any],
    share: Share,
    beta: Tensor | None,
    beta_value: float,
    window: int,
    pixels: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    state, _ = merged_state(_ops._spatial_moments2d, share, beta, beta_value, pixels, MOMENT_STATS)
    stats, peak = state[..., :MOMENT_STATS].to(share.dtype).contiguous(), whole_numbers(state[..., MOMENT_STATS:])
    own = share.of_maps()
    if share.has_pixels:
        at = _window_pixel(share, window, stats, peak)
        own = _ops._window_mass2d_at(share.local, stats, at, beta, beta_value, -abs(window), *pixels)
    return fill_empty(share.sum_of_ranks(own), state, pixels), stats, peak


def spread_window_backward(
    op: Callable[..., Any],
    share: Share,
    grad: Tensor,
    mass: Tensor,
    stats: Tensor,
    peak: Tensor,
    beta: Tensor | None,
    beta_value: float,
    window: int,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor, Tensor | None]:
    if not share.has_pixels:
        return no_gradients(share, needs_grad_beta)
    settings = (beta, beta_value, -abs(window), needs_grad_beta, *pixels)
    gradients: tuple[Tensor, Tensor | None] = op(
        grad, share.local, mass, stats, _window_pixel(share, window, stats, peak), *settings
    )
    return gradients


def expectation_forward(
    op: Callable[..., Any],
    heatmap: DTensor,
    values: DTensor,
    beta: DTensor | None,
    beta_value: float,
    *pixels: Any,
    **named_pixels: Any,
) -> tuple[DTensor, ...]:
    share, own_values = Share(heatmap), values.to_local()
    own_beta, own_pixels = share.take_broadcast(beta), share.take_pixels(*pixels, **named_pixels)
    if not share.spread:
        results = op(share.local, own_values, own_beta, beta_value, *own_pixels)
    else:
        state, mean = _expectation(share, own_values, own_beta, beta_value, own_pixels)
        stats = torch.nn.functional.pad(state, (0, STATS - state.shape[-1]))
        results = [tensor.to(share.dtype) for tensor in (fill_empty(mean, state, own_pixels), stats)]
    return tuple(share.wrap_result(result) for result in results)


def expectation_backward(
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
) -> tuple[DTensor | None, ...]:
    share, own_values = Share(heatmap), values.to_local()
    needs_grad_heatmap, needs_grad_values, needs_grad_beta, *pixels = rest
    needs_grad_heatmap |= needs_grad_beta
    own_grad, *of_maps = (share.take(tensor) for tensor in (grad, expectation, stats))
    own_pixels = share.take_pixels(*pixels, **named_pixels)
    if share.has_pixels:
        settings = (share.take_broadcast(beta), beta_value, *rest[:3], *own_pixels)
        gradients = op(own_grad, share.local, own_values, *of_maps, *settings)
    else:
        of_heatmap, of_beta = no_gradients(share, needs_grad_beta)
        gradients = of_heatmap, torch.empty_like(own_values), of_beta
    # Ranks with different maps each have a part of what is summed over maps.
    of_values = [
        Partial() if own.is_replicate() and maps.is_shard() else own
        for own, maps in zip(values.placements, share.placements, strict=True)
    ]
    return (
        share.wrap_heatmap(gradients[0]) if needs_grad_heatmap else None,
        from_local(gradients[1], share, of_values, values.shape, values.stride()) if needs_grad_values else None,
        share.wrap_grad_beta(gradients[2]),
    )
