# SPDX-License-Identifier: MIT
"""Expectations of values against the reference; and what the softmax map and probability maps share with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kpfused
from kpfused import reference
from tests import cases
from tests.cases import PIXELS, on
from tests.expectations import FUNCTIONS, VALUES, accumulator, check, close, inputs_of, values_for

SHAPES = [(2, 3, 1, 1), (2, 3, 1, 9), (3, 9, 5, 7), (2, 17, 24, 41), (1, 11, 64, 48), (2, 2, 200, 190)]
MAP = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_channels_last", "every_other"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", VALUES)
def test_expectation(device: str, kind: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    move = cases.LAYOUTS[layout]
    heatmap = move(cases.random(shape).to(dtype).to(device))
    values = move(values_for(shape, kind).to(dtype).to(device))
    result = check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))
    assert result.dtype == accumulator(dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("of_values", ["contiguous", "channels_last", "transposed"])
def test_expectation_of_values_in_another_layout(device: str, layout: str, of_values: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 5, 9, 16)).float().to(device))
    for kind in VALUES:
        values = cases.LAYOUTS[of_values](values_for((2, 5, 9, 16), kind).float().to(device))
        check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))


@pytest.mark.parametrize(
    ("leading", "of_values"),
    [((), ()), ((4,), ()), ((2, 3, 4), (3, 1)), ((2, 3, 4), (2, 1, 4)), ((2, 3, 4), (1, 3, 1)), ((2, 1, 4), (2, 1, 1))],
    ids=str,
)
def test_any_leading_dimensions(device: str, leading: tuple[int, ...], of_values: tuple[int, ...]) -> None:
    """Values that share in the middle too, or in front and behind."""
    heatmap = cases.random((*leading, 6, 8)).float().to(device)
    values = cases.random((*of_values, 3, 6, 8)).float().to(device)
    result = check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))
    assert result.shape == (*leading, 3)


def test_no_maps(device: str) -> None:
    """Shared values of no maps: a gradient of zero, not of what memory held."""
    heatmap = torch.zeros(0, 3, 4, 5, device=device, requires_grad=True)
    values = torch.randn(2, 4, 5, device=device, requires_grad=True)
    result = kpfused.spatial_expectation2d(heatmap, values)
    assert result.shape == (0, 3, 2)
    grads = torch.autograd.grad(result.sum(), (heatmap, values))
    assert torch.equal(grads[1], torch.zeros_like(values))
    assert kpfused.spatial_softmax2d(heatmap).shape == heatmap.shape
    assert kpfused.expectation2d(heatmap).shape == (0, 3, 2)
    assert kpfused.spatial_expectation2d(torch.zeros(2, 4, 5), torch.zeros(0, 4, 5)).shape == (2, 0)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("shape", [(2, 3, 12, 17), (2, 11, 40, 41)], ids=str)
def test_pixels_that_do_not_count(
    device: str, shape: tuple[int, int, int, int], pixels: str, layout: str, kind: str
) -> None:
    """They hold NaN, values too where all that share them skip the pixel, and have a gradient of exactly zero."""
    keywords = on(device, PIXELS[pixels](shape)) | {"empty_value": 0.5}
    heatmap = cases.random(shape).to(device)
    counts = reference.counting(heatmap, keywords.get("mask"), keywords.get("valid_size"))
    assert counts is not None
    counts = counts.expand(shape)
    heatmap = cases.LAYOUTS[layout](heatmap.masked_fill(~counts, torch.nan))
    values = values_for(shape, kind).to(device)
    sharing = tuple(n if v > 1 else 1 for n, v in zip(shape[:2], value_leading(values), strict=True))
    unused = ~counts.sum_to_size((*sharing, *shape[2:])).bool()
    values = values.masked_fill(unused.view(*values.shape[:-3], 1, *shape[2:]), torch.nan)
    for beta in (-0.7, 1.3):
        leaves = [t.clone().requires_grad_() for t in (heatmap, values)]
        result = kpfused.spatial_expectation2d(leaves[0], leaves[1], beta, **keywords)
        expected = reference.spatial_expectation2d(heatmap, values, beta, **keywords)
        close(result, expected)
        upstream = cases.upstream_of(result)
        grads = torch.autograd.grad(result, leaves, upstream)
        assert (grads[0][~counts] == 0).all()
        assert (grads[1].masked_select(unused.view(*values.shape[:-3], 1, *shape[2:])) == 0).all()
        p = reference.spatial_softmax2d(heatmap, beta, **keywords).masked_fill(~counts, 0)
        empty = ~counts.flatten(-2).any(-1)
        p = p.masked_fill(empty[..., None, None], 0)
        mean = expected.masked_fill(empty[..., None], 0)
        clean = values.nan_to_num(0)
        want = beta * p * ((upstream[..., None, None] * clean).sum(-3) - (upstream * mean).sum(-1)[..., None, None])
        close(grads[0], want)
        close(grads[1], (p.unsqueeze(-3) * upstream[..., None, None]).sum_to_size(values.shape))


def value_leading(values: Tensor) -> tuple[int, int]:
    """Leading sizes of values against (B, K)."""
    own = values.shape[:-3]
    return (*(1,) * (2 - len(own)), *own)  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bad_map_stays_alone(device: str, name: str, layout: str) -> None:
    for bad in (torch.nan, torch.inf):
        heatmap = cases.LAYOUTS[layout](cases.random((2, 9, 12, 10)).float().to(device))
        heatmap[1, 2, 3, 4] = bad
        mine, _ = FUNCTIONS[name]
        leaves = tuple(t.requires_grad_() for t in inputs_of(name, heatmap, "map"))
        result = mine(*leaves)
        grads = torch.autograd.grad(result, leaves, torch.ones_like(result))
        for tensor in (result, *grads):
            assert tensor[1, 2].isnan().all()
            tensor = tensor.detach().clone()
            tensor[1, 2] = 0
            assert tensor.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_maps_without_weight(device: str, name: str) -> None:
    mine, theirs = FUNCTIONS[name]
    heatmap = cases.random((2, 3, 4, 5)).to(device)
    heatmap[0, 1] = -torch.inf
    inputs = inputs_of(name, heatmap)
    assert mine(*inputs)[0, 1].isnan().all()
    for empty_value in (0.0, 2.0):
        close(mine(*inputs, empty_value=empty_value), theirs(*inputs, empty_value=empty_value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_half(dtype: torch.dtype) -> None:
    heatmap, values = torch.randn(2, 3, 8, 9), torch.randn(2, 1, 4, 8, 9)
    with torch.autocast("cpu", dtype):
        assert kpfused.spatial_softmax2d(heatmap.to(dtype)).dtype == dtype
        assert kpfused.spatial_expectation2d(heatmap.to(dtype), values.to(dtype)).dtype == torch.float32


def test_nothing_of_map_size_is_kept(device: str) -> None:
    """Autograd holds the inputs, or the softmax that was asked for, and a few numbers a map; no softmax map beside."""
    heatmap = torch.randn(2, 17, 64, 48, device=device, requires_grad=True)
    values = torch.randn(2, 1, 8, 64, 48, device=device, requires_grad=True)
    inputs = {heatmap.data_ptr(), values.data_ptr()}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in inputs:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kpfused.spatial_expectation2d(heatmap, values)
        kpfused.expectation2d(heatmap)
        assert sum(kept) <= 2 * 17 * (4 + 8)
        softmax = kpfused.spatial_softmax2d(heatmap)
    assert sum(kept) - softmax.numel() <= 2 * 17 * (4 + 4 + 8)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "values must be a torch.Tensor; got int", lambda: kpfused.spatial_expectation2d(MAP, 1)),  # type: ignore[arg-type]
        (
            TypeError,
            "values must have the dtype of heatmap, torch.float32; got torch.float64",
            lambda: kpfused.spatial_expectation2d(MAP, MAP.double()),
        ),
        (
            ValueError,
            r"values must be \(..., C, H, W\) and broadcast to \(2, 3, C, 4, 5\) of heatmap; got shape \(4, 5\)",
            lambda: kpfused.spatial_expectation2d(MAP, MAP[0, 0]),
        ),
        (
            ValueError,
            r"values must be .* got shape \(2, 1, 5, 4\)",
            lambda: kpfused.spatial_expectation2d(MAP, torch.zeros(2, 1, 5, 4)),
        ),
        (
            ValueError,
            r"values must be .* got shape \(2, 1, 4, 5\)",
            lambda: kpfused.spatial_expectation2d(MAP, torch.zeros(2, 1, 4, 5)),
        ),
        (
            ValueError,
            "values must be on the device of heatmap, cpu; got meta",
            lambda: kpfused.spatial_expectation2d(MAP, MAP.to("meta")),
        ),
        (ValueError, "coordinates must be one of", lambda: kpfused.expectation2d(MAP, coordinates="x")),
        (TypeError, "probabilities must be float32", lambda: kpfused.expectation2d(MAP.long())),
        (TypeError, "heatmap must be float32", lambda: kpfused.spatial_softmax2d(MAP.long())),
        (ValueError, "give beta or temperature", lambda: kpfused.spatial_softmax2d(MAP, 2.0, temperature=1.0)),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else None,
)
def test_bad_input(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("kind", ["own", "shared"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_are_not_finite_leave_other_pixels_alone(device: str, layout: str, kind: str) -> None:
    """NaN from above in one channel of one map: no gradient where no pixel counts, nor in values of other maps."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 6, 9)).float().to(device)).requires_grad_()
    values = cases.random((2, 3 if kind == "own" else 1, 2, 6, 9)).float().to(device).requires_grad_()
    mask = torch.rand(6, 9, device=device) < 0.6
    result = kpfused.spatial_expectation2d(heatmap, values, mask=mask)
    upstream = torch.ones_like(result)
    upstream[0, 1, 1] = torch.nan
    of_heatmap, of_values = torch.autograd.grad(result, (heatmap, values), upstream)
    assert (of_heatmap.masked_select(~mask) == 0).all()
    assert (of_values.masked_select(~mask) == 0).all()
    assert of_heatmap[0, 1].masked_select(mask).isnan().all()
    assert of_values[0, 1 if kind == "own" else 0, 1].masked_select(mask).isnan().all()
    assert of_values[1].isfinite().all()


@pytest.mark.parametrize("keywords", [{}, {"valid_size": (3, 4)}], ids=str)
def test_no_channels(device: str, keywords: dict[str, Any]) -> None:
    heatmap = cases.random((2, 3, 6, 9)).float().to(device).requires_grad_()
    values = torch.zeros(2, 1, 0, 6, 9, device=device, requires_grad=True)
    result = kpfused.spatial_expectation2d(heatmap, values, **keywords)
    assert result.shape == (2, 3, 0)
    of_heatmap, of_values = torch.autograd.grad(result.sum(), (heatmap, values))
    assert of_values.shape == values.shape
    assert (of_heatmap == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", ["all", "some"])
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_sums_of_many_pixels_keep_their_digits(device: str, kind: str, pixels: str, layout: str) -> None:
    """Of seven, pixel after pixel would lose three. Channels that stand side by side fill vectors, or are left over."""
    heatmap = cases.LAYOUTS[layout](torch.zeros(1, 2, 256, 256, device=device))
    values = torch.full((1, 2 if kind == "own" else 1, 256, 256, 19), 0.1, device=device).permute(0, 1, 4, 2, 3)
    mask = torch.ones(256, 256, dtype=torch.bool, device=device)
    mask[0, 0] = pixels == "all"
    keywords = {} if pixels == "all" else {"mask": mask}
    mean = kpfused.spatial_expectation2d(heatmap, values, **keywords)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("leading", "channels"), [((8192, 1), 3), ((1, 8192), 17)], ids=str)
def test_gradients_of_values_that_many_maps_share_keep_their_digits(
    device: str, leading: tuple[int, int], channels: int
) -> None:
    heatmap = torch.zeros(*leading, 4, 5, device=device)
    values = torch.zeros(channels, 4, 5, device=device, requires_grad=True)
    mean = kpfused.spatial_expectation2d(heatmap, values)
    (grad,) = torch.autograd.grad(mean, values, torch.full_like(mean, 0.1))
    torch.testing.assert_close(grad, torch.full_like(grad, 8192 * 0.1 / 20), rtol=3e-5, atol=0)


@pytest.mark.parametrize("channels", [1, 2, 33])
@pytest.mark.parametrize("leading", [(1, 17), (3, 1)], ids=str)
def test_values_that_samples_or_keypoints_share_side_by_side(
    device: str, leading: tuple[int, int], channels: int
) -> None:
    """Channels innermost, and those of one keypoint after those of another: gradients are sums all the same."""
    heatmap = cases.channels_last(cases.random((3, 17, 12, 16)).to(device))
    image = cases.channels_last(cases.random((leading[0], leading[1] * channels, 12, 16)).to(device))
    values = image.unflatten(1, (leading[1], channels))
    check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, (192, 256)), (torch.float64, (150, 160)), (torch.float32, (24, 32))], ids=str
)
def test_a_copy_of_a_heatmap_whose_stats_are_read_in_place(
    device: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    """Two leading dimensions fold beside channels that are innermost, and do not beside values shared by every other.

    Maps of one part as rows: of several with channels innermost, of one, and small enough to be kept.
    """
    channels = 3 if dtype == torch.float32 else 2
    heatmap = cases.random((2, 2, *size, channels)).to(dtype).to(device).permute(0, 1, 4, 2, 3)
    for leading in ((2, 1, 1), (2, channels)):
        values = cases.random((*leading, 2, *size)).to(dtype).to(device)
        check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_values_that_fold_otherwise_than_the_heatmap(device: str, layout: str) -> None:
    """Three leading dimensions in another order in memory: copied, and the gradient comes back as values lie."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 2, 5, 6, 7)).to(device)).requires_grad_()
    for leading in ((2, 2, 5), (1, 1, 5), (2, 1, 1)):
        values = cases.random((5, leading[1], leading[0], 3, 6, 7)).to(device)
        values = values[: leading[2]].permute(2, 1, 0, 3, 4, 5).requires_grad_()
        results = []
        for function in (kpfused.spatial_expectation2d, reference.spatial_expectation2d):
            result = function(heatmap, values, 1.5)
            upstream = cases.upstream_of(result)
            results.append((result.detach(), *torch.autograd.grad(result, (heatmap, values), upstream)))
        torch.testing.assert_close(results[0], results[1])
        assert results[0][2].stride() == torch.empty_like(values).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("of_mask", [(2, 1, 4), (1, 3, 1), (2, 1, 1), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("leading", [(), (2, 1, 1), (2, 3, 4)], ids=str)
def test_masks_that_fold_otherwise_than_values(
    device: str, leading: tuple[int, ...], of_mask: tuple[int, ...], layout: str
) -> None:
    shape = (2, 3, 4, 12, 17)
    heatmap = cases.LAYOUTS[layout](cases.random((6, *shape[2:])).to(device)).view(shape)
    mask = torch.rand(*of_mask, *shape[3:], device=device) < 0.6
    values = cases.random((*leading, 5, *shape[3:])).to(device)
    check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values), mask=mask)
