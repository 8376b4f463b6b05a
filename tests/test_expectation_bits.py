# SPDX-License-Identifier: MIT
"""Expectations and the softmax map to the bit: maps alone and in company, layouts, threads; what stays in its map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kpfused
from tests import cases
from tests.expectations import accumulator


@pytest.mark.parametrize("kind", ["none", "own", "of_image", "of_all"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", [(), ("mask",), ("valid_size",), ("mask", "valid_size")], ids=str)
@pytest.mark.parametrize("size", [(12, 10), (64, 64), (100, 100), (200, 210), (300, 310)], ids=str)
def test_a_map_gives_the_same_bits_alone(
    device: str, layout: str, size: tuple[int, int], pixels: tuple[str, ...], kind: str
) -> None:
    """Results and gradients, of the softmax where there are no values."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 9, *size)).float().to(device))
    mask = torch.rand(heatmap.shape, device=device) < 0.6
    valid = [torch.randint(n // 2, n + 1, (2, 1), device=device) for n in size]
    leading = {"none": (), "own": (2, 9), "of_image": (2, 1), "of_all": ()}[kind]
    values = cases.random((*leading, 3, *size)).float().to(device)

    def results(pick: tuple[slice, ...], values: Tensor) -> list[Tensor]:
        leaf = heatmap[pick].detach().requires_grad_()
        counts = {"mask": mask[pick], "valid_size": tuple(extent[pick[:1]] for extent in valid)}
        keywords = {name: counts[name] for name in pixels}
        if kind == "none":
            result = kpfused.spatial_softmax2d(leaf, **keywords)
            result.backward(values.select(-3, 0).expand(leaf.shape))
        else:
            result = kpfused.spatial_expectation2d(leaf, values, **keywords)
            result.sum().backward()
        return [result.detach(), leaf.grad]

    together = results((), values)
    # How many channels stand side by side is part of the layout.
    picks = [(slice(1, 2), slice(None))] + ([(slice(1, 2), slice(k, k + 1)) for k in (0, 5)] * (layout == "contiguous"))
    for pick in picks:
        own = values[pick if kind == "own" else pick[:1]] if kind in ("own", "of_image") else values
        for alone, of_all in zip(results(pick, own), together, strict=True):
            assert torch.equal(alone, of_all[pick])
    for again, of_all in zip(results((), values), together, strict=True):
        assert torch.equal(again, of_all)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 1), (3, 3), (7, 7), (8, 16), (10, 12), (37, 41), (64, 48), (96, 72)], ids=str)
@pytest.mark.parametrize("pixels", ["whole", "all", "strided", "size_of_image", "both"])
@pytest.mark.parametrize("leading", [(2, 5), (1, 5)], ids=["own", "of_keypoints"])
def test_a_run_of_pixels_gives_the_bits_of_rows_with_gaps(
    leading: tuple[int, int], pixels: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """On CPU, where other kernels read them. Negative beta, one map of NaN and one of -inf."""
    heatmap = cases.random((2, 5, *size)).to(dtype)
    heatmap[0, 1, -1, -1], heatmap[1, 2] = torch.nan, -torch.inf
    values = cases.random((*leading, 3, *size)).to(dtype)
    keywords = cases.PIXELS[pixels]((2, 5, *size)) if pixels != "whole" else {}
    beta = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=accumulator(dtype))

    def results(*tensors: Tensor) -> list[Tensor]:
        heatmap, values, beta = (t.detach().requires_grad_() for t in tensors)
        softmax = kpfused.spatial_softmax2d(heatmap, beta, **keywords)
        mean = kpfused.spatial_expectation2d(heatmap, values, beta, **keywords)
        of_softmax = torch.autograd.grad(softmax, (heatmap, beta), cases.upstream_of(softmax).to(dtype))
        upstream = cases.upstream_of(mean).to(mean.dtype)
        return [softmax, mean, *of_softmax, *torch.autograd.grad(mean, (heatmap, values, beta), upstream)]

    wide = cases.LAYOUTS["sliced"]
    for run, rows in zip(results(heatmap, values, beta), results(wide(heatmap), wide(values), beta), strict=True):
        torch.testing.assert_close(run, rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [8, 16, 17, 40])
def test_what_counts_of_other_channels_changes_no_bits(device: str, channels: int) -> None:
    heatmap = cases.channels_last(cases.random((1, channels, 24, 32)).float().to(device)).requires_grad_()
    values, upstream = (cases.channels_last(torch.randn_like(heatmap)) for _ in range(2))
    beta = torch.rand(channels, device=device).requires_grad_()
    mask = torch.rand(heatmap.shape, device=device) < 0.5
    mask[:, 0] = True
    of_channel = []
    for counts in (mask, torch.ones_like(mask)):
        mean = kpfused.spatial_expectation2d(heatmap, values.unsqueeze(2), beta, mask=counts)
        softmax = kpfused.spatial_softmax2d(heatmap, beta, mask=counts)
        grads = torch.autograd.grad(softmax, (heatmap, beta), upstream)
        of_channel.append((mean[:, 0], softmax[:, 0], grads[0][:, 0], grads[1][0]))
    for some, whole in zip(*of_channel, strict=True):
        assert torch.equal(some, whole)


def test_channels_side_by_side_give_a_map_the_same_bits_alone(device: str) -> None:
    """Of maps of one row, whose pixels overlap: channels and pixels are both neighbours in memory."""
    heatmap = cases.random((8, 1, 100)).float().to(device).requires_grad_()
    values = cases.random((8, 115)).float().to(device).unfold(1, 100, 1).unsqueeze(2)
    together = kpfused.spatial_expectation2d(heatmap, values)
    for i in range(8):
        assert torch.equal(kpfused.spatial_expectation2d(heatmap[i], values[i]), together[i])


@pytest.mark.parametrize(
    ("shape", "of_values"),
    [
        ((2, 5, 300, 310), (2, 5, 2)),
        # Keypoints that share values are taken together: as many as there is room for, and leave each thread its part.
        ((1, 24, 30, 31), (1, 1, 200)),
        ((1, 27, 100, 110), (1, 1, 40)),
        ((1, 48, 200, 210), (1, 1, 17)),
    ],
    ids=str,
)
def test_any_number_of_threads(device: str, shape: tuple[int, ...], of_values: tuple[int, ...]) -> None:
    """And a keypoint alone."""
    heatmap = cases.random(shape).float().to(device).requires_grad_()
    values = cases.random((*of_values, *shape[-2:])).float().to(device).requires_grad_()

    def everything() -> tuple[Tensor, ...]:
        mean = kpfused.spatial_expectation2d(heatmap, values)
        return mean, *torch.autograd.grad(mean.sum(), (heatmap, values))

    threads = torch.get_num_threads()
    want = everything()
    alone = slice(shape[1] - 2, shape[1] - 1)
    mean = kpfused.spatial_expectation2d(heatmap[:, alone], values if of_values[1] == 1 else values[:, alone])
    assert torch.equal(mean, want[0][:, alone])
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            for got, expected in zip(everything(), want, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)
