# SPDX-License-Identifier: MIT
"""Masks of some leading dimensions: not expanded in memory, and an image gives the same bits alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import kpfused
from benchmarks.memory import peak_bytes_beyond
from kpfused import reference
from tests import cases


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "ranges"])
@pytest.mark.parametrize("keypoints", [17, 24])
@pytest.mark.parametrize(
    "of_mask", [(2, 1, 1, 32, 48), (2, 1, None, 32, 48), (2, 3, 1, 32, 48), (3, 1, 32, 48)], ids=str
)
def test_a_mask_of_some_leading_dimensions(
    device: str, of_mask: tuple[int | None, ...], keypoints: int, layout: str
) -> None:
    """Clips of frames: the mask of a clip, or of a frame, does not fold as their dimensions and keypoints do."""
    frames = cases.random((10, keypoints, 32, 48)).to(device, torch.float32)
    if layout == "channels_last":
        frames = cases.channels_last(frames)
    clips = frames.view(2, 5, keypoints, 32, 48) if layout == "ranges" else frames[:6].view(2, 3, keypoints, 32, 48)
    heatmap = clips[:, :3].requires_grad_()
    mask = torch.rand([n or keypoints for n in of_mask], device=device) < 0.6
    before = heatmap.detach().clone(), mask.clone()
    together = kpfused.soft_argmax2d(heatmap, mask=mask)
    (gradient,) = torch.autograd.grad(together.sum(), heatmap)
    if layout != "ranges":
        assert gradient.stride() == heatmap.stride()
    for i, j in itertools.product(range(2), range(3)):
        image = heatmap[i, j].detach().requires_grad_()
        alone = kpfused.soft_argmax2d(image, mask=mask.expand(heatmap.shape)[i, j])
        torch.testing.assert_close(alone, together[i, j], atol=0, rtol=0)
        (of_image,) = torch.autograd.grad(alone.sum(), image)
        torch.testing.assert_close(of_image, gradient[i, j], atol=0, rtol=0)
    assert torch.equal(heatmap, before[0])
    assert torch.equal(mask, before[1])


@pytest.mark.parametrize("channels", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "of_mask", [(1, 1, 4, 1), (1, 3, 1, 4), (2, 1, 4, 1), (2, 1, 1, 4), (1, 3, 4, 1), (2, 3, 1, 1)], ids=str
)
def test_masks_are_not_expanded_in_memory(device: str, of_mask: tuple[int, ...], channels: int) -> None:
    """Dimensions that a mask has and lacks in turn, up to all that a view has room for. Of channels_last maps, the last
    of them are channels together."""
    shape = (2, 3, 4, 4, 32, 48)
    leading = math.prod(shape[: 4 - channels]), math.prod(shape[4 - channels : 4])
    heatmap = cases.random((*leading, *shape[4:])).to(device, torch.float32)
    if channels:
        heatmap = cases.channels_last(heatmap)
    heatmap = heatmap.view(shape)
    mask = torch.rand(*of_mask, *shape[4:], device=device) < 0.6
    assert peak_bytes_beyond(lambda h: kpfused.soft_argmax2d(h, mask=mask), heatmap) < mask.expand(shape).numel() / 4
    torch.testing.assert_close(
        kpfused.soft_argmax2d(heatmap, mask=mask), reference.soft_argmax2d(heatmap, mask=mask), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_3d"])
def test_a_mask_of_a_volume_is_not_expanded_for_its_keypoints(device: str, layout: str) -> None:
    shape = (2, 6, 5, 24, 32)
    heatmap = cases.random((60, 1, 24, 32)).view(shape).to(device, torch.float32)
    if layout == "channels_last":  # of (B, K * D, H, W)
        heatmap = cases.channels_last(heatmap.flatten(1, 2)).view(shape)
    if layout == "channels_last_3d":
        heatmap = heatmap.contiguous(memory_format=torch.channels_last_3d)
    mask = torch.rand(2, 1, 5, 24, 32, device=device) < 0.6
    assert peak_bytes_beyond(lambda h: kpfused.soft_argmax3d(h, mask=mask), heatmap) < mask.expand(shape).numel() / 4
    torch.testing.assert_close(
        kpfused.soft_argmax3d(heatmap, mask=mask),
        reference.spatial_moments3d(heatmap, mask=mask).mean,
        atol=1e-3,
        rtol=1e-4,
    )


def test_a_mask_of_more_separate_dimensions_than_any_view_has(device: str) -> None:
    heatmap = cases.random((2, 2, 2, 2, 2, 2, 16, 16)).to(device, torch.float32)
    mask = torch.rand(2, 1, 2, 1, 2, 1, 16, 16, device=device) < 0.6
    torch.testing.assert_close(
        kpfused.soft_argmax2d(heatmap, mask=mask), reference.soft_argmax2d(heatmap, mask=mask), atol=1e-3, rtol=1e-4
    )


def test_a_window_of_masks_is_copied_but_not_expanded(device: str) -> None:
    heatmap = cases.random((8, 2, 2, 2, 2, 64, 64)).to(device, torch.float32)
    mask = (torch.rand(3, 3, 3, 3, 64, 64, device=device) < 0.6)[:2, :2, :2, :2]
    pixels = heatmap.numel()
    assert peak_bytes_beyond(lambda h: kpfused.soft_argmax2d(h, mask=mask), heatmap) < pixels / 4
    torch.testing.assert_close(
        kpfused.soft_argmax2d(heatmap, mask=mask), reference.soft_argmax2d(heatmap, mask=mask), atol=1e-3, rtol=1e-4
    )


def test_masks_of_several_leading_dimensions_give_the_bits_of_one_image(device: str) -> None:
    """Such a mask has other strides for one image than in a batch of them."""
    heatmap = cases.random((2, 2, 2, 128, 128)).to(device, torch.float32)
    mask = (torch.rand(2, 1, 2, 128, 128, device=device) < 0.6).mT
    together = kpfused.soft_argmax2d(heatmap, mask=mask)
    for i in range(2):
        alone = kpfused.soft_argmax2d(heatmap[i], mask=mask[i])
        torch.testing.assert_close(alone, together[i], atol=0, rtol=0)


@pytest.mark.parametrize("function", ["soft_argmax2d", "spatial_moments2d", "spatial_softmax2d", "expectation2d"])
@pytest.mark.parametrize(
    ("shape", "of_mask"),
    [
        ((24, 32, 48), (24,)),
        ((24, 32, 48), (1,)),
        ((64, 4, 1024), (64,)),
        ((64, 4, 1024), (1,)),
        ((2, 12, 32, 48), (1, 1)),
        ((2, 12, 32, 48), (1, 12)),
        ((2, 12, 32, 48), (2, 1)),
        ((2, 3, 32, 48), (1, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["planes", "as the maps"])
def test_masks_that_are_copied_for_a_batch_give_the_bits_of_one_image(
    device: str, order: str, shape: tuple[int, ...], of_mask: tuple[int, ...], function: str
) -> None:
    """More separate dimensions than a view has. How lanes are filled depends on whether keypoints share their mask, and
    how they are read on the order in which it lies, in that of the maps for one image and in planes for the batch."""
    heatmap = cases.random((16, math.prod(shape[:-2]), *shape[-2:])).to(device, torch.float32)
    heatmap = cases.channels_last(heatmap).view(2, 2, 2, 2, *shape)
    mask = torch.rand(1, 2, 1, 2, *of_mask, *shape[-2:], device=device) < 0.6
    if order == "as the maps":
        mask = mask.movedim(-3, -1).contiguous().movedim(-1, -3)
    results = getattr(kpfused, function)(heatmap, mask=mask)
    for at in itertools.product(range(2), repeat=4):
        alone = getattr(kpfused, function)(heatmap[at], mask=mask[0, at[1], 0, at[3]])
        pairs = [(alone, results)] if isinstance(alone, torch.Tensor) else zip(alone, results, strict=True)
        for one, together in pairs:
            torch.testing.assert_close(one, together[at], atol=0, rtol=0)
