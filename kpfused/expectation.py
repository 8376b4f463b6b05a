# SPDX-License-Identifier: MIT
"""The op of expectations of values: fake kernels, autograd, and the way from checked arguments to a kernel.

Beside ``kpfused.kernels``, whose ops take one map and return results of it: this one takes values too, with a gradient
of their own. Function transforms take the composition, which they fold as any other operations of PyTorch.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kpfused import dtensor, fake, kernels, ops, reference
from kpfused.autograd import sum_to

_FORWARD = torch.ops.kpfused.spatial_expectation2d.default
_BACKWARD = torch.ops.kpfused.spatial_expectation2d_backward.default
# Without an autograd formula, for the eager path, which brings its own.
_EAGER_FORWARD = torch.ops.kpfused._spatial_expectation2d.default
_EAGER_BACKWARD = torch.ops.kpfused._spatial_expectation2d_backward.default
_STATS = 4  # kStats of csrc/params.h


def spatial_expectation2d(heatmap: Tensor, values: Tensor, beta: Tensor | None, settings: kernels.Settings) -> Tensor:
    """Expectation of ``values``, of checked arguments: as ``kpfused.arguments.checked`` has them."""
    beta_value, _, *pixels = settings  # with values, there are no units to choose
    compiling = ops.is_compiling()
    if ops.takes_composition(heatmap, compiling) or ops.transforms_active():
        return _compose(heatmap, values, beta, beta_value, *pixels)
    values = _foldable(values, heatmap.shape[:-2])
    inputs = (heatmap, values, beta, beta_value, *pixels)
    is_traced = compiling or ops.is_tracing()
    if is_traced or type(values) not in ops.PLAIN or not ops.is_plain(heatmap, beta, settings):
        heatmap, beta, *pixels = dtensor.prepare_distributed(heatmap, beta, *pixels)
        values = dtensor.prepare_distributed_values(heatmap, values)
        result: Tensor = _FORWARD(heatmap, values, beta, beta_value, *pixels)[0]
    elif ops.is_grad_enabled() and any(t is not None and t.requires_grad for t in (heatmap, values, beta)):
        result = SpatialExpectation2d.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        result = _EAGER_FORWARD(*inputs)[0]
    return result


def _compose(heatmap: Tensor, values: Tensor, beta: Tensor | None, beta_value: float, *pixels: Any) -> Tensor:
    number, keywords = kernels.settings_of_reference(beta, beta_value, 0, *pixels)
    del keywords["coordinates"]
    return reference.spatial_expectation2d(heatmap, values, number, **keywords)


def _foldable(values: Tensor, leading: torch.Size) -> Tensor:
    """Values as kernels read them: what they share and what is their own are at most one run of dimensions each."""
    missing = len(leading) - (values.dim() - 3)
    own = [True if size != 1 else False for size in ((1,) * missing + tuple(values.shape[:-3]))]  # noqa: SIM210
    kinds = [is_own for is_own, size in zip(own, leading, strict=True) if size != 1]
    borders = sum((a and not b) or (b and not a) for a, b in itertools.pairwise(kinds))
    return values if borders <= 1 else values.expand(*leading, *values.shape[-3:]).contiguous()


# ---- Autograd -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], *output: Tensor) -> None:
    heatmap, values, beta, ctx.beta_value, *pixels = inputs
    mask, valid_size, ctx.empty_value = (*pixels, None, None, None)[:3]
    ctx.rest = (None,) * (1 + len(pixels))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(heatmap, values, *output, beta, mask, valid_size)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _input_gradients(op: Any, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of heatmap, values and beta."""
    if grad is None:
        return (None, None, None, *ctx.rest)
    heatmap, values, expectation, stats, beta, *pixels = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    settings = (ctx.beta_value, *pixels, ctx.empty_value)
    gradients: tuple[Any, ...]
    if forward_ad._current_level >= 0:  # forward over reverse: the kernels drop tangents
        gradients = _composed_gradients(grad, heatmap, values, beta, *settings)
    else:
        gradients = op(grad, heatmap, values, expectation, stats, beta, ctx.beta_value, *needs, *settings[1:])
    of_beta = sum_to(gradients[2], beta.shape) if needs[2] else None
    return (gradients[0] if needs[0] else None, gradients[1] if needs[1] else None, of_beta, *ctx.rest)


def _composed_gradients(
    grad: Tensor, heatmap: Tensor, values: Tensor, beta: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    """What the backward op computes, in differentiable PyTorch; no third gradient where there is no beta tensor."""

    def forward(heatmap: Tensor, values: Tensor, beta: Tensor | None = None) -> Tensor:
        return _compose(heatmap, values, beta, *settings)

    sources = (heatmap, values, *(() if beta is None else (beta.expand(heatmap.shape[:-2]),)))
    gradients: tuple[Tensor, ...] = torch.func.vjp(forward, *sources)[1](grad)
    return gradients


class SpatialExpectation2d(torch.autograd.Function):
    """As in ``kpfused.autograd``: one result costs half of what two do."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        expectation, stats = _EAGER_FORWARD(*inputs)
        _save(ctx, inputs, expectation, stats)
        result: Tensor = expectation
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _input_gradients(_BACKWARD if torch.is_grad_enabled() else _EAGER_BACKWARD, ctx, grad)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return _input_gradients(_BACKWARD, ctx, grad)


def _keep_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, heatmap, values, _, _, beta, ctx.beta_value, _, _, _, *pixels = inputs
    mask, valid_size, ctx.empty_value = (*pixels, None, None, None)[:3]
    ctx.rest = (None,) * (4 + len(pixels))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, heatmap, values, beta, mask, valid_size)


def _second_gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second derivatives, through the composition: rare enough not to need a kernel."""
    grad, heatmap, values, beta, *pixels = ctx.saved_tensors
    dtensor.refuse_distributed(heatmap)
    sources = (heatmap, values, *(() if beta is None else (beta,)))

    def first(grad: Tensor, heatmap: Tensor, values: Tensor, beta: Tensor | None = None) -> tuple[Tensor, ...]:
        return _composed_gradients(grad, heatmap, values, beta, ctx.beta_value, *pixels, ctx.empty_value)

    gradients, pull = torch.func.vjp(first, grad, *sources)  # type: ignore[misc]
    used = upstream[: len(gradients)]
    second = pull(tuple(torch.zeros_like(g) if u is None else u for g, u in zip(gradients, used, strict=True)))
    return (*second[:3], None, None, None if beta is None else second[3], *ctx.rest)


# ---- Fake kernels ---------------------------------------------------------------------------------------------------


def _fake_forward(
    heatmap: Tensor, values: Tensor, beta: Tensor | None, beta_value: float, *pixels: Any
) -> tuple[Tensor, Tensor]:
    fake.check_op(heatmap, beta)
    dtype = kernels.accumulator_dtype(heatmap.dtype)
    leading = heatmap.shape[:-2]
    result = heatmap.new_empty((*leading, values.shape[-3]), dtype=dtype)
    return result, heatmap.new_empty((*leading, _STATS), dtype=dtype)


def _fake_backward(
    grad: Tensor,
    heatmap: Tensor,
    values: Tensor,
    expectation: Tensor,
    stats: Tensor,
    beta: Tensor | None,
    beta_value: float,
    needs_grad_heatmap: bool,
    needs_grad_values: bool,
    needs_grad_beta: bool,
    *pixels: Any,
) -> tuple[Tensor | None, ...]:
    fake.check_op(heatmap, beta)
    return (
        torch.empty_like(heatmap) if needs_grad_heatmap or needs_grad_beta else None,
        torch.empty_like(values) if needs_grad_values else None,
        stats.new_empty(heatmap.shape[:-2]) if needs_grad_beta else None,
    )


torch.library.register_autograd(_FORWARD, _backward, setup_context=_keep)
torch.library.register_autograd(_BACKWARD, _second_gradients, setup_context=_keep_second)
for _op in (_FORWARD, _EAGER_FORWARD):
    torch.library.register_fake(_op, _fake_forward)
for _op in (_BACKWARD, _EAGER_BACKWARD):
    torch.library.register_fake(_op, _fake_backward)
