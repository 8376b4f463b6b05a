# SPDX-License-Identifier: MIT
"""Values and gradients of soft_argmax2d against the float64 reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kpfused
from kpfused import kernels, ops, reference
from tests import cases


def check(heatmap: Tensor, beta: Tensor | float = 1.0, coordinates: str = "pixel") -> None:
    """Forward and backward of one heatmap, whose memory layout and dtype are part of the case."""
    height, width = heatmap.shape[-2:]
    before = heatmap.clone()
    actual = kpfused.soft_argmax2d(heatmap, beta, coordinates=coordinates)
    expected = cases.oracle(heatmap, beta, coordinates)
    assert actual.shape == (*heatmap.shape[:-2], 2)
    assert actual.dtype == (torch.float64 if heatmap.dtype == torch.float64 else torch.float32)
    for axis, size in enumerate((width, height)):
        scale = reference.coordinate_units(size, coordinates)[0]
        cases.assert_coordinates(actual[..., axis], expected[..., axis], size, scale)
    got = cases.gradients(kpfused.soft_argmax2d, heatmap, beta, coordinates=coordinates)
    want = cases.gradients(cases.oracle, heatmap.double(), beta, coordinates)
    assert got.dtype == heatmap.dtype
    # beta multiplies the gradient, and so the rounding of a coordinate in it.
    sharpness = max(1.0, float(abs(beta))) if not isinstance(beta, Tensor) else 1.0
    cases.assert_gradients(got, want, max(height, width) * sharpness)
    torch.testing.assert_close(heatmap, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_shapes_layouts_and_dtypes(device: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    check(cases.LAYOUTS[layout](cases.random(shape).to(device, dtype)))


@pytest.mark.parametrize("kind", cases.FINITE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (2, 5, 16, 24), (1, 2, 128, 130)], ids=str)
def test_kinds_of_maps(device: str, kind: str, layout: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(cases.LAYOUTS[layout](cases.FINITE[kind](shape).to(device, dtype)))


@pytest.mark.parametrize("coordinates", reference.COORDINATES)
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 1, 6), (2, 3, 6, 1), (2, 3, 12, 20)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_coordinates(device: str, coordinates: str, shape: tuple[int, ...], layout: str) -> None:
    check(cases.LAYOUTS[layout](cases.peaked(shape).float().to(device)), 0.7, coordinates)


def test_coordinates_are_what_the_table_says(device: str) -> None:
    """A single certain pixel, (x, y) = (3, 1) on a map 5 wide and 4 high, in every convention."""
    heatmap = torch.full((4, 5), -torch.inf, device=device)
    heatmap[1, 3] = 0
    expected = {
        "pixel": (3, 1),
        "corners": (2 * 3 / 4 - 1, 2 * 1 / 3 - 1),
        "centers": (7 / 5 - 1, 3 / 4 - 1),
        "unit": (3 / 5, 1 / 4),
        "unit_centered": (3 / 5 - 0.5, 1 / 4 - 0.5),
    }
    for coordinates, point in expected.items():
        actual = kpfused.soft_argmax2d(heatmap, coordinates=coordinates)
        torch.testing.assert_close(actual.cpu(), torch.tensor(point, dtype=torch.float32))


def test_numbers_of_numpy(device: str) -> None:
    heatmap = cases.random((2, 3, 5, 6)).to(device)
    assert torch.equal(kpfused.soft_argmax2d(heatmap, np.float32(2)), kpfused.soft_argmax2d(heatmap, 2.0))
    halved = kpfused.soft_argmax2d(heatmap, temperature=np.int64(2))
    assert torch.equal(halved, kpfused.soft_argmax2d(heatmap, 0.5))


@pytest.mark.parametrize("settings", [{"beta": 1e30}, {"beta": -1e30}, {"temperature": 1e-30}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_largest_beta_is_an_argmax(device: str, settings: dict[str, float], layout: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 20, 300)).float().to(device)).requires_grad_()
    got = kpfused.soft_argmax2d(heatmap, **settings)
    sign = -1 if settings.get("beta", 1) < 0 else 1
    at = (sign * heatmap).flatten(2).argmax(-1)
    assert torch.equal(got, torch.stack((at % 300, at // 300), -1).float())
    got.sum().backward()
    assert heatmap.grad is not None
    assert torch.count_nonzero(heatmap.grad) == 0


@pytest.mark.parametrize("beta", [0.0, 1e-3, 3.0, -2.0, 100.0, -1e3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_beta_number(device: str, beta: float, layout: str) -> None:
    check(cases.LAYOUTS[layout](cases.random((2, 5, 12, 16)).float().to(device)), beta)


BETA_SHAPES = [(), (1,), (5,), (2, 1), (2, 5), (1, 5), (3, 1, 1), (3, 1, 5), (3, 2, 1), (1, 2, 1)]


@pytest.mark.parametrize("beta_shape", BETA_SHAPES, ids=str)
@pytest.mark.parametrize("name", ["beta", "temperature"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_beta_tensor(device: str, beta_shape: tuple[int, ...], name: str, layout: str, dtype: torch.dtype) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((3, 2, 5, 6, 8)).to(device, dtype))
    tensor = (torch.rand(beta_shape, dtype=torch.float64) + 0.5).to(device).requires_grad_()
    result = kpfused.soft_argmax2d(heatmap, **{name: tensor})
    expected = cases.oracle(heatmap, tensor if name == "beta" else 1 / tensor)
    cases.assert_coordinates(result, expected, 8)
    upstream = cases.upstream_of(result)
    (actual_grad,) = torch.autograd.grad(result, tensor, upstream.to(result.dtype))
    (expected_grad,) = torch.autograd.grad(expected, tensor, upstream)
    assert actual_grad.shape == tensor.shape
    cases.assert_gradients(actual_grad.to(result.dtype), expected_grad)


def test_beta_gradient_is_finite_beside_masked_pixels(device: str) -> None:
    heatmap = cases.masked((3, 4, 9)).float().to(device)
    for value in (2.0, 0.0):
        beta = torch.tensor(value, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(kpfused.soft_argmax2d(heatmap, beta).sum(), beta)
        (expected,) = torch.autograd.grad(cases.oracle(heatmap, beta).sum(), beta)
        assert grad.isfinite()
        torch.testing.assert_close(grad, expected.float())


def eager(heatmap: Tensor) -> Tensor:
    """The composition people use today, in float32."""
    height, width = heatmap.shape[-2:]
    probability = torch.softmax(heatmap.float().flatten(-2), -1).view(heatmap.shape)
    x = (probability.sum(-2) * torch.arange(width, device=heatmap.device)).sum(-1)
    y = (probability.sum(-1) * torch.arange(height, device=heatmap.device)).sum(-1)
    return torch.stack((x, y), -1)


@pytest.mark.parametrize("kind", cases.FINITE)
@pytest.mark.parametrize("shape", [(64, 7, 9), (64, 48, 64), (32, 96, 72), (8, 256, 256)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_never_less_exact_than_eager_float32(device: str, kind: str, shape: tuple[int, ...], layout: str) -> None:
    """Largest error over a batch. One and a half units in the last place of the largest coordinate are granted: below
    that, which of two correct results is nearer is a matter of the order of a sum."""
    heatmap = cases.LAYOUTS[layout](cases.FINITE[kind](shape).float().to(device))
    expected = cases.oracle(heatmap)
    ours = (kpfused.soft_argmax2d(heatmap).double() - expected).abs().max()
    theirs = (eager(heatmap).double() - expected).abs().max()
    floor = torch.finfo(torch.float32).eps * max(shape[1:]) * 1.5
    assert ours <= max(theirs, floor)
    want = cases.gradients(cases.oracle, heatmap.double())
    ours = (cases.gradients(kpfused.soft_argmax2d, heatmap).double() - want).abs().max()
    theirs = (cases.gradients(eager, heatmap).double() - want).abs().max()
    floor = 2 * torch.finfo(torch.float32).eps * (want.abs().max() + max(shape[1:]))
    assert ours <= max(theirs, floor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "peaked", "border_peaked", "flat", "masked"])
def test_half_precision_costs_the_rounding_of_the_input_only(device: str, dtype: torch.dtype, kind: str) -> None:
    """The result of a half map is that of the same values in float32, whose sums are cut elsewhere."""
    heatmap = cases.FINITE[kind]((4, 5, 64, 48)).to(device, dtype)
    half, single = kpfused.soft_argmax2d(heatmap), kpfused.soft_argmax2d(heatmap.float())
    cases.assert_coordinates(half, single.double(), 64)
    half_grad = cases.gradients(kpfused.soft_argmax2d, heatmap)
    single_grad = cases.gradients(kpfused.soft_argmax2d, heatmap.float())
    steps = 2 * torch.finfo(torch.float32).eps * single_grad.abs().max().item()
    torch.testing.assert_close(
        half_grad.float(), single_grad, rtol=torch.finfo(dtype).eps / 2, atol=steps + torch.finfo(dtype).tiny
    )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 6, 8), (3, 2, 3, 3), (1, 3, 128, 130)], ids=str)
def test_nan_and_inf_stay_in_their_map(device: str, poison: float, layout: str, shape: tuple[int, ...]) -> None:
    clean = cases.random(shape).float().to(device)
    heatmap = clean.clone()
    heatmap[0, 1, 1, 2] = poison
    heatmap = cases.LAYOUTS[layout](heatmap)
    result = kpfused.soft_argmax2d(heatmap)
    grad = cases.gradients(kpfused.soft_argmax2d, heatmap)
    expected = kpfused.soft_argmax2d(cases.LAYOUTS[layout](clean))
    others = torch.ones(shape[:2], dtype=torch.bool, device=device)
    others[0, 1] = False
    assert result[0, 1].isnan().all()
    assert grad[0, 1].isnan().all()
    assert torch.equal(result[others], expected[others])
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 2, 3, 3), (1, 2, 128, 130)], ids=str)
def test_map_without_weight_is_nan(device: str, layout: str, shape: tuple[int, ...]) -> None:
    heatmap = cases.random(shape).float().to(device)
    heatmap[0, 1] = -torch.inf
    heatmap = cases.LAYOUTS[layout](heatmap)
    result = kpfused.soft_argmax2d(heatmap)
    assert result[0, 1].isnan().all()
    assert result[0, 0].isfinite().all()
    assert cases.gradients(kpfused.soft_argmax2d, heatmap)[0, 1].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masked_pixels_get_exactly_zero_gradient(device: str, layout: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.masked((2, 3, 16, 24)).float().to(device))
    grad = cases.gradients(kpfused.soft_argmax2d, heatmap)
    assert (grad[heatmap == -torch.inf] == 0).all()
    assert grad.isfinite().all()


def test_infinite_logits_of_the_other_sign_with_negative_beta(device: str) -> None:
    heatmap = cases.random((2, 6, 8)).float().to(device)
    heatmap[0, 2, 3] = torch.inf
    heatmap[1, 2, 3] = -torch.inf
    result = kpfused.soft_argmax2d(heatmap, -1.0)
    finite = heatmap[0].clone()
    finite[2, 3] = 1e30
    torch.testing.assert_close(result[0], kpfused.soft_argmax2d(finite, -1.0))
    assert result[1].isnan().all()


@pytest.mark.parametrize("value", [3.4e38, -3.4e38])
def test_logits_at_the_end_of_the_range(device: str, value: float) -> None:
    heatmap = torch.zeros(2, 6, 8, device=device)
    heatmap[:, 2, 3] = value
    check(heatmap, 1.0)
    check(heatmap, -1.0)


def test_no_maps_in_a_layout_that_does_not_fold(device: str) -> None:
    heatmap = torch.empty(2, 3, 0, 8, 8, device=device).transpose(0, 1)
    assert kpfused.soft_argmax2d(heatmap).shape == (3, 2, 0, 2)


def test_overlapping_windows(device: str) -> None:
    """Both a row and the keypoints of a pixel are dense in the heatmap, but not in its gradient."""
    base = cases.random((7, 40)).float().to(device)
    check(base.unfold(1, 20, 1)[:, :3].permute(1, 0, 2))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)], ids=str)
def test_no_maps(device: str, shape: tuple[int, ...]) -> None:
    heatmap = torch.empty(shape, device=device, requires_grad=True)
    beta = torch.ones((), device=device, requires_grad=True)
    result = kpfused.soft_argmax2d(heatmap, beta)
    assert result.shape == (*shape[:2], 2)
    result.sum().backward()
    assert heatmap.grad is not None
    assert heatmap.grad.shape == shape
    assert beta.grad == 0


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (3, 17, 12, 20), (2, 3, 256, 256)], ids=str)
def test_a_map_gives_the_same_bits_alone_and_in_a_batch(device: str, layout: str, shape: tuple[int, ...]) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random(shape).float().to(device))
    alone = cases.LAYOUTS[layout](heatmap[-1:].clone(memory_format=torch.contiguous_format))
    together, single = kpfused.soft_argmax2d(heatmap), kpfused.soft_argmax2d(alone)
    assert torch.equal(together[-1:], single)
    upstream = cases.upstream_of(together)
    many = cases.gradients(kpfused.soft_argmax2d, heatmap, upstream=upstream)
    one = cases.gradients(kpfused.soft_argmax2d, alone, upstream=upstream[-1:])
    assert torch.equal(many[-1:], one)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(32, 17, 16, 12), (1, 1, 512, 512)], ids=str)
def test_threads_do_not_change_bits(layout: str, shape: tuple[int, ...]) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random(shape).float())
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            beta = torch.tensor(1.3, requires_grad=True)
            leaf = heatmap.detach().requires_grad_()
            result = kpfused.soft_argmax2d(leaf, beta)
            grads = torch.autograd.grad(result.sum(), (leaf, beta))
            results.append((result.detach(), *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_gradient_has_the_memory_format_of_the_heatmap(device: str, layout: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 5, 8, 12)).float().to(device))
    assert cases.gradients(kpfused.soft_argmax2d, heatmap).stride() == torch.empty_like(heatmap).stride()


def test_expanded_heatmap_and_expanded_upstream(device: str) -> None:
    check(cases.random((1, 3, 6, 8)).float().to(device).expand(4, 3, 6, 8))
    heatmap = cases.random((2, 3, 6, 8)).float().to(device).requires_grad_()
    kpfused.soft_argmax2d(heatmap).sum().backward()
    expected = cases.gradients(cases.oracle, heatmap.double(), upstream=torch.ones(2, 3, 2, device=device))
    assert heatmap.grad is not None
    cases.assert_gradients(heatmap.grad, expected)


def test_strided_upstream(device: str) -> None:
    heatmap = cases.random((2, 3, 6, 8)).float().to(device)
    upstream = torch.randn(2, 2, 3, device=device).movedim(1, 2)
    assert not upstream.is_contiguous()
    actual = cases.gradients(kpfused.soft_argmax2d, heatmap, upstream=upstream)
    torch.testing.assert_close(
        actual, cases.gradients(kpfused.soft_argmax2d, heatmap, upstream=upstream.contiguous()), rtol=0, atol=0
    )


def test_which_devices_have_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning where CUDA tensors could have one, which a compiler is spared."""
    cuda: Any = SimpleNamespace(is_cpu=False, is_cuda=True, is_meta=False, device=torch.device("cuda"))
    other: Any = SimpleNamespace(is_cpu=False, is_cuda=False, is_meta=False, device=torch.device("mps"))
    assert not ops.takes_composition(torch.ones(3, 3), compiling=False)
    assert not ops.takes_composition(torch.ones(3, 3, device="meta"), compiling=False)
    assert ops.takes_composition(other, compiling=False)
    monkeypatch.setattr(ops, "HAS_CUDA", True)
    assert not ops.takes_composition(cuda, compiling=False)
    monkeypatch.setattr(ops, "HAS_CUDA", False)
    ops._warn_of_slow_path.cache_clear()
    assert ops.takes_composition(cuda, compiling=True)
    with pytest.warns(UserWarning, match="built without CUDA kernels"):
        assert ops.takes_composition(cuda, compiling=False)
    assert ops.takes_composition(cuda, compiling=False)


def test_devices_without_a_kernel_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    heatmap, beta = cases.random((2, 3, 4, 5)).float(), torch.rand(3)
    monkeypatch.setattr(ops, "takes_composition", lambda *_: True)
    for name in ("eager", "launch_forward"):
        monkeypatch.setattr(kernels.SOFT_ARGMAX2D, name, None)
    heatmap.requires_grad_()
    actual = kpfused.soft_argmax2d(heatmap, beta, coordinates="unit")
    assert torch.equal(actual, reference.soft_argmax2d(heatmap, beta, coordinates="unit"))
    assert torch.equal(kpfused.soft_argmax2d(heatmap, 2.0), reference.soft_argmax2d(heatmap, 2.0))
