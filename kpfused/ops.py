# SPDX-License-Identifier: MIT
"""The compiled ops: fake kernels, autograd, vmap, and the way from a checked call to a kernel.

The only module that touches ``torch.ops.kpfused``. Functions here trust their arguments: ``kpfused.functional`` has
checked them.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kpfused import _C, checks, reference

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
    if not _is_on_kernel_device(heatmap):
        if not compiling:
            _warn_of_slow_path(heatmap.device.type)
        return _composition(heatmap, beta, beta_value, coordinates)
    transforming = torch._C._are_functorch_transforms_active()
    if forward_ad._current_level >= 0 or (compiling and (transforming or torch.onnx.is_in_onnx_export())):
        return _composition(heatmap, beta, beta_value, coordinates)
    if transforming:
        result: Tensor = _Transformable.apply(heatmap, beta, beta_value, coordinates)[0]  # type: ignore[no-untyped-call]
    elif compiling or not _is_plain(heatmap, beta):
        result = _DIFFERENTIABLE_FORWARD(heatmap, beta, beta_value, coordinates)[0]
    elif torch.is_grad_enabled() and (heatmap.requires_grad or (beta is not None and beta.requires_grad)):
        result = _SoftArgmax2d.apply(heatmap, beta, beta_value, coordinates)  # type: ignore[no-untyped-call]
    else:
        result = _FORWARD(heatmap, beta, beta_value, coordinates)[0]
    return result


def _composition(heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int) -> Tensor:
    """What the forward op computes, in differentiable PyTorch."""
    return reference.soft_argmax2d(
        heatmap, beta_value if beta is None else beta, coordinates=reference.COORDINATES[coordinates]
    )


def _composed_gradients(
    grad: Tensor, heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int
) -> tuple[Tensor, ...]:
    """What the backward op computes, in differentiable PyTorch; no second gradient where there is no beta tensor."""

    def forward(heatmap: Tensor, beta: Tensor | None = None) -> Tensor:
        return _composition(heatmap, beta, beta_value, coordinates)

    sources = (heatmap,) if beta is None else (heatmap, beta.expand(heatmap.shape[:-2]))
    gradients: tuple[Tensor, ...] = torch.func.vjp(forward, *sources)[1](grad)
    return gradients


def _is_on_kernel_device(heatmap: Tensor) -> bool:
    # Not by its device: to make a device object costs as much as all other checks together.
    return heatmap.is_cpu or (heatmap.is_cuda and _HAS_CUDA) or heatmap.is_meta


def _is_plain(heatmap: Tensor, beta: Tensor | None) -> bool:
    """Whether no tensor subclass has to see the op."""
    return type(heatmap) in _PLAIN and (beta is None or type(beta) in _PLAIN)


_PLAIN = (Tensor, torch.nn.Parameter)


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
    if forward_ad._current_level >= 0:  # forward over reverse: the kernels drop tangents
        gradients = _composed_gradients(grad, heatmap, beta, ctx.beta_value, ctx.coordinates)
    else:
        gradients = op(grad, heatmap, stats, beta, ctx.beta_value, ctx.coordinates, needs_beta)
    return (
        gradients[0] if needs_heatmap else None,
        gradients[1].sum_to_size(beta.shape) if needs_beta else None,
        None,
        None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    heatmap, beta, ctx.beta_value, ctx.coordinates = inputs
    stats = output[1]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(heatmap, beta, stats)


def _op_backward(
    ctx: Any, grad: Tensor | None, _: None, op: Any = _DIFFERENTIABLE_BACKWARD
) -> tuple[Tensor | None, Tensor | None, None, None]:
    return (None, None, None, None) if grad is None else _input_gradients(op, ctx, grad)


torch.library.register_autograd("kpfused::soft_argmax2d", _op_backward, setup_context=_setup_context)


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, heatmap, _, beta, ctx.beta_value, ctx.coordinates, needs_grad_beta = inputs
    if not needs_grad_beta:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, heatmap, beta)


def _second_backward(ctx: Any, upstream_heatmap: Tensor | None, upstream_beta: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives, through the composition: rare enough not to need a kernel."""
    grad, heatmap, beta = ctx.saved_tensors
    inputs = (grad, heatmap) if beta is None else (grad, heatmap, beta)

    def first(grad: Tensor, heatmap: Tensor, beta: Tensor | None = None) -> tuple[Tensor, ...]:
        return _composed_gradients(grad, heatmap, beta, ctx.beta_value, ctx.coordinates)

    gradients, pull = torch.func.vjp(first, *inputs)  # type: ignore[misc]
    upstream = (upstream_heatmap, upstream_beta)[: len(gradients)]
    second = pull(tuple(torch.zeros_like(g) if u is None else u for g, u in zip(gradients, upstream, strict=True)))
    return second[0], second[1], None, second[2] if len(second) > 2 else None, None, None, None


torch.library.register_autograd(
    "kpfused::soft_argmax2d_backward", _second_backward, setup_context=_setup_second_context
)


class _Transformable(torch.autograd.Function):
    """The path of function transforms, in the form that they ask for. vmap runs each method once, on batched tensors:
    the rules of the ops below then fold the batch."""

    generate_vmap_rule = True
    forward = staticmethod(_FORWARD)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        return _op_backward(ctx, grad, None, _TransformableBackward.apply)


class _TransformableBackward(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_BACKWARD)
    setup_context = staticmethod(_setup_second_context)
    backward = staticmethod(_second_backward)


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _fold_batch(
    heatmap: Tensor, beta: Tensor | None, heatmap_dim: int | None, beta_dim: int | None, size: int
) -> tuple[Tensor, Tensor | None]:
    """heatmap and beta as the ops take them, with the dimension of vmap as the first leading one."""
    heatmap = _batch_first(heatmap, heatmap_dim, size)
    if beta is not None and beta_dim is not None:
        leading = heatmap.shape[:-2]
        beta = beta.movedim(beta_dim, 0)
        beta = beta.reshape(size, *(1,) * (len(leading) - beta.dim()), *beta.shape[1:])
        beta = foldable(beta, leading).contiguous()
    return heatmap, beta


def _vmap_forward(
    op: Any, info: Any, in_dims: tuple[Any, ...], heatmap: Tensor, beta: Tensor | None, *settings: Any
) -> tuple[Any, tuple[int, int]]:
    heatmap, beta = _fold_batch(heatmap, beta, in_dims[0], in_dims[1], info.batch_size)
    return op(heatmap, beta, *settings), (0, 0)


def _vmap_backward(
    op: Any,
    info: Any,
    in_dims: tuple[Any, ...],
    grad: Tensor,
    heatmap: Tensor,
    stats: Tensor,
    beta: Tensor | None,
    *settings: Any,
) -> tuple[Any, tuple[int, int | None]]:
    size = info.batch_size
    heatmap, beta = _fold_batch(heatmap, beta, in_dims[1], in_dims[3], size)
    grad, stats = _batch_first(grad, in_dims[0], size), _batch_first(stats, in_dims[2], size).contiguous()
    needs_grad_beta = settings[-1]
    return op(grad, heatmap, stats, beta, *settings), (0, 0 if needs_grad_beta else None)


for _op in (_FORWARD, _DIFFERENTIABLE_FORWARD):
    torch.library.register_vmap(_op, functools.partial(_vmap_forward, _op))
for _op in (_BACKWARD, _DIFFERENTIABLE_BACKWARD):
    torch.library.register_vmap(_op, functools.partial(_vmap_backward, _op))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_op(heatmap: Tensor, beta: Tensor | None, coordinates: int) -> None:
    """What the kernels refuse, for graphs that call the ops without the checks of ``kpfused.functional``."""
    checks.check_heatmap(heatmap)
    _require(0 <= coordinates < len(reference.COORDINATES), "unknown coordinates")
    if beta is not None:
        checks.check_broadcast("beta", beta, heatmap)
        fits = beta.dtype == accumulator_dtype(heatmap.dtype) and beta.is_contiguous()
        _require(fits, "beta must be contiguous and of the dtype of the coordinates")


@torch.library.register_fake("kpfused::_soft_argmax2d")  # type: ignore[untyped-decorator]
@torch.library.register_fake("kpfused::soft_argmax2d")  # type: ignore[untyped-decorator]
def _fake_forward(heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int) -> tuple[Tensor, Tensor]:
    _check_op(heatmap, beta, coordinates)
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
    _check_op(heatmap, beta, coordinates)
    leading, dtype = heatmap.shape[:-2], accumulator_dtype(heatmap.dtype)
    fits = stats.dtype == dtype and stats.is_contiguous() and stats.shape == (*leading, _STATS)
    _require(fits, "stats must be what soft_argmax2d returned for this heatmap")
    fits = grad_coordinates.dtype == dtype and grad_coordinates.shape == (*leading, 2)
    _require(fits, "grad_coordinates must have the shape and dtype of the coordinates")
    return torch.empty_like(heatmap), heatmap.new_empty(leading if needs_grad_beta else (0,), dtype=dtype)


def foldable(beta: Tensor, leading: torch.Size) -> Tensor:
    """``beta``, expanded where its own dimensions are not one run: ``(B, 1, K)`` against ``(B, T, K)``."""
    own = [False, *(size != 1 for size in beta.shape)]
    runs = sum(after and not before for before, after in itertools.pairwise(own))
    return beta if runs <= 1 else beta.expand(leading)
