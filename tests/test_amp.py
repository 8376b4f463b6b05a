# SPDX-License-Identifier: MIT
"""Automatic mixed precision: half-precision maps go in as they are, float32 coordinates come out, training works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kpfused
from kpfused import SoftArgmax2d
from tests import cases
from tests.conftest import DEVICES

# On the CPU, autocast and most convolutions know bfloat16 alone.
EVERY_HALF = pytest.mark.parametrize(
    ("device", "half"),
    [("cpu", torch.bfloat16), *[(d, h) for d in DEVICES if d != "cpu" for h in (torch.bfloat16, torch.float16)]],
    ids=str,
)


def network(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), SoftArgmax2d(1.0, learnable=True, num_keypoints=2)).to(device)


def scenes(device: str, count: int = 16) -> tuple[Tensor, Tensor]:
    """A bright and a dark spot in noise, and where they are: (x, y) of each."""
    at = torch.stack((torch.randint(2, 18, (count, 2)), torch.randint(2, 14, (count, 2))), -1).float()
    x, y = torch.arange(20.0), torch.arange(16.0)[:, None]
    spots = torch.exp(-((x - at[..., 0, None, None]) ** 2 + (y - at[..., 1, None, None]) ** 2) / 4)
    image = spots[:, :1] - spots[:, 1:] + 0.05 * torch.randn(count, 1, 16, 20)
    return image.to(device), at.to(device)


@EVERY_HALF
def test_half_goes_in_and_float32_comes_out(device: str, half: torch.dtype) -> None:
    model = network(device)
    image, _ = scenes(device, 2)
    with cases.KernelCalls() as noted:
        with torch.autocast(device, half):
            heatmap = model[:-1](image)
            points = model(image)
        points.sum().backward()
    assert heatmap.dtype == half
    assert points.dtype == torch.float32
    assert noted.forward == [half]
    assert noted.backward == [half]
    assert torch.equal(points, kpfused.soft_argmax2d(heatmap, model[-1].log_beta.exp()))
    assert model[-1].log_beta.grad.dtype == torch.float32


@EVERY_HALF
def test_autocast_leaves_float32_maps_alone(device: str, half: torch.dtype) -> None:
    heatmap = cases.random((2, 3, 64, 48)).float().to(device)
    beta = torch.rand(3, device=device) + 0.5
    expected = kpfused.soft_argmax2d(heatmap, beta)
    with torch.autocast(device, half):
        assert torch.equal(kpfused.soft_argmax2d(heatmap, beta), expected)
        assert torch.equal(torch.vmap(lambda h: kpfused.soft_argmax2d(h, beta))(heatmap), expected)


@EVERY_HALF
def test_training_with_a_scaler(device: str, half: torch.dtype) -> None:
    """To below a pixel, from a third of the map; and a step whose gradients overflow is left out."""
    model = network(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    errors = []
    for _ in range(40):
        image, target = scenes(device)
        with torch.autocast(device, half):
            points = model(image)
            loss = nn.functional.smooth_l1_loss(points, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        errors.append((points - target).norm(dim=-1).mean().item())
    assert errors[0] > 3
    assert sum(errors[-5:]) / 5 < 1
    before, scale = [p.detach().clone() for p in model.parameters()], scaler.get_scale()
    optimizer.zero_grad()
    scaler.scale(model(image).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < scale
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
