# SPDX-License-Identifier: MIT
"""The package's functions in a few plain PyTorch lines.

The oracle of the tests (run it in float64), the eager peer of the benchmarks, and what devices without a kernel use.
Everything here is differentiable by autograd and works on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kpfused.results import SpatialMoments

COORDINATES = ("pixel", "corners", "centers", "unit", "unit_centered")


def coordinate_units(size: int, coordinates: str) -> tuple[float, float]:
    """The affine map of a preset along one axis, as ``(scale, offset)`` of pixels counted from the centre.

    The coordinate of pixel ``i`` on an axis of ``size`` pixels is ``scale * (i - (size - 1) / 2) + offset``.
    """
    if coordinates == "pixel":  # i
        return 1.0, (size - 1) / 2
    if coordinates == "corners":  # 2 i / (size - 1) - 1, and 0 on an axis of one pixel
        return (2 / (size - 1) if size > 1 else 0.0), 0.0
    if coordinates == "centers":  # (2 i + 1) / size - 1
        return 2 / size, 0.0
    if coordinates == "unit":  # i / size
        return 1 / size, (size - 1) / (2 * size)
    if coordinates == "unit_centered":  # i / size - 1 / 2
        return 1 / size, -1 / (2 * size)
    raise ValueError(f"coordinates must be one of {', '.join(COORDINATES)}; got {coordinates!r}")


def coordinate_axis(size: int, coordinates: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coordinates of the ``size`` pixels of one axis in the units of a preset. Shape ``(size,)``."""
    scale, offset = coordinate_units(size, coordinates)
    return (torch.arange(size, dtype=dtype, device=device) - (size - 1) / 2) * scale + offset


def soft_argmax2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float = math.nan,
) -> Tensor:
    """Expected (x, y) under ``softmax(beta * heatmap)`` over the last two dimensions. ``(..., H, W)`` to ``(..., 2)``.

    As the fused op: float32 results (float64 for float64 maps), and a logit of -inf is probability zero even where
    ``beta`` is zero. ``mask``, ``valid_size`` and ``empty_value`` as in :func:`kpfused.soft_argmax2d`.
    """
    scaled, empty = _scaled(heatmap, beta, counting(heatmap, mask, valid_size))
    probability = torch.softmax(scaled.flatten(-2), -1).view(scaled.shape)
    mean = torch.stack([(m * axis).sum(-1) for m, axis in _marginals(probability, coordinates)], -1)
    return mean if empty is None else mean.masked_fill(empty[..., None], empty_value)


def spatial_softmax2d(heatmap: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """``softmax(beta * heatmap)`` over the last two dimensions, in the dtype of coordinates."""
    scaled, _ = _scaled(heatmap, beta, None)
    return torch.softmax(scaled.flatten(-2), -1).view(scaled.shape)


def spatial_moments2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float = math.nan,
) -> SpatialMoments:
    """Mean, covariance, entropy, logsumexp, peak and its probability, as the fused op defines them."""
    map_scaled, empty = _scaled(heatmap, beta, counting(heatmap, mask, valid_size))
    scaled, width = map_scaled.flatten(-2), heatmap.shape[-1]
    log_p = torch.log_softmax(scaled, -1)
    p = log_p.exp().view(heatmap.shape)
    (of_x, x), (of_y, y) = _marginals(p, coordinates)
    mean_x, mean_y = (of_x * x).sum(-1), (of_y * y).sum(-1)
    dx, dy = x - mean_x[..., None], y - mean_y[..., None]
    xx, yy = (of_x * dx * dx).sum(-1), (of_y * dy * dy).sum(-1)
    xy = ((p * dx[..., None, :]).sum(-1) * dy).sum(-1)
    covariance = torch.stack((torch.stack((xx, xy), -1), torch.stack((xy, yy), -1)), -2)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    # The order of the logits, which a beta of zero would level; maps without weight have their first pixel.
    sign = torch.where(torch.as_tensor(beta, device=heatmap.device) < 0, -1, 1)[..., None]
    index = (heatmap.detach().flatten(-2) * sign).masked_fill(scaled == -torch.inf, -torch.inf).argmax(-1)
    peak_probability = log_p.exp().gather(-1, index[..., None])[..., 0]
    mean, logsumexp = torch.stack((mean_x, mean_y), -1), torch.logsumexp(scaled, -1)
    moments = SpatialMoments(
        mean, covariance, entropy, logsumexp, torch.stack((index % width, index // width), -1), peak_probability
    )
    if empty is None:
        return moments
    filled = (
        f.masked_fill(empty.view(empty.shape + (1,) * (f.dim() - empty.dim())), 0 if f is moments.peak else empty_value)
        for f in moments
    )
    return SpatialMoments(*filled)


def counting(
    heatmap: Tensor, mask: Tensor | None, valid_size: tuple[Tensor | int, Tensor | int] | None
) -> Tensor | None:
    """Which pixels count, broadcastable to the heatmap; None for all."""
    if valid_size is not None:
        rows, columns = (torch.arange(n, device=heatmap.device) for n in heatmap.shape[-2:])
        height, width = (torch.as_tensor(n, device=heatmap.device)[..., None, None] for n in valid_size)
        within = (rows[:, None] < height) & (columns < width)
        return within if mask is None else within & mask
    return mask


def _scaled(heatmap: Tensor, beta: Tensor | float, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``beta * heatmap`` in the dtype of coordinates, -inf where nothing weighs: at -inf logits, even where beta is
    zero, and at pixels that do not count. And where some may not, the maps without weight, free of -inf."""
    dtype = torch.float64 if heatmap.dtype == torch.float64 else torch.float32
    logits = heatmap.to(dtype)
    beta = torch.as_tensor(beta, dtype=dtype, device=heatmap.device)[..., None, None]
    weightless = (logits == -torch.inf) & (beta >= 0)
    if counts is not None:
        weightless = weightless | (torch.where(beta < 0, -1, 1) * logits == -torch.inf) | ~counts
    scaled = (beta * logits.masked_fill(weightless, 0)).masked_fill(weightless, -torch.inf)
    if counts is None:
        return scaled, None
    empty = weightless.flatten(-2).all(-1)
    return scaled.masked_fill(empty[..., None, None], 0), empty


def _marginals(probability: Tensor, coordinates: str) -> list[tuple[Tensor, Tensor]]:
    """For x, then y: the marginal probability and the coordinates it lies over."""
    # Products and sums, not a matrix product: autocast would run that in half precision.
    height, width = probability.shape[-2:]
    dtype, device = probability.dtype, probability.device
    return [
        (probability.sum(-2), coordinate_axis(width, coordinates, dtype=dtype, device=device)),
        (probability.sum(-1), coordinate_axis(height, coordinates, dtype=dtype, device=device)),
    ]
