# SPDX-License-Identifier: MIT
"""The package's functions in a few plain PyTorch lines.

The oracle of the tests (run it in float64), the eager peer of the benchmarks, and what devices without a kernel,
forward-mode derivatives and ONNX export use. Everything here is differentiable by autograd and works on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def soft_argmax2d(heatmap: Tensor, beta: Tensor | float = 1.0, *, coordinates: str = "pixel") -> Tensor:
    """Expected (x, y) under ``softmax(beta * heatmap)`` over the last two dimensions. ``(..., H, W)`` to ``(..., 2)``.

    As the fused op: float32 results (float64 for float64 maps), and a logit of -inf is probability zero even where
    ``beta`` is zero.
    """
    height, width = heatmap.shape[-2:]
    dtype = torch.float64 if heatmap.dtype == torch.float64 else torch.float32
    logits = heatmap.to(dtype)
    beta = torch.as_tensor(beta, dtype=dtype, device=heatmap.device)[..., None, None]
    masked = (logits == -torch.inf) & (beta >= 0)
    scaled = (beta * logits.masked_fill(masked, 0)).masked_fill(masked, -torch.inf)
    probability = torch.softmax(scaled.flatten(-2), -1).view(scaled.shape)
    # Products and sums, not a matrix product: autocast would run that in half precision.
    x = (probability.sum(-2) * coordinate_axis(width, coordinates, dtype=dtype, device=heatmap.device)).sum(-1)
    y = (probability.sum(-1) * coordinate_axis(height, coordinates, dtype=dtype, device=heatmap.device)).sum(-1)
    return torch.stack((x, y), -1)
