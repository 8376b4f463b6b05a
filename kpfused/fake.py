# SPDX-License-Identifier: MIT
"""Fake kernels of the ops: the shapes and dtypes of what they return, and what they refuse, without a kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kpfused import checks
from kpfused.kernels import Kernel, accumulator_dtype, depth_dim


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_op(heatmap: Tensor, beta: Tensor | None) -> None:
    """What the kernels refuse, for graphs that call the ops without the checks of ``kpfused.functional``."""
    checks.check_heatmap(heatmap)
    if beta is not None:
        checks.check_broadcast("beta", beta, heatmap)
        fits = beta.dtype == accumulator_dtype(heatmap.dtype) and beta.is_contiguous()
        _require(fits, "beta must be contiguous and of the dtype of the coordinates")


def _check_call(kernel: Kernel, heatmap: Tensor, beta: Tensor | None, setting: int) -> None:
    _require(kernel.accepts(setting), f"setting {setting} means nothing to {kernel.name}")
    check_op(heatmap, beta)
    if kernel.of_slices is not None:
        depth = depth_dim(setting)
        _require(heatmap.dim() - 2 >= -depth, "heatmap must be (..., D, H, W)")
        _require(heatmap.shape[depth - 2] > 0, "heatmap must have at least one slice")


def _fake_forward(
    kernel: Kernel, heatmap: Tensor, beta: Tensor | None, beta_value: float, setting: int, *pixels: Any
) -> tuple[Tensor, ...]:
    _check_call(kernel, heatmap, beta, setting)
    return tuple(
        torch.empty_like(heatmap)
        if size is None
        else heatmap.new_empty(kernel.shape_of(i, heatmap, setting), dtype=kernel.dtype_of(i, heatmap))
        for i, size in enumerate(kernel.sizes)
    )


def _fake_backward(kernel: Kernel, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    grads, (heatmap, *rest) = inputs[: kernel.grads], inputs[kernel.grads :]
    beta, _, setting, needs_grad_beta, *_ = rest[len(kernel.kept) :]
    _check_call(kernel, heatmap, beta, setting)
    of_result = kernel.takes_result and setting != 0
    _require(not (of_result and needs_grad_beta), "the gradient of beta needs the heatmap, not the result")
    leading, dtype = heatmap.shape[:-2], accumulator_dtype(heatmap.dtype)
    for tensor, i in zip(rest, kernel.kept, strict=False):
        fits = tensor.is_contiguous() and tensor.shape == kernel.shape_of(i, heatmap, setting)
        fits = fits and tensor.dtype == kernel.dtype_of(i, heatmap)
        _require(fits, f"{kernel.name}_backward must be given what {kernel.name} returned for this heatmap")
    for grad, i in zip(grads, kernel.differentiable, strict=True):
        like = kernel.dtype_of(i, heatmap), kernel.shape_of(i, heatmap, setting)
        fits = grad is None or (grad.dtype == like[0] and grad.shape == like[1])
        _require(fits, "gradients must have the shapes and dtype of the results")
    return torch.empty_like(heatmap), heatmap.new_empty(leading, dtype=dtype) if needs_grad_beta else None


def register(kernel: Kernel) -> None:
    bind = functools.partial
    for op in (kernel.forward, kernel.eager_forward):
        torch.library.register_fake(op, bind(_fake_forward, kernel))
    for op in (kernel.backward, kernel.eager_backward):
        torch.library.register_fake(op, bind(_fake_backward, kernel))


def _fake_window_mass_at(heatmap: Tensor, stats: Tensor, *_: Any) -> Tensor:
    return stats.new_empty(heatmap.shape[:-2])


# What is left to do of window_mass2d where the stats and the pixel are known: for parts of a map.
torch.library.register_fake("kpfused::_window_mass2d_at", _fake_window_mass_at)
