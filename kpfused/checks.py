# SPDX-License-Identifier: MIT
"""Checks of arguments, written once. Each error names the argument, what was got and what is wanted."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from kpfused.reference import COORDINATES

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_STRIDED = torch.strided
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# beta times log2 e, and times what backward has of gradients and pixels, is a float32 in the kernels.
MOST_BETA, _LEAST_TEMPERATURE = 1e30, 1e-30
_INDEX = {name: index for index, name in enumerate(COORDINATES)}


def check_heatmap(heatmap: Tensor, dims: str = "HW", name: str = "heatmap") -> None:
    """Accepts floating-point ``(..., H, W)``, or what else ``dims`` names, with at least one pixel."""
    if not isinstance(heatmap, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(heatmap).__name__}")
    if heatmap.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16; got {heatmap.dtype}")
    if heatmap.layout is not _STRIDED:
        raise TypeError(f"{name} must be a strided tensor; got layout {heatmap.layout}")
    shape = heatmap.shape  # made anew at every access
    count = len(dims)
    if len(shape) < count:
        least = ("one dimension", "two dimensions", "three dimensions")[count - 1]
        raise ValueError(f"{name} must have at least {least} (..., {', '.join(dims)}); got shape {tuple(shape)}")
    # Of up to three: a loop would take longer than all that is here, and a slice is one more shape to make.
    if shape[-count] == 0 or shape[-count // 2] == 0 or shape[-1] == 0:
        wanted = " and ".join(f"{dim} >= 1" for dim in dims)
        raise ValueError(f"{name} must have {wanted}; got shape {tuple(shape)}")


def check_depth(heatmap: Tensor, depth: int) -> None:
    """Accepts ``(..., K * D, H, W)`` for a depth D."""
    check_heatmap(heatmap, "CHW")
    check_positive("depth", depth)
    if heatmap.shape[-3] % depth:
        raise ValueError(f"depth must divide the {heatmap.shape[-3]} channels of heatmap; got {depth}")


def coordinates_index(coordinates: str) -> int:
    """The index of a preset, or a ValueError that lists them."""
    index = _INDEX.get(coordinates) if isinstance(coordinates, str) else None
    if index is None:
        raise ValueError(f"coordinates must be one of {', '.join(map(repr, COORDINATES))}; got {coordinates!r}")
    return index


def check_sharpness(name: str, value: Tensor | float) -> None:
    """Accepts a number that float32 holds or a floating-point tensor as ``beta`` or ``temperature``, which is not 0."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {value.dtype}")
        return
    # NumPy's numbers are numbers.Real, which takes longer to find out.
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number or a torch.Tensor; got {type(value).__name__}")
    # Comparisons, not isfinite: that breaks a compiled graph in which the number varies.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite; got {value}")
    if name == "temperature":
        if -_LEAST_TEMPERATURE < value < _LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature must not be zero, nor within {_LEAST_TEMPERATURE} of it: a map's softmax divides by it; "
                f"got {value}"
            )
    elif not -MOST_BETA <= value <= MOST_BETA:
        raise ValueError(f"beta must be from {-MOST_BETA} to {MOST_BETA}; got {value}")


def check_beta_or_temperature(beta: Tensor | float, temperature: Tensor | float | None) -> None:
    """Accepts one of the two; ``beta`` counts as not given while it has its default, the number 1."""
    if temperature is None:
        check_sharpness("beta", beta)
        return
    check_sharpness("temperature", temperature)
    check_sharpness("beta", beta)
    if isinstance(beta, Tensor) or beta is True or beta != 1:
        raise ValueError(f"give beta or temperature, not both; got beta={beta!r} and temperature={temperature!r}")


def check_positive(name: str, count: int) -> None:
    """Accepts a count of at least one."""
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int; got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")


def check_empty_value(empty_value: float | None) -> None:
    """Accepts a number, NaN and infinities among them, or None."""
    if isinstance(empty_value, bool) or not isinstance(empty_value, (int, float, numbers.Real, type(None))):
        raise TypeError(f"empty_value must be a number or None; got {type(empty_value).__name__}")


def check_window(size: int, around: str) -> None:
    """Accepts an odd number of pixels, around the mean or the peak."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size of the window must be an int; got {type(size).__name__}")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size of the window must be odd and at least 1; got {size}")
    if around not in ("mean", "peak"):
        raise ValueError(f"around must be 'mean' or 'peak'; got {around!r}")


def check_broadcast(name: str, tensor: Tensor, heatmap: Tensor, dims: int = 2) -> None:
    """Accepts a tensor on the heatmap's device that broadcasts against its dimensions before the last ``dims``."""
    _check_device(name, tensor, heatmap)
    leading = heatmap.shape[:-dims]
    if not _broadcasts(tensor.shape, leading):
        raise ValueError(
            f"{name} must broadcast against the leading dimensions {tuple(leading)} of heatmap; "
            f"got shape {tuple(tensor.shape)}"
        )


def check_mask(mask: Tensor, heatmap: Tensor) -> None:
    """Accepts a bool tensor on the heatmap's device that broadcasts to it."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a tensor of torch.bool, True where a pixel counts; got {mask.dtype}")
    _check_device("mask", mask, heatmap)
    if not _broadcasts(mask.shape, heatmap.shape):
        raise ValueError(
            f"mask must broadcast to the shape {tuple(heatmap.shape)} of heatmap; got shape {tuple(mask.shape)}"
        )


def check_valid_size(valid_size: tuple[Tensor | int, Tensor | int], heatmap: Tensor) -> None:
    """Accepts (height, width), each a number within the map or an integer tensor as :func:`check_broadcast` does."""
    if not isinstance(valid_size, (tuple, list)) or len(valid_size) != 2:
        what = f"one tensor {tuple(valid_size.shape)}" if isinstance(valid_size, Tensor) else repr(valid_size)
        raise TypeError(f"valid_size must be (height, width); got {what}")
    for axis, size, most in zip(("height", "width"), valid_size, heatmap.shape[-2:], strict=True):
        name = f"{axis} of valid_size"
        if isinstance(size, Tensor):
            if size.dtype not in _INTEGERS:
                raise TypeError(f"{name} must be an integer tensor; got {size.dtype}")
            check_broadcast(name, size, heatmap)
        elif isinstance(
            size, torch.SymInt
        ):  # of a size that an exported program leaves open; kernels clamp it to the map
            continue
        elif isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"{name} must be an integer or a torch.Tensor; got {type(size).__name__}")
        elif not 0 <= size <= most:
            raise ValueError(f"{name} must be from 0 to {most}; got {size}")


def check_values(values: Tensor, heatmap: Tensor) -> None:
    """Accepts ``(..., C, H, W)`` of the heatmap's dtype, device and H and W, whose leading dimensions broadcast."""
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor; got {type(values).__name__}")
    if values.dtype != heatmap.dtype:
        raise TypeError(f"values must have the dtype of heatmap, {heatmap.dtype}; got {values.dtype}")
    _check_device("values", values, heatmap)
    leading, size = heatmap.shape[:-2], heatmap.shape[-2:]
    if values.dim() < 3 or values.shape[-2:] != size or not _broadcasts(values.shape[:-3], leading):
        wanted = (*leading, "C", *size)
        raise ValueError(
            f"values must be (..., C, H, W) and broadcast to ({', '.join(map(str, wanted))}) of heatmap; "
            f"got shape {tuple(values.shape)}"
        )


def _check_device(name: str, tensor: Tensor, heatmap: Tensor) -> None:
    if tensor.device != heatmap.device:
        raise ValueError(f"{name} must be on the device of heatmap, {heatmap.device}; got {tensor.device}")


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    missing = len(to) - len(shape)
    return missing >= 0 and all(have in (1, want) for have, want in zip(shape, to[max(missing, 0) :], strict=True))
