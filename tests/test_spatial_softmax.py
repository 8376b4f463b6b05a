# SPDX-License-Identifier: MIT
"""The softmax map against the reference."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


PIXELS_OR_ALL = {"all": None, **PIXELS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("pixels", PIXELS_OR_ALL)
@pytest.mark.parametrize("elsewhere", [-3.0, torch.inf])
def test_gradient_from_the_result_and_from_the_heatmap(
    device: str, elsewhere: float, pixels: str, layout: str, dtype: torch.dtype
) -> None:
    """Backward reads the heatmap where beta wants a gradient, and the result where it does not.

    ``elsewhere``: the gradient that comes in where pixels do not count.
    """
    of_pixels = PIXELS_OR_ALL[pixels]
    beta = torch.tensor(-1.5, device=device, dtype=dtype)
    for shape in [(2, 9, 12, 17), (2, 33, 7, 5), (3, 2, 1, 1), (1, 1, 300, 301)]:
        keywords = {} if of_pixels is None else on(device, of_pixels(shape))
        heatmap = cases.LAYOUTS[layout](cases.random(shape).to(device, dtype)).requires_grad_()
        upstream = cases.upstream_of(heatmap).to(dtype)
        counts = reference.counting(heatmap, keywords.get("mask"), keywords.get("valid_size"))
        if counts is not None:
            upstream = upstream.masked_fill(~counts, elsewhere)
        gradients = [
            torch.autograd.grad(kpfused.spatial_softmax2d(heatmap, b, **keywords), heatmap, upstream)[0]
            for b in (beta, beta.clone().requires_grad_())
        ]
        assert gradients[0].stride() == gradients[1].stride()
        close(gradients[0], gradients[1].double(), size=0.0)


def saved_by_backward(heatmap: torch.Tensor, *args: object) -> list[torch.Tensor]:
    """What it keeps of the size of the map."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kpfused.spatial_softmax2d(heatmap, *args)
    return [t for t in kept if t.shape == heatmap.shape]


def test_backward_keeps_one_map(device: str) -> None:
    heatmap = cases.random((2, 3, 8, 9)).to(device).requires_grad_()
    (kept,) = saved_by_backward(heatmap)
    torch.testing.assert_close(kept, kpfused.spatial_softmax2d(heatmap), rtol=0, atol=0)
    beta = torch.tensor(2.0, device=device, requires_grad=True)
    half = heatmap.detach().bfloat16().requires_grad_()
    for source, args in [(heatmap, (beta,)), (half, ())]:
        (kept,) = saved_by_backward(source, *args)
        torch.testing.assert_close(kept, source.detach(), rtol=0, atol=0)


def test_changed_in_place(device: str) -> None:
    """As with ``torch.softmax``: the result is what backward reads, and the heatmap is not."""
    heatmap = cases.random((2, 3, 8, 9)).to(device).requires_grad_()
    logits = heatmap * 2
    upstream = cases.upstream_of(heatmap).float()
    (expected,) = torch.autograd.grad(kpfused.spatial_softmax2d(heatmap * 2), heatmap, upstream)
    result = kpfused.spatial_softmax2d(logits)
    logits.zero_()
    assert torch.equal(torch.autograd.grad(result, heatmap, upstream)[0], expected)
    result = kpfused.spatial_softmax2d(heatmap * 2)
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_beta_has_no_gradient_from_the_result(device: str) -> None:
    heatmap = cases.random((2, 3, 8, 9)).to(device)
    result, stats = torch.ops.kpfused.spatial_softmax2d(heatmap, None, 1.0, 0)
    with pytest.raises(RuntimeError, match="the gradient of beta needs the heatmap"):
        torch.ops.kpfused.spatial_softmax2d_backward(heatmap, result, stats, None, 1.0, 1, True)


def test_a_setting_of_forward_is_none_of_backward(device: str) -> None:
    """Forward takes one and has no use for it; to backward it says what it is given."""
    ops, upstream = torch.ops.kpfused, cases.random((2, 3, 8, 9)).to(device)
    for dtype, beta in [
        (torch.float32, None),
        (torch.float16, None),
        (torch.float32, torch.tensor(1.5, device=device, requires_grad=True)),
    ]:
        heatmap = cases.random((2, 3, 8, 9)).to(device, dtype).requires_grad_()
        gradients = [
            torch.autograd.grad(ops.spatial_softmax2d(heatmap, beta, 1.5, setting)[0], heatmap, upstream.to(dtype))[0]
            for setting in (0, 1, 2)
        ]
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_second_derivatives_of_any_setting_that_says_result(device: str) -> None:
    ops, upstream = torch.ops.kpfused, cases.random((2, 3, 8, 9)).to(device)
    result, stats = ops.spatial_softmax2d(cases.random((2, 3, 8, 9)).to(device), None, 1.5, 0)
    result.requires_grad_()
    second = []
    for setting in (1, 2):
        first, _ = ops.spatial_softmax2d_backward(upstream, result, stats, None, 1.5, setting, False)
        second += torch.autograd.grad(first.square().sum(), result)
    assert torch.equal(*second)


@pytest.mark.parametrize("setting", [-1, 99])
def test_settings_that_mean_nothing(device: str, setting: int) -> None:
    """Forward and backward, real and fake, refuse the same."""
    ops, heatmap = torch.ops.kpfused, cases.random((2, 3, 8, 9)).to(device)
    result, stats = ops.spatial_softmax2d(heatmap, None, 1.5, 0)
    for op, call in [
        (ops.spatial_softmax2d, (heatmap, None, 1.5, setting)),
        (ops.spatial_softmax2d_backward, (heatmap, result, stats, None, 1.5, setting, False)),
    ]:
        with pytest.raises(RuntimeError):
            op(*call)
        with FakeTensorMode() as mode, pytest.raises(RuntimeError):
            op(*cases.faked(mode, call))
