# SPDX-License-Identifier: MIT
"""The compiled ops: the way from a checked call to a kernel.

Functions here trust their arguments: ``kpfused.functional`` has checked them. Importing this module registers what
PyTorch asks of every op: derivatives, batching rules and fake kernels.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kpfused import autograd, fake, vmap
from kpfused.dtensor import is_distributed, prepare_distributed, sharding_rules
from kpfused.kernels import HAS_CUDA, KERNELS, MOMENTS2D, MOMENTS3D, Kernel, Settings, foldable
from kpfused.results import SpatialMoments

# By names of their own: each dot of the way to them is a look into a dictionary, at every call.
is_compiling, transforms_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
is_grad_enabled, is_tracing = torch.is_grad_enabled, torch._C._is_tracing
_FIELDS = len(SpatialMoments._fields)


def spatial_moments2d(heatmap: Tensor, beta: Tensor | None, settings: Settings) -> SpatialMoments:
    """Moments of checked arguments."""
    return SpatialMoments(*call(MOMENTS2D, heatmap, beta, settings)[:_FIELDS])


def spatial_moments3d(heatmap: Tensor, beta: Tensor | None, settings: Settings) -> SpatialMoments:
    """Moments of volumes ``(..., D, H, W)``, slice by slice; beta broadcasts against ``(..., D)``."""
    # The dimension before depth goes behind it where it lies so in memory, as in channels_last_3d.
    if heatmap.dim() > 3 and heatmap.stride(-4) < heatmap.stride(-3):
        heatmap = heatmap.transpose(-3, -4)
        beta = None if beta is None else _swapped(beta, heatmap.shape[:-2])
        beta_value, coordinates, *pixels = settings
        if pixels and pixels[0] is not None:
            pixels = [pixels[0].transpose(-3, -4), *pixels[1:]]
        settings = (beta_value, ~coordinates, *pixels)
    if is_distributed(heatmap, beta, *settings[2:3]):
        return sharding_rules().spatial_moments3d(heatmap, beta, *settings)  # type: ignore[no-any-return]
    return SpatialMoments(*call(MOMENTS3D, heatmap, beta, settings)[:_FIELDS])


def _swapped(beta: Tensor, leading: torch.Size) -> Tensor:
    if beta.dim() < 2:
        return beta
    return foldable(beta.transpose(-1, -2), leading).contiguous()


def call(kernel: Kernel, heatmap: Tensor, beta: Tensor | None, settings: Settings) -> tuple[Tensor, ...]:
    """The outputs of a kernel: all of them, or the results alone."""
    compiling = is_compiling()
    if takes_composition(heatmap, compiling):
        return kernel.composition(heatmap, beta, *settings)
    result: tuple[Tensor, ...]
    if transforms_active():
        result = kernel.transformable(heatmap, beta, *settings)
    elif not is_plain(heatmap, beta, settings):
        heatmap, beta, *pixels = prepare_distributed(heatmap, beta, *settings[2:])
        result = kernel.forward(heatmap, beta, *settings[:2], *pixels)
    elif compiling or is_tracing():  # programs that are kept name the op that is there to be seen
        result = kernel.forward(heatmap, beta, *settings)
    elif is_grad_enabled() and (heatmap.requires_grad or (beta is not None and beta.requires_grad)):
        beta = None if beta is None else _unwrap_if_dead(beta)
        output = kernel.eager(_unwrap_if_dead(heatmap), beta, settings)
        result = (output,) if kernel.has_one_result else output
    else:
        result = kernel.launch_forward(heatmap, beta, *settings)
    return result


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead  # of a tensor that outlived the transform it was made in


def takes_composition(heatmap: Tensor, compiling: bool) -> bool:
    """Devices without a kernel, forward-mode derivatives, transforms inside a compiled graph, and export to ONNX."""
    # Not by its device: to make a device object costs as much as all other checks together.
    if not (heatmap.is_cpu or (heatmap.is_cuda and HAS_CUDA) or heatmap.is_meta):
        if not compiling:
            _warn_of_slow_path(heatmap.device.type)
        return True
    if forward_ad._current_level >= 0:
        return True
    return compiling and (transforms_active() or torch.onnx.is_in_onnx_export())


def is_plain(heatmap: Tensor, beta: Tensor | None, settings: Settings) -> bool:
    """Whether no tensor subclass has to see the op."""
    return (
        type(heatmap) in PLAIN
        and type(beta) in PLAIN
        and (len(settings) == 2 or PLAIN.issuperset(map(type, settings[2:4])))
    )


PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})  # of a tensor that may be absent


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
