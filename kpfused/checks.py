# SPDX-License-Identifier: MIT
"""Checks of arguments, written once. Each error names the argument, what was got and what is wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kpfused.reference import COORDINATES

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INDEX = {name: index for index, name in enumerate(COORDINATES)}


def check_heatmap(heatmap: Tensor) -> None:
    """Accepts floating-point ``(..., H, W)`` with at least one pixel."""
    if not isinstance(heatmap, Tensor):
        raise TypeError(f"heatmap must be a torch.Tensor; got {type(heatmap).__name__}")
    if heatmap.dtype not in _DTYPES:
        raise TypeError(f"heatmap must be float32, float64, float16 or bfloat16; got {heatmap.dtype}")
    if heatmap.layout != torch.strided:
        raise TypeError(f"heatmap must be a strided tensor; got layout {heatmap.layout}")
    shape = heatmap.shape  # made anew at every access
    if len(shape) < 2:
        raise ValueError(f"heatmap must have at least two dimensions (..., H, W); got shape {tuple(shape)}")
    if shape[-1] == 0 or shape[-2] == 0:
        raise ValueError(f"heatmap must have H >= 1 and W >= 1; got shape {tuple(shape)}")


def coordinates_index(coordinates: str) -> int:
    """The index of a preset, or a ValueError that lists them."""
    index = _INDEX.get(coordinates) if isinstance(coordinates, str) else None
    if index is None:
        raise ValueError(f"coordinates must be one of {', '.join(map(repr, COORDINATES))}; got {coordinates!r}")
    return index


def check_sharpness(name: str, value: Tensor | float) -> None:
    """Accepts a finite number or a floating-point tensor as ``beta`` or ``temperature``; a temperature is not zero."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {value.dtype}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a torch.Tensor; got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite would break a compiled graph in which the number changes
        raise ValueError(f"{name} must be finite; got {value}")
    if name == "temperature" and value == 0:
        raise ValueError("temperature must not be zero; a map's softmax divides by it")


def check_beta_or_temperature(beta: Tensor | float, temperature: Tensor | float | None) -> None:
    """Accepts one of the two; ``beta`` counts as not given while it has its default, the number 1."""
    if temperature is None:
        check_sharpness("beta", beta)
        return
    check_sharpness("temperature", temperature)
    if isinstance(beta, Tensor) or beta != 1:
        raise ValueError(f"give beta or temperature, not both; got beta={beta!r} and temperature={temperature!r}")


def check_broadcast(name: str, tensor: Tensor, heatmap: Tensor) -> None:
    """Accepts a tensor on the heatmap's device that broadcasts against its leading dimensions."""
    if tensor.device != heatmap.device:
        raise ValueError(f"{name} must be on the device of heatmap, {heatmap.device}; got {tensor.device}")
    leading = heatmap.shape[:-2]
    missing = len(leading) - tensor.dim()
    fits = missing >= 0 and all(
        have in (1, want) for have, want in zip(tensor.shape, leading[max(missing, 0) :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast against the leading dimensions {tuple(leading)} of heatmap; "
            f"got shape {tuple(tensor.shape)}"
        )
