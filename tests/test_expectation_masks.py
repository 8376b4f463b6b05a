# SPDX-License-Identifier: MIT
"""The softmax map and expectations under masks, against the float64 reference: the ways they take on CPU."""

from __future__ import annotations

import pytest
import torch

import kpfused
from kpfused import reference
from tests import cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(5, 2), (9, 8), (5, 13), (40, 32), (7, 48), (130, 64), (3, 1040)], ids=str)
@pytest.mark.parametrize(
    ("layout", "channels"), [("contiguous", 3), *(("channels_last", n) for n in (3, 9, 17, 25, 30, 133, 260))]
)
@pytest.mark.parametrize("kind", ["shared", "of_samples", "of_maps"])
def test_masks(device: str, kind: str, layout: str, channels: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Of planes and of channels_last; in one part and in several, some maps without a pixel or without weight."""
    lay = cases.LAYOUTS[layout]
    shape = (2, channels, *size)
    mask = (
        torch.rand({"shared": (1, 1, *size), "of_samples": (2, 1, *size), "of_maps": shape}[kind], device=device) < 0.6
    )
    mask[..., -1, :2] = True  # some pixel of every map, but for these
    if kind != "shared":
        mask[1, -1] = False
    counts = mask.expand(shape)
    empty = ~counts.flatten(-2).any(-1)
    empty[0, 1] = True
    source = cases.random(shape).to(device, dtype).masked_fill(~counts, torch.nan)
    source[0, 1] = -torch.inf
    values = lay(torch.randn_like(source).masked_fill(~counts, torch.nan)).unsqueeze(2)
    near = 1e-12 if dtype == torch.float64 else 4e-6
    keywords = {"beta": 1.3, "empty_value": 0.5}
    p = reference.spatial_softmax2d(source.double(), mask=mask, **keywords)
    clean, weight = values.squeeze(2).double().nan_to_num(0), p.masked_fill(empty[..., None, None], 0)
    mean = (weight * clean).sum((-2, -1)).masked_fill(empty, 0.5)
    upstream = torch.randn(2, channels, 1, device=device, dtype=dtype)
    of_map = upstream.double()[..., None]
    want = 1.3 * weight * of_map * (clean - mean[..., None, None])
    for lain in (mask, cases.channels_last(mask)):
        heatmap, inputs = lay(source).requires_grad_(), values.clone().requires_grad_()
        softmax = kpfused.spatial_softmax2d(heatmap, mask=lain, **keywords)
        torch.testing.assert_close(softmax.double(), p, rtol=5 * near, atol=near * 1e-3)
        assert (softmax.masked_select(~counts & ~empty[..., None, None]) == 0).all()
        to_softmax = inputs.detach().squeeze(2).nan_to_num(0) * upstream[..., None]
        (got,) = torch.autograd.grad(softmax, heatmap, to_softmax.masked_fill(~counts, torch.nan))
        atol = near * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=5 * near, atol=atol)
        result = kpfused.spatial_expectation2d(heatmap, inputs, mask=lain, **keywords)
        torch.testing.assert_close(result.double().squeeze(-1), mean, rtol=0, atol=near * 4)
        grads = torch.autograd.grad(result, (heatmap, inputs), upstream)
        torch.testing.assert_close(grads[0].double(), want, rtol=5 * near, atol=atol)
        torch.testing.assert_close(grads[1].squeeze(2).double(), weight * of_map, rtol=5 * near, atol=near * 1e-3)
        assert all((g.reshape(shape)[~counts] == 0).all() for g in (got, *grads))
        assert all((g.reshape(shape)[empty] == 0).all() for g in (got, *grads))


@pytest.mark.parametrize("size", [(5, 13), (64, 48), (256, 130)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_finite(device: str, layout: str, size: tuple[int, int]) -> None:
    """A NaN or an infinity of what counts gets where it belongs, and nowhere that a mask leaves out."""
    lay, shape = cases.LAYOUTS[layout], (2, 5, *size)
    counts = torch.rand(shape, device=device) < 0.6
    counts[:, 0, 2, 1] = True
    heatmap = cases.random(shape).to(device)
    heatmap[0, 0, 2, 1] = torch.nan
    heatmap, values = lay(heatmap).requires_grad_(), lay(torch.randn_like(heatmap)).unsqueeze(2).requires_grad_()
    beyond = ~counts
    softmax = kpfused.spatial_softmax2d(heatmap, mask=counts)
    assert softmax[0, 0][counts[0, 0]].isnan().all()
    assert (softmax[beyond] == 0).all()
    assert softmax[1:].isfinite().all()
    assert softmax[0, 1:].isfinite().all()

    result = kpfused.spatial_expectation2d(heatmap, values, mask=counts)
    assert result.isnan().nonzero().tolist() == [[0, 0, 0]]
    for upstream in (torch.ones_like(result), torch.full_like(result, torch.inf)):
        grads = torch.autograd.grad(result, (heatmap, values), upstream, retain_graph=True)
        assert all((g.reshape(shape)[beyond] == 0).all() for g in grads)
        assert all(g.reshape(shape)[0, 0][counts[0, 0]].isnan().all() for g in grads)
    assert grads[1].isinf().any()

    infinite = values.detach().clone()
    infinite[1, 0, :, 2, 1] = torch.inf
    infinite.masked_fill_(beyond.unsqueeze(2), -torch.inf)
    result = kpfused.spatial_expectation2d(heatmap, infinite, mask=counts)
    assert result[1, 0] == torch.inf
    assert result[:, 1:].isfinite().all()
