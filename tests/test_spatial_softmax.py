# SPDX-License-Identifier: MIT
"""The softmax map against the reference."""

from __future__ import annotations

import pytest
import torch

import kpfused
from kpfused import reference
from tests import cases
from tests.cases import PIXELS, on
from tests.expectations import check, close


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_softmax(device: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random(shape).to(dtype).to(device))
    result = check(kpfused.spatial_softmax2d, reference.spatial_softmax2d, (heatmap,))
    assert result.dtype == dtype
    assert result.stride() == torch.empty_like(heatmap).stride()


@pytest.mark.parametrize("kind", cases.FINITE)
def test_softmax_of_kinds_of_maps(device: str, kind: str) -> None:
    heatmap = cases.FINITE[kind]((2, 5, 24, 32)).float().to(device)
    result = kpfused.spatial_softmax2d(heatmap)
    torch.testing.assert_close(result.double(), reference.spatial_softmax2d(heatmap.double()), rtol=4e-6, atol=1e-37)


@pytest.mark.parametrize("empty_value", [None, -1.0, 0.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", PIXELS)
def test_softmax_of_pixels_that_count(device: str, pixels: str, layout: str, empty_value: float | None) -> None:
    shape = (2, 9, 12, 17)
    keywords = on(device, PIXELS[pixels](shape)) | {"empty_value": empty_value}
    heatmap = cases.random(shape).to(device)
    counts = reference.counting(heatmap, keywords.get("mask"), keywords.get("valid_size"))
    assert counts is not None
    counts = counts.expand(shape)
    heatmap = cases.LAYOUTS[layout](heatmap.masked_fill(~counts, torch.nan)).requires_grad_()
    result = kpfused.spatial_softmax2d(heatmap, -1.5, **keywords)
    close(result, reference.spatial_softmax2d(heatmap, -1.5, **keywords))
    some = counts.flatten(-2).any(-1)
    assert (result[some].masked_select(~counts[some]) == 0).all()
    (grad,) = torch.autograd.grad(result, heatmap, cases.upstream_of(result))
    assert (grad[~counts] == 0).all()
    assert grad.isfinite().all()
