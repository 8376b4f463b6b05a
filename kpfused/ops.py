# SPDX-License-Identifier: MIT
"""The compiled ops: fake kernels, autograd, and the way from a checked call to a kernel.

The only module that touches ``torch.ops.kpfused``. Functions here trust their arguments: ``kpfused.functional`` has
checked them.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kpfused import _C, reference
from kpfused.results import SpatialMoments

_OPS = torch.ops.kpfused
# Resolved once: looking an overload up costs as much as a small kernel.
_FORWARD = _OPS._soft_argmax2d.default
_BACKWARD = _OPS._soft_argmax2d_backward.default
_DIFFERENTIABLE_FORWARD = _OPS.soft_argmax2d.default
_DIFFERENTIABLE_BACKWARD = _OPS.soft_argmax2d_backward.default
_MOMENTS = _OPS.spatial_moments2d.default
_MOMENTS_BACKWARD = _OPS.spatial_moments2d_backward.default

_HAS_CUDA = bool(_C.build_info()["cuda"])
_STATS, _MOMENT_STATS = 4, 8  # kStats and kMomentStats of csrc/params.h


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates, stats and beta for maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_kernel(device_type: str) -> bool:
    """Whether this build has kernels for a device type such as ``"cuda"``."""
    return device_type == "cpu" or (device_type == "cuda" and _HAS_CUDA)


def soft_argmax2d(heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any) -> Tensor:
    """Soft-argmax of checked arguments.

    Args:
        heatmap: ``(..., H, W)``, floating point.
        beta: None, or a contiguous tensor in the accumulator dtype that broadcasts against the leading dimensions.
        beta_value: beta where ``beta`` is None.
        coordinates: index into ``reference.COORDINATES``.
        pixels: nothing where all pixels count; otherwise mask or None (bool, of the heatmap's shape), valid size or
            None (contiguous int64 ``(..., 2)``, height and width, leading dimensions as those of beta) and empty value.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _needs_reference(heatmap):
        return _reference_soft_argmax2d(heatmap, beta, beta_value, coordinates, *pixels)
    if compiling or not _is_plain(heatmap, beta):
        result: Tensor = _DIFFERENTIABLE_FORWARD(heatmap, beta, beta_value, coordinates, *pixels)[0]
    elif torch.is_grad_enabled() and (heatmap.requires_grad or (beta is not None and beta.requires_grad)):
        result = _SoftArgmax2d.apply(heatmap, beta, beta_value, coordinates, *pixels)  # type: ignore[no-untyped-call]
    else:
        result = _FORWARD(heatmap, beta, beta_value, coordinates, *pixels)[0]
    return result


def _reference_soft_argmax2d(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
) -> Tensor:
    return reference.soft_argmax2d(
        heatmap,
        beta_value if beta is None else beta,
        coordinates=reference.COORDINATES[coordinates],
        **_pixels_of_reference(*pixels),
    )


def _pixels_of_reference(
    mask: Tensor | None = None, valid_size: Tensor | None = None, empty_value: float | None = None
) -> dict[str, Any]:
    size = None if valid_size is None else (valid_size[..., 0], valid_size[..., 1])
    return {"mask": mask, "valid_size": size, "empty_value": math.nan if empty_value is None else empty_value}


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
    def forward(
        ctx: Any, heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
    ) -> Tensor:
        result, stats = _FORWARD(heatmap, beta, beta_value, coordinates, *pixels)
        ctx.save_for_backward(heatmap, beta, stats, *pixels[:2])
        ctx.beta_value, ctx.coordinates, ctx.rest = beta_value, coordinates, (None,) * (2 + len(pixels))
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op = _DIFFERENTIABLE_BACKWARD if torch.is_grad_enabled() else _BACKWARD
        return _input_gradients(op, ctx, grad)


def _input_gradients(op: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    heatmap, beta, stats, *pixels = ctx.saved_tensors
    needs_heatmap, needs_beta = ctx.needs_input_grad[:2]
    grad_heatmap, grad_beta = op(grad, heatmap, stats, beta, ctx.beta_value, ctx.coordinates, needs_beta, *pixels)
    return (
        grad_heatmap if needs_heatmap else None,
        grad_beta.sum_to_size(beta.shape) if needs_beta else None,
        *ctx.rest,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    heatmap, beta, ctx.beta_value, ctx.coordinates, mask, valid_size, _ = inputs
    ctx.save_for_backward(heatmap, beta, output[1], mask, valid_size)
    ctx.rest = (None,) * 5


def _op_backward(ctx: Any, grad: Tensor | None, grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    return _input_gradients(_DIFFERENTIABLE_BACKWARD, ctx, grad)


torch.library.register_autograd("kpfused::soft_argmax2d", _op_backward, setup_context=_setup_context)


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, heatmap, _, beta, ctx.beta_value, ctx.coordinates, _, mask, valid_size = inputs
    ctx.save_for_backward(grad, heatmap, beta, mask, valid_size)


def _second_backward(ctx: Any, grad_grad_heatmap: Tensor | None, grad_grad_beta: Tensor | None) -> tuple[Any, ...]:
    grad, heatmap, beta, mask, valid_size = ctx.saved_tensors

    def forward(heatmap: Tensor, beta: Tensor | None) -> tuple[Tensor]:
        return (_reference_soft_argmax2d(heatmap, beta, ctx.beta_value, ctx.coordinates, mask, valid_size, 0.0),)

    upstream = (grad_grad_heatmap, grad_grad_beta)
    (of_grad,), of_heatmap, of_beta = _second_derivatives(forward, (grad,), heatmap, beta, upstream)
    return of_grad, of_heatmap, None, of_beta, None, None, None, None, None


def _second_derivatives(
    forward: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
    grads: tuple[Tensor | None, ...],
    heatmap: Tensor,
    beta: Tensor | None,
    upstream: tuple[Tensor | None, Tensor | None],
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """Of a backward op, with respect to its incoming gradients, heatmap and beta.

    Through the reference composition ``forward``: rare enough not to need a kernel.
    """
    with torch.enable_grad():
        tracked = [None if g is None else _tracked(g) for g in grads]
        heatmap = _tracked(heatmap)
        each = None if beta is None else _tracked(beta).expand(heatmap.shape[:-2])
        results = forward(heatmap, each)
        used = [(r, g) for r, g in zip(results, tracked, strict=True) if g is not None]
        sources = [heatmap] if each is None else [heatmap, each]
        first = torch.autograd.grad([r for r, _ in used], sources, [g for _, g in used], create_graph=True)
        of_beta = upstream[1] if upstream[1] is not None and upstream[1].numel() else None
        pairs = [(f, u) for f, u in zip(first, (upstream[0], of_beta), strict=False) if u is not None]
        wanted = [g for _, g in used] + sources
        second = torch.autograd.grad(
            [f for f, _ in pairs], wanted, [u for _, u in pairs], create_graph=True, allow_unused=True
        )
    given = iter(second)
    of_grads = [None if g is None else next(given) for g in grads]
    of_heatmap = next(given)
    of_each = next(given, None)
    return of_grads, of_heatmap, None if beta is None or of_each is None else of_each.sum_to_size(beta.shape)


def _tracked(tensor: Tensor) -> Tensor:
    """The tensor as a node of its own: its history is the outer graph's to follow, not this formula's."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


torch.library.register_autograd(
    "kpfused::soft_argmax2d_backward", _second_backward, setup_context=_setup_second_context
)


@torch.library.register_fake("kpfused::_soft_argmax2d")  # type: ignore[untyped-decorator]
@torch.library.register_fake("kpfused::soft_argmax2d")  # type: ignore[untyped-decorator]
def _fake_forward(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
) -> tuple[Tensor, Tensor]:
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
    *pixels: Any,
) -> tuple[Tensor, Tensor]:
    leading = heatmap.shape[:-2] if needs_grad_beta else (0,)
    return torch.empty_like(heatmap), heatmap.new_empty(leading, dtype=stats.dtype)


def spatial_moments2d(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
) -> SpatialMoments:
    """Moments of checked arguments, which are those of :func:`soft_argmax2d`."""
    arguments = (heatmap, beta, beta_value, coordinates, *pixels)
    compiling = torch.compiler.is_compiling()
    if not compiling and _needs_reference(heatmap):
        return _reference_moments(*arguments)
    if compiling or not _is_plain(heatmap, beta) or not torch.is_grad_enabled():
        return SpatialMoments(*_MOMENTS(*arguments)[:-1])
    return SpatialMoments(*_SpatialMoments.apply(*arguments))  # type: ignore[no-untyped-call]


def _reference_moments(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
) -> SpatialMoments:
    return reference.spatial_moments2d(
        heatmap,
        beta_value if beta is None else beta,
        coordinates=reference.COORDINATES[coordinates],
        **_pixels_of_reference(*pixels),
    )


class _SpatialMoments(torch.autograd.Function):
    """As _SoftArgmax2d."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _MOMENTS(*inputs)
        _setup_moments(ctx, inputs, output)
        return tuple(output[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _moment_gradients(ctx, *grads)


_PEAK = SpatialMoments._fields.index("peak")


def _setup_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    heatmap, beta, ctx.beta_value, ctx.coordinates, *pixels = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[_PEAK])
    ctx.save_for_backward(heatmap, beta, output[_PEAK], output[-1], *pixels[:2])
    ctx.rest = (None,) * (2 + len(pixels))


def _moment_gradients(
    ctx: Any,
    grad_mean: Tensor | None,
    grad_covariance: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    _: Tensor | None,
    grad_peak_probability: Tensor | None,
    __: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    grads = (grad_mean, grad_covariance, grad_entropy, grad_logsumexp, grad_peak_probability)
    if all(grad is None for grad in grads):
        return None, None, *ctx.rest
    heatmap, beta, peak, stats, *pixels = ctx.saved_tensors
    needs_heatmap, needs_beta = ctx.needs_input_grad[:2]
    grad_heatmap, grad_beta = _MOMENTS_BACKWARD(
        *grads, heatmap, stats, peak, beta, ctx.beta_value, ctx.coordinates, needs_beta, *pixels
    )
    return (
        grad_heatmap if needs_heatmap else None,
        grad_beta.sum_to_size(beta.shape) if needs_beta else None,
        *ctx.rest,
    )


torch.library.register_autograd("kpfused::spatial_moments2d", _moment_gradients, setup_context=_setup_moments)


def _setup_second_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *grads, heatmap, _, _, beta, ctx.beta_value, ctx.coordinates, _, mask, valid_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(heatmap, beta, mask, valid_size, *grads)


def _second_moment_gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    heatmap, beta, mask, valid_size, *grads = ctx.saved_tensors

    def forward(heatmap: Tensor, beta: Tensor | None) -> tuple[Tensor, ...]:
        fields = _reference_moments(heatmap, beta, ctx.beta_value, ctx.coordinates, mask, valid_size, 0.0)
        return tuple(field for i, field in enumerate(fields) if i != _PEAK)

    of_grads, of_heatmap, of_beta = _second_derivatives(
        forward, tuple(grads), heatmap, beta, (upstream[0], upstream[1])
    )
    return (*of_grads, of_heatmap, None, None, of_beta, None, None, None, None, None)


torch.library.register_autograd(
    "kpfused::spatial_moments2d_backward", _second_moment_gradients, setup_context=_setup_second_moments
)


@torch.library.register_fake("kpfused::spatial_moments2d")  # type: ignore[untyped-decorator]
def _fake_moments(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
) -> tuple[Tensor, ...]:
    leading, dtype = heatmap.shape[:-2], accumulator_dtype(heatmap.dtype)
    sizes = {"mean": (2,), "covariance": (2, 2), "peak": (2,)}
    fields = [
        heatmap.new_empty((*leading, *sizes.get(name, ())), dtype=torch.int64 if name == "peak" else dtype)
        for name in SpatialMoments._fields
    ]
    return *fields, heatmap.new_empty((*leading, _MOMENT_STATS), dtype=dtype)


@torch.library.register_fake("kpfused::spatial_moments2d_backward")  # type: ignore[untyped-decorator]
def _fake_moments_backward(
    grad_mean: Tensor | None,
    grad_covariance: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_peak_probability: Tensor | None,
    heatmap: Tensor,
    stats: Tensor,
    peak: Tensor,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor, Tensor]:
    leading = heatmap.shape[:-2] if needs_grad_beta else (0,)
    return torch.empty_like(heatmap), heatmap.new_empty(leading, dtype=stats.dtype)


def foldable(tensor: Tensor, leading: torch.Size, trailing: int = 0) -> Tensor:
    """``tensor``, expanded where its own dimensions are not one run: ``(B, 1, K)`` against ``(B, T, K)``.

    ``trailing``: how many dimensions it has behind those that broadcast.
    """
    sizes = tensor.shape[: tensor.dim() - trailing]
    own = [False, *(size != 1 for size in sizes)]
    runs = sum(after and not before for before, after in itertools.pairwise(own))
    return tensor if runs <= 1 else tensor.expand(leading + tensor.shape[len(sizes) :])
