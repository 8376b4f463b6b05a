# SPDX-License-Identifier: MIT
"""The package's functions in a few plain PyTorch lines.

The oracle of the tests (run it in float64), the eager peer of the benchmarks, and what devices without a kernel,
forward-mode derivatives and ONNX export use. Everything here is differentiable by autograd and works on any device.
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
    empty_value: float | None = None,
) -> Tensor:
    """Expected (x, y) under ``softmax(beta * heatmap)`` over the last two dimensions. ``(..., H, W)`` to ``(..., 2)``.

    As the fused op: float32 results (float64 for float64 maps), and a logit of -inf is probability zero even where
    ``beta`` is zero. ``mask``, ``valid_size`` and ``empty_value`` as in :func:`kpfused.soft_argmax2d`.
    """
    scaled, empty = _scaled(heatmap, beta, 2, counting(heatmap, mask, valid_size), empty_value)
    mean = torch.stack([(m * axis).sum(-1) for m, axis in _marginals(_softmax(scaled, 2), 2, coordinates)], -1)
    return filled(mean, empty, empty_value)


def spatial_softmax2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> Tensor:
    """``softmax(beta * heatmap)`` over the last two dimensions, in the dtype of coordinates."""
    scaled, empty = _scaled(heatmap, beta, 2, counting(heatmap, mask, valid_size), empty_value)
    return filled(_softmax(scaled, 2), empty, empty_value)


def spatial_expectation2d(
    heatmap: Tensor,
    values: Tensor,
    beta: Tensor | float = 1.0,
    *,
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> Tensor:
    """Expectation of ``values`` ``(..., C, H, W)`` under ``softmax(beta * heatmap)``, ``(..., C)``."""
    counts = counting(heatmap, mask, valid_size)
    scaled, empty = _scaled(heatmap, beta, 2, counts, empty_value)
    values = values.to(scaled.dtype)
    if counts is not None:
        values = values.masked_fill(~counts.unsqueeze(-3), 0)
    # Not a matrix product: autocast would run that in half precision.
    mean = (_softmax(scaled, 2).unsqueeze(-3) * values).sum((-2, -1))
    return filled(mean, empty, empty_value)


def expectation2d(
    probabilities: Tensor,
    *,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
) -> Tensor:
    """Expected (x, y) under maps that are probabilities. ``(..., H, W)`` to ``(..., 2)``."""
    dtype = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    p, counts = probabilities.to(dtype), counting(probabilities, mask, valid_size)
    if counts is not None:
        p = p.masked_fill(~counts, 0)
    return torch.stack([(m * axis).sum(-1) for m, axis in _marginals(p, 2, coordinates)], -1)


def spatial_moments2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> SpatialMoments:
    """Mean, covariance, entropy, logsumexp, peak and its probability, as the fused op defines them."""
    return _moments(heatmap, beta, 2, coordinates, counting(heatmap, mask, valid_size), empty_value)


def window_mass(
    heatmap: Tensor,
    size: int,
    beta: Tensor | float = 1.0,
    *,
    around: str = "mean",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> Tensor:
    """Probability within a window of ``size`` by ``size`` pixels around the pixel of the mean, or of the peak."""
    counts = counting(heatmap, mask, valid_size)
    mean, _, _, _, peak, _ = _moments(heatmap, beta, 2, "pixel", counts, empty_value)
    centre = peak if around == "peak" else mean.detach().nan_to_num(0).round()
    scaled, empty = _scaled(heatmap, beta, 2, counts, empty_value)
    rows, columns = (torch.arange(n, device=heatmap.device) for n in heatmap.shape[-2:])
    inside = (rows - centre[..., 1, None]).abs() <= size // 2, (columns - centre[..., 0, None]).abs() <= size // 2
    mass = (_softmax(scaled, 2) * (inside[0][..., None] & inside[1][..., None, :])).sum((-2, -1))
    return filled(mass, empty, empty_value)


def spatial_moments3d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    empty_value: float | None = None,
) -> SpatialMoments:
    """Likewise over the last three dimensions, (x, y, z)."""
    return _moments(heatmap, beta, 3, coordinates, mask, empty_value)


def _moments(
    heatmap: Tensor,
    beta: Tensor | float,
    dims: int,
    coordinates: str,
    counts: Tensor | None,
    empty_value: float | None,
) -> SpatialMoments:
    scaled, empty = _scaled(heatmap, beta, dims, counts, empty_value)
    flat = scaled.flatten(-dims)
    log_p = torch.log_softmax(flat, -1)
    p = log_p.exp().view(heatmap.shape)
    axes = _marginals(p, dims, coordinates)
    mean = torch.stack([(marginal * axis).sum(-1) for marginal, axis in axes], -1)
    offsets = [axis - mean[..., i, None] for i, (_, axis) in enumerate(axes)]
    covariance = torch.stack(
        [torch.stack([_second_moment(p, offsets, i, j) for j in range(dims)], -1) for i in range(dims)], -2
    )
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    # The order of the logits, which a beta of zero would level.
    sign = torch.where(torch.as_tensor(beta, dtype=scaled.dtype, device=heatmap.device) < 0, -1, 1)[..., None]
    index = (heatmap.detach().flatten(-dims) * sign).masked_fill(flat == -torch.inf, -torch.inf).argmax(-1)
    if empty is not None:
        index = index.masked_fill(empty, 0)
    chance = log_p.exp().gather(-1, index[..., None])[..., 0]
    peak = []
    for size in reversed(heatmap.shape[-dims:]):
        rest = index // size
        peak.append(index - rest * size)  # not %, which ONNX has for no size that varies
        index = rest
    real = (filled(f, empty, empty_value) for f in (mean, covariance, entropy, torch.logsumexp(flat, -1), chance))
    mean, covariance, entropy, logsumexp, chance = real
    return SpatialMoments(mean, covariance, entropy, logsumexp, torch.stack(peak, -1), chance)


def _second_moment(p: Tensor, offsets: list[Tensor], i: int, j: int) -> Tensor:
    """Sum of ``p`` times the offsets along axes ``i`` and ``j``, where axis 0 is x, the last dimension."""
    for axis in (i, j):
        shape = [offsets[d].shape[-1] if d == axis else 1 for d in reversed(range(len(offsets)))]
        p = p * offsets[axis].reshape(*offsets[axis].shape[:-1], *shape)
    return p.flatten(-len(offsets)).sum(-1)


def counting(
    heatmap: Tensor, mask: Tensor | None, valid_size: tuple[Tensor | int, Tensor | int] | None
) -> Tensor | None:
    """Which pixels count, broadcastable to the heatmap; None for all."""
    if valid_size is not None:
        rows, columns = (torch.arange(n, device=heatmap.device) for n in heatmap.shape[-2:])
        height, width = (n[..., None, None] if isinstance(n, Tensor) else n for n in valid_size)
        within = (rows[:, None] < height) & (columns < width)
        return within if mask is None else within & mask
    return mask


def _scaled(
    heatmap: Tensor,
    beta: Tensor | float,
    dims: int,
    counts: Tensor | None = None,
    empty_value: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``beta * heatmap`` in the dtype of coordinates, -inf where nothing weighs: at -inf logits, even where beta is
    zero, and at pixels that do not count. And where maps may be empty, which are; they are then free of -inf."""
    dtype = torch.float64 if heatmap.dtype == torch.float64 else torch.float32
    logits = heatmap.to(dtype)
    beta = torch.as_tensor(beta, dtype=dtype, device=heatmap.device)[(..., *[None] * dims)]
    weightless = (logits == -torch.inf) & (beta >= 0)
    may_be_empty = counts is not None or empty_value is not None
    if may_be_empty:
        weightless = weightless | (torch.where(beta < 0, -1, 1) * logits == -torch.inf)
    if counts is not None:
        weightless = weightless | ~counts
    scaled = (beta * logits.masked_fill(weightless, 0)).masked_fill(weightless, -torch.inf)
    if not may_be_empty:
        return scaled, None
    empty = weightless.flatten(-dims).all(-1)
    return scaled.masked_fill(empty[(..., *[None] * dims)], 0), empty


def filled(field: Tensor, empty: Tensor | None, empty_value: float | None) -> Tensor:
    """A field of all maps with that of empty ones replaced."""
    if empty is None:
        return field
    value = math.nan if empty_value is None else empty_value
    return field.masked_fill(empty[(..., *[None] * (field.dim() - empty.dim()))], value)


def _softmax(scaled: Tensor, dims: int) -> Tensor:
    return torch.softmax(scaled.flatten(-dims), -1).view(scaled.shape)


def _marginals(probability: Tensor, dims: int, coordinates: str) -> list[tuple[Tensor, Tensor]]:
    """For x, y and so on: the marginal probability and the coordinates it lies over."""
    # Products and sums, not a matrix product: autocast would run that in half precision.
    all_dims = set(range(-dims, 0))
    return [
        (
            probability.sum(sorted(all_dims - {dim})),
            coordinate_axis(probability.shape[dim], coordinates, dtype=probability.dtype, device=probability.device),
        )
        for dim in range(-1, -dims - 1, -1)
    ]
