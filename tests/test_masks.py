# SPDX-License-Identifier: MIT
"""Pixels that do not count: masks, valid sizes and empty values, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import kpfused
from kpfused import reference
from tests import cases
from tests.cases import PIXELS, on

FUNCTIONS = {
    "soft_argmax2d": (kpfused.soft_argmax2d, reference.soft_argmax2d),
    "spatial_moments2d": (kpfused.spatial_moments2d, reference.spatial_moments2d),
}


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else cases.real_fields(result)


def loss(result: Any) -> Tensor:
    return torch.stack([(f * cases.upstream_of(f).to(f.dtype)).sum() for f in outputs(result)]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (2, 17, 24, 41), (2, 17, 12, 48), (1, 9, 256, 256)], ids=str)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_against_the_reference(
    device: str, function: str, pixels: str, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype
) -> None:
    """Values, gradients of map and beta. Pixels that do not count hold NaN and get a gradient of exactly zero."""
    mine, theirs = FUNCTIONS[function]
    keywords = on(device, PIXELS[pixels](shape)) | {"coordinates": "unit", "empty_value": 3.0}
    heatmap = cases.random(shape).to(device)
    counts = reference.counting(heatmap, keywords.get("mask"), keywords.get("valid_size"))
    assert counts is not None
    counts = counts.expand(shape)
    heatmap = cases.LAYOUTS[layout](heatmap.masked_fill(~counts, torch.nan).to(dtype)).requires_grad_()
    oracle = heatmap.detach().double().requires_grad_()
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    wide = torch.linspace(-2, 1.5, shape[1], dtype=torch.float64, device=device)
    beta, wide_beta = wide.to(accumulator).requires_grad_(), wide.to(accumulator).double().requires_grad_()
    actual, expected = mine(heatmap, beta, **keywords), theirs(oracle, wide_beta, **keywords)  # type: ignore[operator]
    exact = accumulator == torch.float64
    for got, want in zip(outputs(actual), outputs(expected), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-11 if exact else 3e-5, atol=1e-12 if exact else 3e-6)
    grads = torch.autograd.grad(loss(actual), (heatmap, beta))
    wanted = torch.autograd.grad(loss(expected), (oracle, wide_beta))
    assert (grads[0][~counts] == 0).all()
    cases.assert_gradients(grads[0], wanted[0], 8)
    torch.testing.assert_close(
        grads[1].double(), wanted[1], rtol=1e-10 if exact else 1e-3, atol=1e-10 if exact else 1e-4
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_maps(device: str, function: str, layout: str) -> None:
    mine, _ = FUNCTIONS[function]
    heatmap = cases.LAYOUTS[layout](cases.random((2, 9, 6, 7)).float().to(device)).requires_grad_()
    mask = torch.ones(2, 9, 1, 1, dtype=torch.bool, device=device)
    mask[1, 4] = False
    for empty_value in (None, -1.0):
        beta = torch.ones(9, device=device, requires_grad=True)
        result = mine(heatmap, beta, mask=mask, empty_value=empty_value)  # type: ignore[operator]
        for field in outputs(result):
            empty = field[1, 4]
            assert (empty.isnan() if empty_value is None else empty == empty_value).all()
            others = field[mask[..., 0, 0]]
            assert others.isfinite().all()
        grad, grad_beta = torch.autograd.grad(loss(result), (heatmap, beta))
        assert (grad[1, 4] == 0).all()
        assert (grad[0, 4] != 0).any()
        assert grad_beta.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_valid_size_gives_what_the_crop_gives(device: str, layout: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((3, 17, 24, 32)).float().to(device))
    heights, widths = torch.tensor([24, 10, 1], device=device), torch.tensor([32, 7, 13], device=device)
    points = kpfused.soft_argmax2d(heatmap, valid_size=(heights[:, None], widths[:, None]))
    for i, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        crop = kpfused.soft_argmax2d(heatmap[i, :, :height, :width].double())
        cases.assert_coordinates(points[i], crop, 32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_nan_that_counts_stays_out_of_pixels_that_do_not(device: str, function: str, layout: str) -> None:
    mine, _ = FUNCTIONS[function]
    values = cases.random((2, 9, 12, 10)).float().to(device)
    mask = torch.rand(12, 10, device=device) < 0.5
    mask[3, 4] = True
    values[1, 2, 3, 4] = torch.nan
    heatmap = cases.LAYOUTS[layout](values).requires_grad_()
    (grad,) = torch.autograd.grad(loss(mine(heatmap, mask=mask)), heatmap)  # type: ignore[operator]
    assert grad[1, 2][mask].isnan().all()
    assert (grad[..., ~mask] == 0).all()


@pytest.mark.parametrize("beta", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("scale", [1e6, 1e14, 1e25, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [*FUNCTIONS, "spatial_softmax2d"])
@pytest.mark.parametrize("width", [20, 64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_any_size_stay_out_of_pixels_that_do_not_count(
    device: str, dtype: torch.dtype, width: int, function: str, layout: str, scale: float, beta: float
) -> None:
    shape = (2, 9, 6, width)
    mask = torch.rand(shape, device=device) < 0.5
    heatmap = cases.LAYOUTS[layout](cases.random(shape).to(device, dtype)).requires_grad_()
    wanted = torch.tensor(beta, device=device, dtype=dtype, requires_grad=True)
    fields = outputs(getattr(kpfused, function)(heatmap, wanted, mask=mask))
    for leaves in ([heatmap], [heatmap, wanted]):
        grads = torch.autograd.grad(fields, leaves, [scale * cases.upstream_of(f) for f in fields], retain_graph=True)
        assert (grads[0][~mask] == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device: str, function: str, layout: str) -> None:
    mine, _ = FUNCTIONS[function]
    heatmap = cases.LAYOUTS[layout](cases.random((2, 2, 4, 3)).to(device)).requires_grad_()
    beta = (torch.rand(2, dtype=torch.float64, device=device) + 0.5).requires_grad_()
    mask = torch.ones(4, 3, dtype=torch.bool, device=device)
    mask[1, 1] = mask[2, 0] = False

    def masked(h: Tensor, b: Tensor) -> list[Tensor]:
        sizes = (torch.tensor([[4], [3]], device=device), 3)
        return outputs(mine(h, b, mask=mask, valid_size=sizes))  # type: ignore[operator]

    assert torch.autograd.gradcheck(masked, (heatmap, beta))
    assert torch.autograd.gradgradcheck(masked, (heatmap, beta))


def test_vmap_over_masks(device: str) -> None:
    heatmap, mask = cases.random((4, 3, 5, 6)).to(device), torch.rand(4, 5, 6, device=device) < 0.7
    for function in (kpfused.soft_argmax2d, lambda h, mask: kpfused.spatial_moments2d(h, mask=mask).covariance):
        got = torch.vmap(lambda h, m, f=function: f(h, mask=m))(heatmap, mask)
        torch.testing.assert_close(got, function(heatmap, mask=mask[:, None]))


def test_layer_takes_a_mask(device: str) -> None:
    heatmap, mask = torch.randn(2, 3, 5, 6, device=device), torch.rand(2, 1, 5, 6, device=device) < 0.5
    layer = kpfused.SoftArgmax2d(2.0, empty_value=0.0)
    assert torch.equal(layer(heatmap, mask), kpfused.soft_argmax2d(heatmap, 2.0, mask=mask, empty_value=0.0))
    assert torch.equal(layer(heatmap, valid_size=(2, 3)), kpfused.soft_argmax2d(heatmap, 2.0, valid_size=(2, 3)))


MAP = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("error", "words", "keywords"),
    [
        (TypeError, "mask must be a torch.Tensor; got list", {"mask": [True]}),
        (
            TypeError,
            "mask must be a tensor of torch.bool, True where a pixel counts; got torch.uint8",
            {"mask": MAP.byte()},
        ),
        (
            ValueError,
            r"mask must broadcast to the shape \(2, 3, 4, 5\) of heatmap; got shape \(2, 4, 5\)",
            {"mask": MAP[:, 0] > 0},
        ),
        (ValueError, "mask must be on the device of heatmap, cpu; got meta", {"mask": (MAP > 0).to("meta")}),
        (TypeError, r"valid_size must be \(height, width\); got 3", {"valid_size": 3}),
        (
            TypeError,
            r"valid_size must be \(height, width\); got one tensor \(2, 2\)",
            {"valid_size": torch.ones(2, 2, dtype=torch.int64)},
        ),
        (TypeError, "height of valid_size must be an integer or a torch.Tensor; got float", {"valid_size": (1.0, 2)}),
        (
            TypeError,
            "width of valid_size must be an integer tensor; got torch.float32",
            {"valid_size": (1, torch.ones(3))},
        ),
        (ValueError, "height of valid_size must be from 0 to 4; got 5", {"valid_size": (5, 5)}),
        (
            ValueError,
            r"width of valid_size must broadcast .* got shape \(2,\)",
            {"valid_size": (1, torch.ones(2).long())},
        ),
    ],
    ids=lambda v: None if isinstance(v, type) else "-".join(v) if isinstance(v, dict) else str(v)[:30],
)
def test_bad_input(function: str, error: type[Exception], words: str, keywords: dict[str, Any]) -> None:
    mine, _ = FUNCTIONS[function]
    with pytest.raises(error, match=words):
        mine(MAP, **keywords)  # type: ignore[operator]


@pytest.mark.parametrize("function", [kpfused.soft_argmax2d, kpfused.spatial_softmax2d, kpfused.spatial_moments2d])
def test_hooks_may_send_the_mask_elsewhere(device: str, function: Callable[..., Any]) -> None:
    """As to the host, until backward: nothing but what autograd saves keeps it."""
    heatmap = cases.random((2, 3, 8, 9)).float().to(device).requires_grad_()
    mask = torch.rand(2, 1, 8, 9, device=device) < 0.7
    expected = torch.autograd.grad(real(function(heatmap, mask=mask)).square().sum(), heatmap)
    storage = StorageWeakRef(mask.untyped_storage())
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        result = real(function(heatmap, mask=mask))
    del mask
    assert storage.expired()
    assert torch.equal(torch.autograd.grad(result.square().sum(), heatmap)[0], expected[0])


def real(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.covariance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [2, 8, 13, 24, 32, 48, 528, 1040])
@pytest.mark.parametrize("channels", [3, 4, 9, 12, 17, 25, 28, 30, 133])
@pytest.mark.parametrize("kind", ["shared", "of_samples", "of_maps"])
def test_masks_where_lanes_are_channels(device: str, kind: str, channels: int, width: int, dtype: torch.dtype) -> None:
    """Pixels one by one, and abreast in vectors that hold one, two, three or more of them; planes small and large."""
    shape = (2, channels, 5, width)
    heatmap = cases.channels_last(cases.random(shape).to(device, dtype)).requires_grad_()
    oracle = heatmap.detach().double().requires_grad_()
    of_mask = {"shared": (1, 1, 5, width), "of_samples": (2, 1, 5, width), "of_maps": shape}[kind]
    mask = torch.rand(of_mask, device=device) < 0.6
    mask[..., 2, :2] = True  # some pixel of every map
    rows = torch.tensor([[4], [5]], device=device)
    sizes = (rows, torch.tensor([[max(width - 3, 2)], [width]], device=device))
    near = 1e-12 if dtype == torch.float64 else 2e-6
    for valid_size in (None, sizes):
        expected = reference.soft_argmax2d(oracle, mask=mask, valid_size=valid_size)
        upstream = cases.upstream_of(expected)
        (want,) = torch.autograd.grad(expected, oracle, upstream)
        for lain in (mask, cases.channels_last(mask)):
            actual = kpfused.soft_argmax2d(heatmap, mask=lain, valid_size=valid_size)
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=near * max(width, 5))
            (got,) = torch.autograd.grad(actual, heatmap, upstream.to(dtype))
            torch.testing.assert_close(got.double(), want, rtol=5 * near, atol=near * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("less", [0, 3, 8])
@pytest.mark.parametrize("width", [16, 40, 56, 72, 130, 520, 1032])
def test_masks_along_rows(device: str, width: int, less: int, dtype: torch.dtype) -> None:
    """Rows with gaps, in map and mask, of whole vectors and not; a valid size of whole bytes of bits and not."""
    shape = (2, 3, 33, width)
    heatmap = cases.random((2, 3, 33, width + 5)).to(device)[..., 5:]
    mask = (torch.rand(2, 1, 33, width + 3, device=device) < 0.6)[..., 3:]
    mask[0, 0, 10:20] = True
    keywords: dict[str, Any] = {"mask": mask, "valid_size": (31, width - less)}
    counts = reference.counting(heatmap, mask, keywords["valid_size"])
    assert counts is not None
    heatmap = heatmap.masked_fill(~counts.expand(shape), torch.nan).to(dtype)
    beta = torch.tensor([1.0, -0.7, 2.0], dtype=torch.float64, device=device)
    expected = reference.soft_argmax2d(heatmap.double(), beta=beta, **keywords)
    got = kpfused.soft_argmax2d(heatmap, beta=beta.to(torch.promote_types(dtype, torch.float32)), **keywords)
    tolerance = {"atol": 1e-10, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 1e-3 * width / 100, "rtol": 1e-4}
    torch.testing.assert_close(got.double(), expected, **tolerance)


def test_no_maps_under_a_mask(device: str) -> None:
    heatmap = torch.zeros(0, 3, 8, 9, device=device, requires_grad=True)
    result = kpfused.soft_argmax2d(heatmap, mask=torch.ones(8, 9, dtype=torch.bool, device=device))
    assert result.shape == (0, 3, 2)
    assert torch.autograd.grad(result.sum(), heatmap)[0].shape == heatmap.shape
