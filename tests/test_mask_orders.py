# SPDX-License-Identifier: MIT
"""Masks that lie otherwise than the maps, and masks of whole rows or maps: the bits of the same mask, dense."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kpfused
from benchmarks.memory import peak_bytes_beyond
from tests import cases

Layout = Callable[[Tensor], Tensor]
EXACT = {"rtol": 0.0, "atol": 0.0}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "soft_argmax2d": kpfused.soft_argmax2d,
    "spatial_moments2d": kpfused.spatial_moments2d,
    "spatial_softmax2d": kpfused.spatial_softmax2d,
    "expectation2d": lambda h, mask, valid_size=None, **_: kpfused.expectation2d(h, mask=mask, valid_size=valid_size),
    "spatial_expectation2d": lambda h, **k: kpfused.spatial_expectation2d(h, h.detach().unsqueeze(-3), **k),
    "window_mass": lambda h, **k: kpfused.window_mass(h, 3, **k),
}


def orders(mask: Tensor) -> list[Tensor]:
    """The same mask in every order of its dimensions, and of every second byte."""
    every = itertools.permutations(range(4))
    lain = [mask.permute(order).contiguous().permute([order.index(d) for d in range(4)]) for order in every]
    return [*lain, mask.repeat_interleave(2, -1)[..., ::2]]


def broadcast(batch: int, keypoints: int, height: int, width: int, device: str) -> list[Tensor]:
    """Flags of maps, of images and of rows; the columns of each keypoint; and fewer pixels of a larger mask."""
    flags = (
        (batch, keypoints, 1, 1),
        (batch, 1, 1, 1),
        (height, 1),
        (batch, 1, height, 1),
        (batch, keypoints, height, 1),
    )
    masks = [torch.rand(shape, device=device) < 0.6 for shape in (*flags, (keypoints, 1, width))]
    return [*masks, (torch.rand(batch, 1, 2 * height, 2 * width, device=device) < 0.6)[..., ::2, ::2]]


def everything(function: str, lay: Layout, heatmap: Tensor, mask: Tensor, **keywords: Any) -> list[Tensor]:
    """Results and gradient, with NaN where no pixel counts."""
    leaf = lay(heatmap.masked_fill(~mask, torch.nan)).requires_grad_()
    result = FUNCTIONS[function](leaf, mask=mask, empty_value=0.5, **keywords)
    fields = [result] if isinstance(result, Tensor) else list(result)
    real = [field for field in fields if field.requires_grad]
    upstream = [cases.upstream_of(field).to(field.dtype) for field in real]
    gradient = torch.autograd.grad(real, leaf, upstream)[0]
    assert (gradient.masked_select(~mask) == 0).all()
    return [*fields, gradient]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    # Planes of 2048 bytes, which copies keep apart, and others.
    [
        *[(2, 3, 5, 6), (2, 17, 8, 9), (1, 33, 16, 16), (3, 16, 4, 16), (2, 3, 32, 64)],
        *[(2, 2, 33, 64), (2, 3, 40, 130), (1, 2, 260, 261)],
    ],
    ids=str,
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_in_any_order(device: str, function: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    mask = torch.rand(shape, device=device) < 0.6
    sized = {"beta": -1.5, "valid_size": (shape[2] - 1, shape[3] // 8 * 8 or 3)}
    flags = [([few], few.expand(shape).contiguous()) for few in broadcast(*shape, device)]
    groups = [(*group, keywords) for group in flags for keywords in ({}, sized)]
    if mask.numel() < 2**15:  # of larger maps, see the next test
        groups.append((orders(mask), mask, {}))
    heatmap = cases.random(shape).to(device, dtype)
    rounding = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5 * max(shape)}
    for layout, tolerance in ((torch.Tensor.contiguous, EXACT), (cases.channels_last, rounding)):
        for masks, dense, keywords in groups:
            wanted = everything(function, layout, heatmap, dense, **keywords)
            for given in masks:
                before = given.clone()
                for got, want in zip(everything(function, layout, heatmap, given, **keywords), wanted, strict=True):
                    torch.testing.assert_close(got, want, **tolerance)
                assert torch.equal(given, before)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *itertools.product(cases.DTYPES, [(2, 3, 5, 8), (1, 2, 33, 64)]),
        (torch.float32, (1, 1, 140, 128)),
        (torch.float32, (2, 3, 128, 128)),  # planes of 2048 bytes
        (torch.bfloat16, (1, 1, 3, 8200)),
        (torch.float32, (1, 1, 300, 264)),
        (torch.float32, (1, 1, 2, 70400)),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_of_whole_bytes_of_bits(
    device: str, function: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Of one chunk of a map, of several, and of parts, with some pixels left out and with a few, within valid sizes."""
    heatmap = cases.random(shape).to(device, dtype)
    few = torch.ones(shape, dtype=torch.bool, device=device)
    few[..., -1, 5] = False
    for mask in (torch.rand(shape, device=device) < 0.6, few):
        for keywords in ({}, {"valid_size": (shape[2] - 1, shape[3] - 3)}):
            wanted = everything(function, torch.Tensor.contiguous, heatmap, mask, **keywords)
            for given in (mask.mT.contiguous().mT, cases.channels_last(mask), orders(mask)[-1]):
                for got, want in zip(
                    everything(function, torch.Tensor.contiguous, heatmap, given, **keywords), wanted, strict=True
                ):
                    torch.testing.assert_close(got, want, **EXACT)
    row = torch.rand(2 * shape[3], device=device) < 0.6  # every second of its pixels, for all rows
    flags = row[::2].expand(shape[-2:])
    wanted = everything(function, torch.Tensor.contiguous, heatmap, flags.expand(shape).contiguous())
    for got, want in zip(everything(function, torch.Tensor.contiguous, heatmap, flags), wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_copies_of_masks_leave_sums_over_maps_as_they_are(device: str) -> None:
    """Gradients of values that all maps share are added up run by run of maps, and copies do not part the runs."""
    heatmap = cases.random((6, 12, 64, 64)).to(device, torch.float32)
    values = cases.random((2, 64, 64)).to(device, torch.float32).requires_grad_()
    mask = torch.rand(heatmap.shape, device=device) < 0.6

    def gradient(mask: Tensor) -> Tensor:
        result = kpfused.spatial_expectation2d(heatmap, values, mask=mask)
        return torch.autograd.grad(result, values, cases.upstream_of(result).to(result.dtype))[0]

    wanted = gradient(mask)
    for given in orders(mask):
        if given.stride(-1) > 1:  # others are read in place
            assert torch.equal(gradient(given), wanted)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_masks_in_any_order_beside_values_in_any(device: str, layout: str) -> None:
    """Copies of heatmap and values are read where they cannot be read together."""
    heatmap = cases.random((2, 3, 6, 16)).to(device, torch.float32)
    values = cases.random((2, 3, 2, 6, 16)).to(device, torch.float32)
    mask = torch.rand(heatmap.shape, device=device) < 0.6
    outer = values.movedim(1, 2).contiguous().movedim(2, 1)
    for lain in (values, values.transpose(0, 1).contiguous().transpose(0, 1), outer, values[:, :1], values[:1]):
        wanted = None
        for given in (mask, *orders(mask)):
            leaves = [cases.LAYOUTS[layout](heatmap).requires_grad_(), lain.detach().requires_grad_()]
            result = kpfused.spatial_expectation2d(*leaves, mask=given)
            got = [result, *torch.autograd.grad(result, leaves, cases.upstream_of(result).to(result.dtype))]
            wanted = wanted or got
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (5, 6)), (torch.float64, (9, 16)), (torch.float32, (24, 41)), (torch.float32, (64, 64))],
    ids=str,
)
@pytest.mark.parametrize("channels", [(2, 2), (2, 3), (3, 5), (2, 17), (8, 16), (3, 100)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_that_some_channels_share(
    device: str, function: str, channels: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of channels_last maps: in any order they give the bits of a mask for each channel. A GPU takes single channels
    where pairs would be of two groups."""
    groups, each = channels

    def lay(heatmap: Tensor) -> Tensor:
        return cases.channels_last(heatmap.flatten(1, 2)).unflatten(1, channels)

    heatmap = cases.random((2, groups * each, *shape)).view(2, groups, each, *shape).to(device, dtype)
    pairs_differ = device == "cuda" and each % 2 == 1 and groups % 2 == 0
    tolerance = {"rtol": 2e-5, "atol": 2e-5 * max(shape)} if pairs_differ else EXACT
    for of_mask in ((2, 1, each), (2, groups, 1), (1, each)):
        mask = torch.rand(*of_mask, *shape, device=device) < 0.6
        for sized in ({}, {"beta": -1.5, "valid_size": (shape[0] - 1, shape[1] // 8 * 8 or 3)}):
            wanted = everything(function, lay, heatmap, mask.expand(heatmap.shape).contiguous(), **sized)
            for given in (mask, cases.channels_last(mask), mask.mT.contiguous().mT):
                for got, want in zip(everything(function, lay, heatmap, given, **sized), wanted, strict=True):
                    torch.testing.assert_close(got, want, **tolerance)


def test_masks_in_another_order_cost_a_bit_for_each_pixel(device: str) -> None:
    heatmap = cases.random((4, 17, 64, 64)).to(device, torch.float32)
    for mask in orders(heatmap > 0)[::6]:
        assert peak_bytes_beyond(lambda h, mask=mask: kpfused.soft_argmax2d(h, mask=mask), heatmap) < mask.numel() / 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_flags_are_not_expanded_in_memory(device: str, layout: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((4, 17, 64, 64)).to(device, torch.float32))
    pixels = math.prod(heatmap.shape)
    for mask in broadcast(*heatmap.shape, device):
        assert peak_bytes_beyond(lambda h, mask=mask: kpfused.soft_argmax2d(h, mask=mask), heatmap) < pixels / 4
