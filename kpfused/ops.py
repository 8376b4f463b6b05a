# SPDX-License-Identifier: MIT
"""The compiled ops: the way from a checked call to a kernel.

Functions here trust their arguments: ``kpfused.functional`` has checked them. Importing this module registers what
PyTorch asks of every op: derivatives, batching rules and fake kernels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kpfused import autograd, fake, vmap
from kpfused.dtensor import is_distributed, prepare_distributed, sharding_rules
from kpfused.kernels import (
    EXPECTATION2D,
    HAS_CUDA,
    KERNELS,
    MOMENTS2D,
    MOMENTS3D,
    SOFT_ARGMAX2D,
    SOFTMAX2D,
    WINDOW_MASS2D,
    Kernel,
    foldable,
)
from kpfused.results import SpatialMoments

# By names of their own: each dot of the way to them is a look into a dictionary, at every call.
is_compiling, transforms_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_FIELDS = len(SpatialMoments._fields)


def soft_argmax2d(heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any) -> Tensor:
    """Soft-argmax of checked arguments.

    Args:
        heatmap: ``(..., H, W)``, floating point.
        beta: None, or a contiguous tensor in the accumulator dtype that broadcasts against the leading dimensions.
        beta_value: beta where ``beta`` is None.
        coordinates: index into ``reference.COORDINATES``.
        pixels: nothing where all pixels count; otherwise mask or None (bool, of the heatmap's shape), valid size or
            None (contiguous int64 ``(..., 2)``, height and width, leading dimensions as those of beta), and empty
            value or None.
    """
    return call(SOFT_ARGMAX2D, heatmap, beta, beta_value, coordinates, *pixels)[0]


def spatial_moments2d(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
) -> SpatialMoments:
    """Moments of checked arguments, which are those of :func:`soft_argmax2d`."""
    return SpatialMoments(*call(MOMENTS2D, heatmap, beta, beta_value, coordinates, *pixels)[:_FIELDS])


def spatial_softmax2d(heatmap: Tensor, beta: Tensor | None, beta_value: float, *pixels: Any) -> Tensor:
    """The softmax map of checked arguments, which are those of :func:`soft_argmax2d`."""
    return call(SOFTMAX2D, heatmap, beta, beta_value, 0, *pixels)[0]


def expectation2d(probabilities: Tensor, coordinates: int, *pixels: Any) -> Tensor:
    """Expected coordinates under probability maps, of checked arguments."""
    return call(EXPECTATION2D, probabilities, None, 1.0, coordinates, *pixels)[0]


def window_mass(
    heatmap: Tensor, size: int, around: str, beta: Tensor | None, beta_value: float, *pixels: Any
) -> Tensor:
    """Probability within a window, of checked arguments, which else are those of :func:`soft_argmax2d`."""
    return call(WINDOW_MASS2D, heatmap, beta, beta_value, -size if around == "peak" else size, *pixels)[0]


def spatial_moments3d(
    heatmap: Tensor,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    mask: Tensor | None = None,
    valid_size: None = None,
    empty_value: float | None = None,
) -> SpatialMoments:
    """Moments of volumes ``(..., D, H, W)``, slice by slice; beta broadcasts against ``(..., D)``."""
    # The dimension before depth goes behind it where it lies so in memory, as in channels_last_3d.
    if heatmap.dim() > 3 and heatmap.stride(-4) < heatmap.stride(-3):
        heatmap, coordinates = heatmap.transpose(-3, -4), ~coordinates
        mask = None if mask is None else mask.transpose(-3, -4)
        beta = None if beta is None else _swapped(beta, heatmap.shape[:-2])
    if is_distributed(heatmap, beta, mask):
        return sharding_rules().spatial_moments3d(heatmap, beta, beta_value, coordinates, mask, empty_value)  # type: ignore[no-any-return]
    pixels = () if mask is None and empty_value is None else (mask, valid_size, empty_value)
    return SpatialMoments(*call(MOMENTS3D, heatmap, beta, beta_value, coordinates, *pixels)[:_FIELDS])


def _swapped(beta: Tensor, leading: torch.Size) -> Tensor:
    if beta.dim() < 2:
        return beta
    return foldable(beta.transpose(-1, -2), leading).contiguous()


def call(
    kernel: Kernel, heatmap: Tensor, beta: Tensor | None, beta_value: float, setting: int, *pixels: Any
) -> tuple[Tensor, ...]:
    """The outputs of a kernel: all of them, or the results alone."""
    if takes_composition(heatmap):
        return kernel.composition(heatmap, beta, beta_value, setting, *pixels)
    settings = (beta_value, setting, *pixels)
    result: tuple[Tensor, ...]
    if transforms_active():
        result = kernel.transformable(heatmap, beta, *settings)
    elif not is_plain(heatmap, beta, pixels):
        heatmap, beta, *pixels = prepare_distributed(heatmap, beta, *pixels)
        result = kernel.forward(heatmap, beta, beta_value, setting, *pixels)
    elif is_compiling():
        result = kernel.forward(heatmap, beta, *settings)
    elif torch.is_grad_enabled() and (heatmap.requires_grad or (beta is not None and beta.requires_grad)):
        beta = None if beta is None else _unwrap_if_dead(beta)
        output = kernel.eager(_unwrap_if_dead(heatmap), beta, settings)
        result = (output,) if kernel.has_one_result else output
    else:
        result = kernel.launch_forward(heatmap, beta, *settings)
    return result


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead  # of a tensor that outlived the transform it was made in


def takes_composition(heatmap: Tensor) -> bool:
    """Devices without a kernel, forward-mode derivatives, transforms inside a compiled graph, and export to ONNX."""
    # Not by its device: to make a device object costs as much as all other checks together.
    if not (heatmap.is_cpu or (heatmap.is_cuda and HAS_CUDA) or heatmap.is_meta):
        if not is_compiling():
            _warn_of_slow_path(heatmap.device.type)
        return True
    if forward_ad._current_level >= 0:
        return True
    return is_compiling() and (transforms_active() or torch.onnx.is_in_onnx_export())


def is_plain(heatmap: Tensor, beta: Tensor | None, pixels: Sequence[Any]) -> bool:
    """Whether no tensor subclass has to see the op."""
    return (
        type(heatmap) in _PLAIN
        and (beta is None or type(beta) in _PLAIN)
        and (len(pixels) == 0 or all(tensor is None or type(tensor) in _PLAIN for tensor in pixels[:2]))
    )


_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def _warn_of_slow_path(device_type: str) -> None:
    if device_type == "cuda":
        warnings.warn(
            "kpfused was built without CUDA kernels; CUDA tensors take the slower PyTorch composition. "
            "Rebuild it with nvcc on PATH (see `python -m kpfused.info`).",
            stacklevel=6,
        )


for _kernel in KERNELS:
    autograd.register(_kernel)
    vmap.register(_kernel)
    fake.register(_kernel)
