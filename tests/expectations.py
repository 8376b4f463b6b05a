# SPDX-License-Identifier: MIT
"""What the tests of expectations share: values beside heatmaps, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kpfused
from kpfused import reference
from tests import cases

# Of values for heatmaps (B, K, H, W): what they share, and how they lie.
VALUES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "map": lambda b, k: (b, k, 3),
    "image": lambda b, k: (b, 1, 5),
    "keypoint": lambda b, k: (k, 2),
    "all": lambda b, k: (4,),
    "many": lambda b, k: (1, 1, 29),
}
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "softmax": (kpfused.spatial_softmax2d, reference.spatial_softmax2d),
    "expectation": (kpfused.spatial_expectation2d, reference.spatial_expectation2d),
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def values_for(shape: tuple[int, ...], kind: str) -> Tensor:
    return cases.random((*VALUES[kind](*shape[:2]), *shape[-2:]))


def inputs_of(name: str, heatmap: Tensor, kind: str = "image") -> tuple[Tensor, ...]:
    if name == "softmax":
        return (heatmap,)
    return heatmap, values_for(tuple(heatmap.shape), kind).to(heatmap)


def close(actual: Tensor, expected: Tensor, steps: float = 60, size: float = 1.0) -> None:
    """Within roundings of the largest, and of one rounding to the result's own dtype."""
    rounding = torch.finfo(actual.dtype).eps if accumulator(actual.dtype) != actual.dtype else 0.0
    eps = torch.finfo(accumulator(actual.dtype)).eps * (1 if accumulator(actual.dtype) == torch.float32 else 10)
    largest = expected.nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0.0
    atol = eps * steps * (largest + size) + torch.finfo(actual.dtype).smallest_normal
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=atol, equal_nan=True)


def check(
    mine: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: tuple[Tensor, ...], **keywords: Any
) -> Tensor:
    """Result and gradients with respect to all tensors, which keep their memory format. Returns the result."""
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    oracles = tuple(t.detach().double().requires_grad_() for t in tensors)
    actual, expected = mine(*leaves, **keywords), theirs(*oracles, **keywords)
    close(actual, expected)
    upstream = cases.upstream_of(actual).to(actual.dtype)
    got = torch.autograd.grad(actual, leaves, upstream)
    want = torch.autograd.grad(expected, oracles, upstream.double())
    for g, w, leaf in zip(got, want, leaves, strict=True):
        close(g, w)
        assert g.stride() == torch.empty_like(leaf).stride()
    return actual.detach()
