# SPDX-License-Identifier: MIT
"""What users give, checked, as an op takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kpfused import checks, dtensor, kernels


def checked(
    heatmap: Tensor, beta: Tensor | float, temperature: Tensor | float | None, coordinates: str, dims: str = "HW"
) -> tuple[Tensor, Tensor | None, float, int]:
    """The arguments of an op: heatmap, beta as a tensor or None, beta as a number, index of the units."""
    checks.check_heatmap(heatmap, dims)
    checks.check_beta_or_temperature(beta, temperature)
    index = checks.coordinates_index(coordinates)
    if temperature is None and not isinstance(beta, Tensor):
        return heatmap, None, float(beta), index
    if temperature is not None and not isinstance(temperature, Tensor):
        return heatmap, None, 1.0 / float(temperature), index
    return heatmap, _beta_tensor(heatmap, beta, temperature, len(dims)), 0.0, index


def counting(
    heatmap: Tensor,
    mask: Tensor | None,
    valid_size: tuple[Tensor | int, Tensor | int] | None,
    empty_value: float | None,
) -> tuple[Any, ...]:
    """Which pixels count, as an op takes it: nothing where all do."""
    if mask is None and valid_size is None and empty_value is None:
        return ()
    checks.check_empty_value(empty_value)
    if mask is not None:
        checks.check_mask(mask, heatmap)
        mask = mask.expand(heatmap.shape)
    size = None
    if valid_size is not None:
        checks.check_valid_size(valid_size, heatmap)
        height, width = (
            n.to(torch.int64)
            if isinstance(n, Tensor)
            # Not as_tensor, which fixes a size that the compiler takes for a symbol.
            else torch.full((), n, dtype=torch.int64, device=heatmap.device)
            for n in valid_size
        )
        height, width = dtensor.together(height, width)
        if height.shape != width.shape:  # where they are alike, a stack is all that is launched
            height, width = height + 0 * width, width + 0 * height
        size = torch.stack((height, width), -1)
        if height.dim() or width.dim():
            size = kernels.foldable(size, heatmap.shape[:-2], trailing=1).contiguous()
    return mask, size, empty_value


def _beta_tensor(heatmap: Tensor, beta: Tensor | float, temperature: Tensor | float | None, dims: int) -> Tensor:
    """beta as the kernels read it: the accumulator dtype, contiguous, broadcast along one run of dimensions."""
    name, tensor = ("beta", beta) if temperature is None else ("temperature", temperature)
    assert isinstance(tensor, Tensor)
    checks.check_broadcast(name, tensor, heatmap, dims)
    tensor = tensor.to(kernels.accumulator_dtype(heatmap.dtype))
    if temperature is not None:
        tensor = tensor.reciprocal()
    return kernels.foldable(tensor, heatmap.shape[:-dims]).contiguous()
