# SPDX-License-Identifier: MIT
"""The softmax map and expectations under masks, against the float64 reference: the ways they take on CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_not_finite(device: str, channels: int, layout: str, size: tuple[int, int]) -> None:
    """A NaN or an infinity of what counts gets where it belongs, and nowhere that a mask leaves out."""
    lay, shape = cases.LAYOUTS[layout], (2, 7, *size)
    counts = torch.rand(shape, device=device) < 0.6
    counts[:, 0, 2, 1] = True
    beyond = ~counts
    heatmap = cases.random(shape).to(device, torch.float32)
    heatmap[0, 0, 2, 1] = torch.nan
    heatmap = lay(heatmap).requires_grad_()
    softmax = kpfused.spatial_softmax2d(heatmap, mask=counts)
    assert softmax[0, 0][counts[0, 0]].isnan().all()
    assert (softmax[beyond] == 0).all()
    assert softmax[1:].isfinite().all()
    assert softmax[0, 1:].isfinite().all()

    def of(image: Tensor) -> Tensor:
        return kpfused.spatial_expectation2d(heatmap, image.unflatten(1, (7, channels)), mask=counts)

    image = lay(torch.randn(2, 7 * channels, *size, device=device)).requires_grad_()
    result = of(image)
    assert result.isnan().nonzero().tolist() == [[0, 0, c] for c in range(channels)]
    for upstream in (1.0, torch.inf):
        grads = torch.autograd.grad(result, (heatmap, image), torch.full_like(result, upstream), retain_graph=True)
        of_maps = [grads[0].unsqueeze(2), grads[1].unflatten(1, (7, channels))]
        assert all((g.masked_select(beyond.unsqueeze(2)) == 0).all() for g in of_maps)
        assert all(g[0, 0].masked_select(counts[0, 0]).isnan().all() for g in of_maps)
    assert of_maps[1].isinf().any()

    infinite = image.detach().masked_fill(beyond.repeat_interleave(channels, 1), -torch.inf)
    infinite[1, 0, 2, 1] = torch.inf
    result = of(lay(infinite))
    assert result[1, 0, 0] == torch.inf
    assert result[1, 0, 1:].isfinite().all()
    assert result[:, 1:].isfinite().all()
