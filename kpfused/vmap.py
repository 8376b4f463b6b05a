# SPDX-License-Identifier: MIT
"""Batching rules of the ops: the dimension of ``vmap`` becomes the first of the leading ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kpfused.kernels import Kernel, foldable


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _align(tensor: Tensor, dim: int, leading: torch.Size, trailing: int) -> Tensor:
    """A batched tensor that broadcasts against the leading dimensions, its batch the first of them."""
    tensor = tensor.movedim(dim, 0)
    missing = len(leading) + trailing - tensor.dim()
    tensor = tensor.reshape(tensor.shape[0], *(1,) * missing, *tensor.shape[1:])
    return foldable(tensor, leading, trailing).contiguous()


def _fold_batch(size: int, dims: tuple[Any, ...], heatmap: Tensor, beta: Tensor | None, *pixels: Any) -> list[Any]:
    """heatmap, beta and pixels as the ops take them, with the dimension of vmap as the first leading one."""
    heatmap_dim, beta_dim, mask_dim, valid_size_dim, *_ = (*dims, None, None)
    heatmap = _batch_first(heatmap, heatmap_dim, size)
    leading = heatmap.shape[:-2]
    if beta is not None and beta_dim is not None:
        beta = _align(beta, beta_dim, leading, 0)
    mask, valid_size, empty_value = (*pixels, None, None, None)[:3]  # trailing defaults do not arrive
    if mask is not None:
        mask = _batch_first(mask, mask_dim, size)
    if valid_size is not None and valid_size_dim is not None:
        valid_size = _align(valid_size, valid_size_dim, leading, 1)
    return [heatmap, beta, mask, valid_size, empty_value]


def _vmap_forward(
    kernel: Kernel, op: Any, info: Any, in_dims: tuple[Any, ...], heatmap: Tensor, beta: Any, *settings: Any
) -> Any:
    dims = (*in_dims[:2], *in_dims[4:])
    heatmap, beta, *pixels = _fold_batch(info.batch_size, dims, heatmap, beta, *settings[2:])
    return op(heatmap, beta, *settings[:2], *pixels), (0,) * len(kernel.sizes)


def _vmap_backward(kernel: Kernel, op: Any, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    size, grads, kept = info.batch_size, kernel.grads, len(kernel.kept)
    beta_at = grads + 1 + kept
    dims = (in_dims[grads], in_dims[beta_at], *in_dims[beta_at + 4 :])
    heatmap, beta, *pixels = _fold_batch(size, dims, inputs[grads], inputs[beta_at], *inputs[beta_at + 4 :])

    def batched(begin: int, end: int) -> list[Any]:
        pairs = zip(inputs[begin:end], in_dims[begin:end], strict=True)
        return [None if tensor is None else _batch_first(tensor, dim, size).contiguous() for tensor, dim in pairs]

    settings = inputs[beta_at + 1 : beta_at + 4]
    result = op(*batched(0, grads), heatmap, *batched(grads + 1, beta_at), beta, *settings, *pixels)
    return result, (0, 0 if settings[-1] else None)


def register(kernel: Kernel) -> None:
    bind = functools.partial
    for op in (kernel.forward, kernel.eager_forward):
        torch.library.register_vmap(op, bind(_vmap_forward, kernel, op))
    for op in (kernel.backward, kernel.eager_backward):
        torch.library.register_vmap(op, bind(_vmap_backward, kernel, op))
