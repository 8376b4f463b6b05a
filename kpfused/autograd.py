# SPDX-License-Identifier: MIT
"""Derivatives of the ops: for the eager path, for compilers, and for function transforms."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kpfused.dtensor import is_distributed, refuse_distributed
from kpfused.kernels import OF_RESULT, Kernel, Settings, accumulator_dtype


def _eager(kernel: Kernel) -> Any:
    """The eager path. An autograd.Function in the classic form costs half of what ``register_autograd`` does.

    One for each kernel, and with all that is no tensor in one argument: every argument costs, and every attribute.
    """
    launch, keep = kernel.launch_forward, kernel.keep
    has_one_result, takes_result = kernel.has_one_result, kernel.takes_result

    def forward(ctx: Any, heatmap: Tensor, beta: Tensor | None, settings: Settings) -> Tensor | tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = launch(heatmap, beta, *settings)
        if takes_result:
            heatmap, settings = _source(ctx, heatmap, output[0], settings)
        ctx.settings = settings if len(settings) == 2 else _without_tensors(settings)
        ctx.save_for_backward(heatmap, *keep(output), beta, *settings[2:4])
        if has_one_result:  # more of them cost twice: here, and where each is told of its gradient
            return output[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[output[i] for i in kernel.constant])
        return output

    backward = _backward_of(kernel, kernel.backward, kernel.launch_backward)
    if has_one_result and kernel.kept == (1,):
        forward, backward = _plain(kernel, forward, backward)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(_backward_of(kernel, kernel.backward))}
    # What users read of a tensor's grad_fn, followed by Backward.
    name = "".join(map(str.capitalize, kernel.name.split("_")))
    function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda own: own.update(methods))
    # What the engine calls: it is torch's to look for backward, which compilers trace, and takes as long as a kernel.
    if hasattr(function, "_backward_cls"):
        function._backward_cls.apply = backward
    # Without what Function.apply does first, which is to look for setup_context, and whether any argument at all
    # outlived a transform.
    return super(torch.autograd.Function, function).apply


def _plain(kernel: Kernel, forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[Any, Any]:
    """Both directions of one result and its stats, spelt out for what most calls are, in which all pixels count: to
    go through tuples of any length takes time that ``benchmarks.host_time`` shows."""
    launch, launch_backward, is_grad_enabled = kernel.launch_forward, kernel.launch_backward, torch.is_grad_enabled
    takes_result = kernel.takes_result

    def plain_forward(ctx: Any, heatmap: Tensor, beta: Tensor | None, settings: Settings) -> Any:
        if len(settings) > 2:
            return forward(ctx, heatmap, beta, settings)
        number, setting = ctx.settings = settings
        result, stats = launch(heatmap, beta, number, setting)
        if takes_result:
            heatmap, ctx.settings = _source(ctx, heatmap, result, settings)
        ctx.save_for_backward(heatmap, stats, beta)
        return result

    def plain_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.settings) > 2 or is_grad_enabled() or forward_ad._current_level >= 0:
            result: tuple[Tensor | None, ...] = backward(ctx, grad)
            return result
        (heatmap, stats, beta), (number, setting) = ctx.saved_tensors, ctx.settings
        of_heatmap, of_beta = launch_backward(grad, heatmap, stats, beta, number, setting, ctx.needs_input_grad[1])
        return of_heatmap, None if of_beta is None else sum_to(of_beta, beta.shape), None

    return plain_forward, plain_backward


def _keep(kernel: Kernel, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    heatmap, beta, *rest = inputs
    settings: Settings = tuple(rest)
    if kernel.takes_result:
        heatmap, settings = _source(ctx, heatmap, output[0], settings)
    ctx.settings = _without_tensors(settings)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[output[i] for i in kernel.constant])
    ctx.save_for_backward(heatmap, *kernel.keep(output), beta, *settings[2:4])


def _source(ctx: Any, heatmap: Tensor, result: Tensor, settings: Settings) -> tuple[Tensor, Settings]:
    """What a backward that takes the result reads: the result where it will do, as those who go on with it keep it
    anyway; else the heatmap. Half precision has lost digits, and beta's gradient is not to be had from the result."""
    is_exact = heatmap.dtype == accumulator_dtype(heatmap.dtype)
    if not is_exact or ctx.needs_input_grad[1] or is_distributed(heatmap):
        # Of forward the setting means nothing, whatever a caller of the op gave.
        return heatmap, (settings[0], 0, *settings[2:])
    return result, (settings[0], OF_RESULT, *settings[2:])


def _without_tensors(settings: Sequence[Any]) -> Settings:
    """Mask and valid size are saved: what is kept beside them would be kept from hooks that send them elsewhere."""
    return *settings[:2], *[None] * len(settings[2:4]), *settings[4:]


def _backward_of(kernel: Kernel, op: Any, launch: Any = None) -> Callable[..., tuple[Tensor | None, ...]]:
    """From gradients of the outputs to those of heatmap and beta, through a backward op.

    ``launch`` is the op where nothing is to be differentiated once more, and no compiler looks on.
    """
    differentiable, own = kernel.differentiable, 2 + len(kernel.kept)  # heatmap, what is kept, beta; then the pixels
    is_grad_enabled = torch.is_grad_enabled

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if len(grads) > 1:
            grads = tuple([grads[i] for i in differentiable])
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        settings, saved, of_beta = ctx.settings, ctx.saved_tensors, ctx.needs_input_grad[1]
        if forward_ad._current_level >= 0:  # forward over reverse: the kernels drop tangents
            rest = (*saved[own - 1 : own], *settings[:2], *saved[own:], *settings[4:])
            gradients = _composed_gradients(kernel, grads, saved[0], saved[1 : own - 1], *rest)
        else:
            use = op if launch is None or is_grad_enabled() else launch
            if len(saved) == own:  # all pixels count; slices that leave nothing out cost as much as those that do
                gradients = use(*grads, *saved, *settings, of_beta)
            else:
                gradients = use(*grads, *saved[:own], *settings[:2], of_beta, *saved[own:], *settings[4:])
        of_settings = (None,) * (len(ctx.needs_input_grad) - 2)
        return gradients[0], sum_to(gradients[1], saved[own - 1].shape) if of_beta else None, *of_settings

    return backward


def sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``sum_to_size``; surplus dimensions by a sum, as its view is more than a DTensor with a sharded 1 can do."""
    surplus = tuple(range(tensor.dim() - len(shape)))
    return (tensor.sum(surplus) if surplus else tensor).sum_to_size(shape)


def _composed_gradients(
    kernel: Kernel,
    grads: tuple[Tensor | None, ...],
    heatmap: Tensor,
    kept: Sequence[Tensor],
    beta: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """What the backward op computes, in differentiable PyTorch; no second gradient where there is no beta tensor."""
    if kernel.composition_of_result is not None and settings[1] != 0:
        return kernel.composition_of_result(*grads, heatmap, *kept, beta, *settings)
    used = [i for i, grad in zip(kernel.differentiable, grads, strict=True) if grad is not None]

    def forward(heatmap: Tensor, beta: Tensor | None = None) -> tuple[Tensor, ...]:
        results = kernel.composition(heatmap, beta, *settings)
        return tuple(results[i] for i in used)

    sources = (heatmap,) if beta is None else (heatmap, beta.expand(heatmap.shape[:-2]))
    gradients: tuple[Tensor, ...] = torch.func.vjp(forward, *sources)[1](tuple(g for g in grads if g is not None))
    return gradients


def _keep_second(kernel: Kernel, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grads, (heatmap, *rest) = inputs[: kernel.grads], inputs[kernel.grads :]
    kept = rest[: len(kernel.kept)]
    beta, ctx.beta_value, ctx.setting, _, *pixels = rest[len(kernel.kept) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(heatmap, *kept, beta, *grads, *pixels[:2])
    ctx.empty_value = pixels[2:]
    ctx.rest = (None,) * (3 + len(pixels))


def _second_gradients(
    kernel: Kernel, ctx: Any, upstream_heatmap: Tensor | None, upstream_beta: Tensor | None
) -> tuple[Any, ...]:
    """Second derivatives, through the composition: rare enough not to need a kernel."""
    heatmap, *saved = ctx.saved_tensors
    kept, (beta, *saved) = saved[: len(kernel.kept)], saved[len(kernel.kept) :]
    refuse_distributed(heatmap)
    grads, pixels = saved[: kernel.grads], (*saved[kernel.grads :], *ctx.empty_value)
    given = [i for i, grad in enumerate(grads) if grad is not None]
    inputs = (*(grads[i] for i in given), heatmap, *(() if beta is None else (beta,)))

    def first(*inputs: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(given, inputs, strict=False):
            filled[i] = grad
        heatmap, *some_beta = inputs[len(given) :]
        settings = (ctx.beta_value, ctx.setting, *pixels)
        return _composed_gradients(kernel, tuple(filled), heatmap, kept, some_beta[0] if some_beta else None, *settings)

    gradients, pull = torch.func.vjp(first, *inputs)  # type: ignore[misc]
    upstream = (upstream_heatmap, upstream_beta)[: len(gradients)]
    second = pull(tuple(torch.zeros_like(g) if u is None else u for g, u in zip(gradients, upstream, strict=True)))
    of_grads: list[Tensor | None] = [None] * len(grads)
    for i, grad in zip(given, second, strict=False):
        of_grads[i] = grad
    of_heatmap, *of_beta = second[len(given) :]
    return (*of_grads, of_heatmap, *(None,) * len(kernel.kept), of_beta[0] if of_beta else None, *ctx.rest)


def _transformable(kernel: Kernel) -> Any:
    """The path of function transforms, in the form that they ask for. vmap runs each method once, on batched tensors:
    the rules of the ops below then fold the batch."""

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(kernel.eager_backward)
        setup_context = staticmethod(functools.partial(_keep_second, kernel))
        backward = staticmethod(functools.partial(_second_gradients, kernel))

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(kernel.eager_forward)
        setup_context = staticmethod(functools.partial(_keep, kernel))

        backward = staticmethod(_backward_of(kernel, Backward.apply))

    return Forward.apply


def register(kernel: Kernel) -> None:
    kernel.eager, kernel.transformable = _eager(kernel), _transformable(kernel)

    bind = functools.partial
    library = torch.library
    setup = bind(_keep, kernel)
    library.register_autograd(kernel.forward, _backward_of(kernel, kernel.backward), setup_context=setup)
    library.register_autograd(
        kernel.backward, bind(_second_gradients, kernel), setup_context=bind(_keep_second, kernel)
    )
