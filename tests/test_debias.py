# SPDX-License-Identifier: MIT
"""debias=True: the pull of a background of zero logits, taken away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kpfused
from tests import cases

CENTRE = torch.tensor([3.0, 12.0], dtype=torch.float64)


def peak_on_zero(height: int = 16, width: int = 20, top: float = 12.0) -> Tensor:
    """A symmetric peak of five pixels near a corner, zero everywhere else, as behind a ReLU."""
    heatmap = torch.zeros(height, width, dtype=torch.float64)
    x, y = (int(n) for n in CENTRE)
    heatmap[y, x] = top
    for dx, dy in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        heatmap[y + dy, x + dx] = top - 1
    return heatmap


def true_point(coordinates: str, height: int = 16, width: int = 20) -> Tensor:
    one = torch.full((height, width), -torch.inf, dtype=torch.float64)
    one[int(CENTRE[1]), int(CENTRE[0])] = 0
    return kpfused.soft_argmax2d(one, coordinates=coordinates)


@pytest.mark.parametrize("top", [6.0, 12.0, 100.0, 1e4])
@pytest.mark.parametrize("coordinates", ["pixel", "corners", "centers", "unit", "unit_centered"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_background_does_not_pull(device: str, dtype: torch.dtype, coordinates: str, top: float) -> None:
    heatmap = peak_on_zero(top=top).to(device, dtype)
    scale = 1 if coordinates == "pixel" else 0.1
    point = kpfused.soft_argmax2d(heatmap, coordinates=coordinates, debias=True).double().cpu()
    torch.testing.assert_close(
        point, true_point(coordinates), rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 1e-9)
    )
    if top < 10:
        biased = kpfused.soft_argmax2d(heatmap, coordinates=coordinates).double().cpu()
        assert (biased - true_point(coordinates)).abs().max() > 0.01 * scale


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_consistent_with_beta(device: str, beta: float) -> None:
    heatmap = peak_on_zero().to(device)
    scaled = kpfused.soft_argmax2d(heatmap * beta, debias=True)
    torch.testing.assert_close(kpfused.soft_argmax2d(heatmap, beta, debias=True), scaled)
    torch.testing.assert_close(kpfused.soft_argmax2d(heatmap, temperature=1 / beta, debias=True), scaled)


def test_a_flat_map_stays_finite_and_central(device: str) -> None:
    heatmap = torch.zeros(2, 7, 9, device=device, requires_grad=True)
    point = kpfused.SoftArgmax2d(debias=True)(heatmap)
    torch.testing.assert_close(point, torch.tensor([4.0, 3.0], device=device).expand(2, 2))
    point.sum().backward()
    assert heatmap.grad is not None
    assert heatmap.grad.isfinite().all()


def test_gradcheck(device: str) -> None:
    heatmap = (cases.random((2, 3, 4, 5)) + 2).to(device).requires_grad_()
    beta = (torch.rand(3, dtype=torch.float64, device=device) + 1).requires_grad_()

    def function(h: Tensor, b: Tensor) -> Tensor:
        return kpfused.soft_argmax2d(h, b, coordinates="corners", debias=True)

    assert torch.autograd.gradcheck(function, (heatmap, beta))
    assert torch.autograd.gradgradcheck(function, (heatmap, beta))


def test_not_with_a_mask(device: str) -> None:
    heatmap = torch.zeros(2, 4, 5, device=device)
    with pytest.raises(ValueError, match="debias=True takes all pixels"):
        kpfused.soft_argmax2d(heatmap, debias=True, mask=heatmap == 0)
    with pytest.raises(ValueError, match="debias=True takes all pixels"):
        kpfused.soft_argmax2d(heatmap, debias=True, valid_size=(2, 3))


def test_empty_maps_have_the_empty_value(device: str) -> None:
    """It is no coordinate to take a background away from; other maps keep their bits."""
    heatmap = peak_on_zero().float().to(device).expand(3, -1, -1).clone()
    heatmap[1] = -torch.inf
    leaf = heatmap.requires_grad_()
    points = kpfused.soft_argmax2d(leaf, empty_value=-1.0, debias=True)
    assert points[1].tolist() == [-1.0, -1.0]
    assert torch.equal(points[::2], kpfused.soft_argmax2d(heatmap[::2], debias=True))
    (gradient,) = torch.autograd.grad(points.sum(), leaf)
    assert (gradient[1] == 0).all()
    assert not gradient.isnan().any()
