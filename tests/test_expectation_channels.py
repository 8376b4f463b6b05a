# SPDX-License-Identifier: MIT
"""Values of several channels as a convolution leaves them, (B, K C, H, W) in channels_last, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kpfused
from kpfused import reference
from tests import cases

PIXELS: dict[str, Any] = {
    "whole": lambda s: {},
    "mask": lambda s: {"mask": torch.rand(s) < 0.6, "empty_value": 0.5},
    "image": lambda s: {"mask": torch.rand(s[0], 1, *s[2:]) < 0.6},
    "sizes": lambda s: {"valid_size": (torch.randint(0, s[2] + 1, s[:2]), torch.randint(0, s[3] + 1, s[:2]))},
    "size": lambda s: {"valid_size": (s[2] // 2 + 1, s[3] - 3)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize(
    ("keypoints", "channels"),
    [(1, 2), (2, 3), (9, 2), (17, 2), (17, 3), (5, 4), (6, 5), (21, 7), (3, 18), (4, 32), (2, 33), (40, 2), (133, 2)],
)
@pytest.mark.parametrize("size", [(7, 5), (12, 16), (130, 64)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "sliced_channels_last"])
def test_values_side_by_side(
    device: str, layout: str, size: tuple[int, int], keypoints: int, channels: int, pixels: str, dtype: torch.dtype
) -> None:
    """Keypoint after keypoint, and all of their channels in each pixel."""
    lay, shape = cases.LAYOUTS[layout], (2, keypoints, *size)
    keywords = cases.on(device, PIXELS[pixels](shape))
    logits = cases.random(shape).to(device, dtype)
    if "empty_value" in keywords:  # a map of which nothing counts, and one without weight
        keywords["mask"][0, 0] = False
        logits[1, -1] = -torch.inf
    beyond = ~keywords.get("mask", torch.ones(shape, dtype=torch.bool, device=device)).expand(shape)
    if "valid_size" in keywords:
        ends = [torch.as_tensor(n, device=device).expand(shape[:2])[..., None] for n in keywords["valid_size"]]
        rows, cols = (torch.arange(n, device=device) >= end for n, end in zip(size, ends, strict=True))
        beyond = rows[..., None] | cols[..., None, :]
    heatmap = lay(logits.masked_fill(beyond, torch.nan)).requires_grad_()
    image = torch.randn(2, keypoints * channels, *size, device=device, dtype=dtype)
    image = lay(image.masked_fill(beyond.repeat_interleave(channels, 1), torch.nan)).requires_grad_()
    beta = torch.full((), 1.3, device=device, dtype=dtype, requires_grad=True)
    inputs = [heatmap, image, beta]
    exact = [x.detach().double().nan_to_num(0, neginf=-torch.inf).requires_grad_() for x in inputs]

    result = kpfused.spatial_expectation2d(heatmap, image.unflatten(1, (keypoints, channels)), beta=beta, **keywords)
    want = reference.spatial_expectation2d(
        exact[0], exact[1].unflatten(1, (keypoints, channels)), beta=exact[2], **keywords
    )
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(result.double(), want, rtol=near, atol=near, equal_nan=True)
    upstream = torch.randn_like(result)
    grads = torch.autograd.grad(result, inputs, upstream)
    for got, right in zip(grads, torch.autograd.grad(want, exact, upstream.double()), strict=True):
        scale = max(right.abs().max().item(), 1.0 if right.ndim == 0 else 1e-3)
        torch.testing.assert_close(got.double(), right, rtol=near, atol=near * scale)
