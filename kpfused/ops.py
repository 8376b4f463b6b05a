# SPDX-License-Identifier: MIT
"""The compiled ops: fake kernels, autograd, and the way from a checked call to a kernel.

The only module that touches ``torch.ops.kpfused``. Functions here trust their arguments: ``kpfused.functional`` has
checked them.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from kpfused import _C, reference

_OPS = torch.ops.kpfused
# Resolved once: looking an overload up costs as much as a small kernel.
_FORWARD = _OPS._soft_argmax2d.default
_BACKWARD = _OPS._soft_argmax2d_backward.default
_DIFFERENTIABLE_FORWARD = _OPS.soft_argmax2d.default
_DIFFERENTIABLE_BACKWARD = _OPS.soft_argmax2d_backward.default

_HAS_CUDA = bool(_C.build_info()["cuda"])
_STATS = 4  # kStats of csrc/params.h


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates, stats and beta for maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_kernel(device_type: str) -> bool:
    """Whether this build has kernels for a device type such as ``"cuda"``."""
    return device_type == "cpu" or (device_type == "cuda" and _HAS_CUDA)


def soft_argmax2d(heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int) -> Tensor:
    """Soft-argmax of checked arguments.

    Args:
        heatmap: ``(..., H, W)``, floating point.
        beta: None, or a contiguous tensor in the accumulator dtype that broadcasts against the leading dimensions.
        beta_value: beta where ``beta`` is None.
        coordinates: index into ``reference.COORDINATES``.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _needs_reference(heatmap):
        return reference.soft_argmax2d(
            heatmap, beta_value if beta is None else beta, coordinates=reference.COORDINATES[coordinates]
        )
    plain = _is_plain(heatmap, beta)
    if not plain and _is_distributed(heatmap, beta):
        from kpfused import distributed  # slow to import, and registers the sharding rules

        heatmap, beta = distributed.prepare(heatmap, beta)
    if compiling or not plain:
        result: Tensor = _DIFFERENTIABLE_FORWARD(heatmap, beta, beta_value, coordinates)[0]
    elif torch.is_grad_enabled() and (heatmap.requires_grad or (beta is not None and beta.requires_grad)):
        result = _SoftArgmax2d.apply(heatmap, beta, beta_value, coordinates)  # type: ignore[no-untyped-call]
    else:
        result = _FORWARD(heatmap, beta, beta_value, coordinates)[0]
    return result


def _needs_reference(heatmap: Tensor) -> bool:
    """Devices without a kernel, function transforms (vmap, grad, jvp) and forward-mode derivatives."""
    if not _is_on_kernel_device(heatmap):
        _warn_of_slow_path(heatmap.device.type)
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _is_on_kernel_device(heatmap: Tensor) -> bool:
    # Not by its device: to make a device object costs as much as all other checks together.
    return heatmap.is_cpu or (heatmap.is_cuda and _HAS_CUDA) or heatmap.is_meta


def _is_plain(heatmap: Tensor, beta: Tensor | None) -> bool:
    """Whether no tensor subclass has to see the op."""
    return type(heatmap) in _PLAIN and (beta is None or type(beta) in _PLAIN)


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_distributed(heatmap: Tensor, beta: Tensor | None) -> bool:
    """Whether one of the two is a ``DTensor``; none is where its module is not loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in (type(heatmap), type(beta))


@functools.cache
def _warn_of_slow_path(device_type: str) -> None:
    if device_type == "cuda":
        warnings.warn(
            "kpfused was built without CUDA kernels; CUDA tensors take the slower PyTorch composition. "
            "Rebuild it with nvcc on PATH (see `python -m kpfused.info`).",
            stacklevel=4,
        )


class _SoftArgmax2d(torch.autograd.Function):
    """The eager path. An autograd.Function in the classic form costs half of what ``register_autograd`` does."""

    @staticmethod
    def forward(ctx: Any, heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int) -> Tensor:
        result, stats = _FORWARD(heatmap, beta, beta_value, coordinates)
        ctx.save_for_backward(heatmap, beta, stats)
        ctx.beta_value, ctx.coordinates = beta_value, coordinates
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        op = _DIFFERENTIABLE_BACKWARD if torch.is_grad_enabled() else _BACKWARD
        return _input_gradients(op, ctx, grad)


def _input_gradients(op: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    heatmap, beta, stats = ctx.saved_tensors
    needs_heatmap, needs_beta = ctx.needs_input_grad[:2]
    grad_heatmap, grad_beta = op(grad, heatmap, stats, beta, ctx.beta_value, ctx.coordinates, needs_beta)
    return (
        grad_heatmap if needs_heatmap else None,
        _sum_to(grad_beta, beta.shape) if needs_beta else None,
        None,
        None,
    )


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``sum_to_size``; surplus dimensions by a sum, as its view is more than a DTensor with a sharded 1 can do."""
    surplus = tuple(range(tensor.dim() - len(shape)))
    return (tensor.sum(surplus) if surplus else tensor).sum_to_size(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    heatmap, beta, ctx.beta_value, ctx.coordinates = inputs
    ctx.save_for_backward(heatmap, beta, output[1])


def _op_backward(
    ctx: Any, grad: Tensor | None, grad_stats: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    if grad is None:
        return None, None, None, None
    return _input_gradients(_DIFFERENTIABLE_BACKWARD, ctx, grad)


torch.library.register_autograd("kpfused::soft_argmax2d", _op_backward, setup_context=_setup_context)


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, heatmap, _, beta, ctx.beta_value, ctx.coordinates, _ = inputs
    ctx.save_for_backward(grad, heatmap, beta)


def _second_backward(ctx: Any, grad_grad_heatmap: Tensor | None, grad_grad_beta: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives, through the reference composition: rare enough not to need a kernel."""
    grad, heatmap, beta = ctx.saved_tensors
    with torch.enable_grad():
        grad, heatmap = _tracked(grad), _tracked(heatmap)
        leading = heatmap.shape[:-2]
        each = None if beta is None else _tracked(beta).expand(leading)
        result = reference.soft_argmax2d(
            heatmap, ctx.beta_value if each is None else each, coordinates=reference.COORDINATES[ctx.coordinates]
        )
        sources = [heatmap] if each is None else [heatmap, each]
        first = torch.autograd.grad(result, sources, grad, create_graph=True)
        upstream = [grad_grad_heatmap, grad_grad_beta if grad_grad_beta is None or grad_grad_beta.numel() else None]
        pairs = [(f, u) for f, u in zip(first, upstream, strict=False) if u is not None]
        second = torch.autograd.grad(
            [f for f, _ in pairs],
            [grad, *sources],
            [u for _, u in pairs],
            create_graph=True,
            allow_unused=True,
        )
    grad_beta = None if each is None or second[2] is None else second[2].sum_to_size(beta.shape)
    return second[0], second[1], None, grad_beta, None, None, None


def _tracked(tensor: Tensor) -> Tensor:
    """The tensor as a node of its own: its history is the outer graph's to follow, not this formula's."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


torch.library.register_autograd(
    "kpfused::soft_argmax2d_backward", _second_backward, setup_context=_setup_second_context
)


@torch.library.register_fake("kpfused::_soft_argmax2d")  # type: ignore[untyped-decorator]
@torch.library.register_fake("kpfused::soft_argmax2d")  # type: ignore[untyped-decorator]
def _fake_forward(heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int) -> tuple[Tensor, Tensor]:
    leading, dtype = heatmap.shape[:-2], accumulator_dtype(heatmap.dtype)
    return heatmap.new_empty((*leading, 2), dtype=dtype), heatmap.new_empty((*leading, _STATS), dtype=dtype)


@torch.library.register_fake("kpfused::_soft_argmax2d_backward")  # type: ignore[untyped-decorator]
@torch.library.register_fake("kpfused::soft_argmax2d_backward")  # type: ignore[untyped-decorator]
def _fake_backward(
    grad_coordinates: Tensor,
    heatmap: Tensor,
    stats: Tensor,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    needs_grad_beta: bool,
) -> tuple[Tensor, Tensor]:
    leading = heatmap.shape[:-2] if needs_grad_beta else (0,)
    return torch.empty_like(heatmap), heatmap.new_empty(leading, dtype=stats.dtype)


def foldable(beta: Tensor, leading: torch.Size) -> Tensor:
    """``beta``, expanded where its own dimensions are not one run: ``(B, 1, K)`` against ``(B, T, K)``."""
    own = [False, *(size != 1 for size in beta.shape)]
    runs = sum(after and not before for before, after in itertools.pairwise(own))
    return beta if runs <= 1 else beta.expand(leading)
