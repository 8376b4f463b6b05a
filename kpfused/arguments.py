# SPDX-License-Identifier: MIT
"""What users give, checked, as an op takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kpfused import checks, dtensor, kernels
from kpfused.checks import MOST_BETA
from kpfused.kernels import Settings


def checked(
    heatmap: Tensor,
    beta: Tensor | float,
    temperature: Tensor | float | None,
    setting: int,
    mask: Tensor | None,
    valid_size: tuple[Tensor | int, Tensor | int] | None,
    empty_value: float | None,
    dims: str = "HW",
) -> tuple[Tensor | None, Settings]:
    """What goes to an op beside the heatmap: beta, where it is a tensor, in the accumulator dtype, contiguous and to be
    broadcast against the leading dimensions; and all else."""
    checks.check_heatmap(heatmap, dims)
    tensor, number = None, beta
    # What most calls give has nothing more to be looked at, which takes time as well.
    if temperature is not None or type(beta) is not float or not -MOST_BETA <= beta <= MOST_BETA:
        checks.check_beta_or_temperature(beta, temperature)
        tensor, number = _sharpness(heatmap, beta, temperature, len(dims))
    if mask is None and valid_size is None and empty_value is None:
        return tensor, (number, setting)
    return tensor, (number, setting, *counting(heatmap, mask, valid_size, empty_value))


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


def _sharpness(
    heatmap: Tensor, beta: Tensor | float, temperature: Tensor | float | None, dims: int
) -> tuple[Tensor | None, float]:
    """beta as the kernels read it: a number, or a contiguous tensor in the accumulator dtype that broadcasts along one
    run of dimensions."""
    name, given = ("beta", beta) if temperature is None else ("temperature", temperature)
    if not isinstance(given, Tensor):
        return None, float(given) if temperature is None else 1.0 / float(given)
    checks.check_broadcast(name, given, heatmap, dims)
    tensor = given.to(kernels.accumulator_dtype(heatmap.dtype))
    if temperature is not None:
        tensor = tensor.reciprocal()
    return kernels.foldable(tensor, heatmap.shape[:-dims]).contiguous(), 0.0
