# SPDX-License-Identifier: MIT
"""spatial_moments2d against the float64 reference: fields, gradients, sharp maps and degenerate ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kpfused
from kpfused import SpatialMoments, reference
from tests import cases

FIELDS = [name for name in SpatialMoments._fields if name != "peak"]


def check(heatmap: Tensor, beta: Tensor | float = 1.0, coordinates: str = "pixel") -> None:
    """Every field, and the gradient of a mixture of them."""
    oracle, wide = heatmap.detach().double().requires_grad_(), beta.double() if isinstance(beta, Tensor) else beta
    leaf = heatmap.detach().requires_grad_()
    expected = reference.spatial_moments2d(oracle, wide, coordinates=coordinates)
    actual = kpfused.spatial_moments2d(leaf, beta, coordinates=coordinates)
    cases.assert_moments(actual, expected, *heatmap.shape[-2:])
    (grad,) = torch.autograd.grad(cases.mixture(actual), leaf)
    (wanted,) = torch.autograd.grad(cases.mixture(expected), oracle)
    assert grad.stride() == torch.empty_like(heatmap).stride()
    # The square of a distance across the map is what the covariance's gradient rounds.
    cases.assert_gradients(grad, wanted, max(heatmap.shape[-2:]) ** 2 * 4 if coordinates == "pixel" else 8)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_shapes_layouts_and_dtypes(device: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    # The gradient of a long map's covariance in pixels is beyond float16.
    units = "unit" if dtype == torch.float16 else "pixel"
    check(cases.LAYOUTS[layout](cases.random(shape).to(dtype).to(device)), coordinates=units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 17, 24, 32), (1, 2, 256, 256)], ids=str)
@pytest.mark.parametrize("kind", ["random", "flat", "peaked", "two_peaked", "masked"])
def test_kinds_of_maps(device: str, kind: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    check(cases.LAYOUTS[layout](cases.FINITE[kind](shape).to(dtype).to(device)))


@pytest.mark.parametrize("coordinates", reference.COORDINATES)
@pytest.mark.parametrize("beta", [-1.5, 0.25, 3.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_coordinates_and_beta(device: str, layout: str, beta: float, coordinates: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 9, 12, 20)).float().to(device))
    expected = reference.spatial_moments2d(heatmap.double(), beta, coordinates=coordinates)
    actual = kpfused.spatial_moments2d(heatmap, beta, coordinates=coordinates)
    for name in FIELDS:
        want = getattr(expected, name)
        atol = 2e-6 * max(1.0, want.abs().max().item())  # covariances of x and y cancel
        torch.testing.assert_close(getattr(actual, name).double(), want, rtol=2e-5, atol=atol)
    assert torch.equal(actual.peak, expected.peak)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 17, 24, 20), (1, 1, 256, 300)], ids=str)
def test_one_field_alone(device: str, shape: tuple[int, ...], layout: str, name: str) -> None:
    """Its gradient, with respect to beta too; the other gradients are absent, not zero."""
    heatmap = cases.LAYOUTS[layout](cases.random(shape).to(device))
    beta = torch.rand(shape[1], dtype=torch.float64, device=device) + 0.5
    grads = []
    for function in (kpfused.spatial_moments2d, reference.spatial_moments2d):
        leaves = heatmap.detach().requires_grad_(), beta.detach().requires_grad_()
        field = getattr(function(*leaves, coordinates="unit"), name)
        grads.append(torch.autograd.grad(field, leaves, cases.upstream_of(field)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("centre", [(0.5, 0.5), (254.5, 0.5), (0.5, 254.5), (254.5, 254.5), (128.5, 254.5)], ids=str)
def test_a_sharp_peak_at_the_border_keeps_its_covariance(
    device: str, centre: tuple[float, float], layout: str, dtype: torch.dtype
) -> None:
    """0.1 px of standard deviation, between pixels, so that it is not that of one pixel."""
    y, x = torch.meshgrid(*(torch.arange(256, dtype=torch.float64),) * 2, indexing="ij")
    logits = -((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 0.1**2)
    shifted = torch.stack((logits, logits + 0.7 * (x > centre[0]) - 0.3 * (y > centre[1])))[None]
    heatmap = cases.LAYOUTS[layout](shifted.to(dtype).to(device))
    expected = reference.spatial_moments2d(heatmap.double())
    actual = kpfused.spatial_moments2d(heatmap)
    assert expected.covariance.diagonal(dim1=-2, dim2=-1).min() > 0.1
    torch.testing.assert_close(actual.covariance.double(), expected.covariance, rtol=1e-4, atol=1e-6)


@given(st.data())
def test_no_variance_is_negative(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    values = data.draw(st.lists(st.floats(-1e4, 1e4, width=32), min_size=height * width, max_size=height * width))
    heatmap = torch.tensor(values).view(height, width)
    for maps in (heatmap, heatmap.expand(9, -1, -1).movedim(0, -1).contiguous().movedim(-1, 0)):
        assert (kpfused.spatial_moments2d(maps).covariance.diagonal(dim1=-2, dim2=-1) >= 0).all()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 3), (1, 9, 40, 33), (2, 17, 24, 48), (1, 2, 300, 300), (1, 1, 1, 20000)], ids=str
)
def test_of_equal_peaks_the_first_in_row_order(device: str, shape: tuple[int, ...], layout: str) -> None:
    for levels in (1, 2, 4):
        values = torch.randint(levels, shape).double()
        heatmap = cases.LAYOUTS[layout](values.float().to(device))
        for beta in (1.0, -1.0):
            expected = reference.spatial_moments2d(values, beta).peak
            assert torch.equal(kpfused.spatial_moments2d(heatmap, beta).peak.cpu(), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("beta", [0.0, 1e-35, -1e-33])
@pytest.mark.parametrize("masked", [False, True])
def test_a_beta_near_zero_has_a_gradient(device: str, layout: str, beta: float, masked: bool) -> None:
    """Where products with it are below the smallest float32, which a device may flush to zero."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 64, 64)).to(device))
    mask = torch.ones(64, 64, dtype=torch.bool, device=device) if masked else None
    grads = []
    for maps, function in ((heatmap.float(), kpfused.spatial_moments2d), (heatmap, reference.spatial_moments2d)):
        leaf = torch.full((2, 3), beta, dtype=maps.dtype, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(function(maps, leaf, mask=mask).mean.sum(), leaf)
        grads.append(grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_the_smallest_negative_beta_turns_the_order_of_the_logits(device: str) -> None:
    heatmap = torch.tensor([[1.5, -0.25]], dtype=torch.float64, device=device)
    for moments in (kpfused.spatial_moments2d, reference.spatial_moments2d):
        assert moments(heatmap, -1e-200).peak.tolist() == [1, 0]
        assert moments(heatmap, torch.tensor(-1e-200, dtype=torch.float64, device=device)).peak.tolist() == [1, 0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_map(device: str, poison: float, layout: str) -> None:
    clean = cases.random((3, 5, 12, 10)).float().to(device)
    dirty = clean.clone()
    dirty[1, 2, 3, 4] = poison
    leaf = cases.LAYOUTS[layout](dirty).requires_grad_()
    actual, expected = kpfused.spatial_moments2d(leaf), kpfused.spatial_moments2d(cases.LAYOUTS[layout](clean))
    other = torch.ones(3, 5, dtype=torch.bool, device=device)
    other[1, 2] = False
    for name, got in actual._asdict().items():
        assert torch.equal(got[other], getattr(expected, name)[other])
        assert name == "peak" or got[1, 2].isnan().all()
    assert ((actual.peak >= 0) & (actual.peak < torch.tensor([10, 12], device=device))).all()
    (grad,) = torch.autograd.grad(cases.mixture(actual), leaf)
    assert grad.isnan()[1, 2].all()
    assert not grad[other].isnan().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 9, 3, 3), (1, 2, 256, 256)], ids=str)
def test_map_without_weight(device: str, shape: tuple[int, ...], layout: str) -> None:
    m = kpfused.spatial_moments2d(cases.LAYOUTS[layout](torch.full(shape, -torch.inf, device=device)))
    assert (m.peak == 0).all()
    assert (m.logsumexp == -torch.inf).all()
    for field in (m.mean, m.covariance, m.entropy, m.peak_probability):
        assert field.isnan().all()
    filled = kpfused.spatial_moments2d(torch.full(shape, -torch.inf, device=device), empty_value=-7.0)
    for field in cases.real_fields(filled):
        assert (field == -7).all()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (3, 17, 12, 20), (2, 3, 256, 256)], ids=str)
def test_a_map_gives_the_same_bits_alone_and_in_a_batch(device: str, layout: str, shape: tuple[int, ...]) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random(shape).float().to(device))
    alone = cases.LAYOUTS[layout](heatmap[-1:].clone(memory_format=torch.contiguous_format))
    for many, one in zip(kpfused.spatial_moments2d(heatmap), kpfused.spatial_moments2d(alone), strict=True):
        assert torch.equal(many[-1:], one)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_bits(layout: str) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = cases.LAYOUTS[layout](
                torch.linspace(-3, 3, 2 * 512 * 512).sin().view(1, 2, 512, 512)
            ).requires_grad_()
            moments = kpfused.spatial_moments2d(leaf)
            results.append((*moments, *torch.autograd.grad(cases.mixture(moments), leaf)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_mean_is_that_of_soft_argmax2d(device: str) -> None:
    heatmap = cases.random((4, 17, 64, 48)).float().to(device)
    cases.assert_coordinates(kpfused.spatial_moments2d(heatmap).mean, kpfused.soft_argmax2d(heatmap).double(), 64)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)], ids=str)
def test_no_maps(device: str, shape: tuple[int, ...]) -> None:
    leaf = torch.empty(shape, device=device, requires_grad=True)
    m = kpfused.spatial_moments2d(leaf)
    assert m.covariance.shape == (*shape[:2], 2, 2)
    cases.mixture(m).backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == shape


def fields_of(function: Callable[..., SpatialMoments], **keywords: object) -> Callable[..., list[Tensor]]:
    return lambda *inputs: cases.real_fields(function(*inputs, **keywords))


def op(heatmap: Tensor, beta: Tensor) -> list[Tensor]:
    return cases.real_fields(SpatialMoments(*torch.ops.kpfused.spatial_moments2d(heatmap, beta, 0.0, 2)[:-1]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("form", ["op", *reference.COORDINATES])
def test_gradcheck(device: str, form: str, layout: str) -> None:
    function = op if form == "op" else fields_of(kpfused.spatial_moments2d, coordinates=form)
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 4, 3)).to(device)).requires_grad_()
    beta = (torch.rand(3, dtype=torch.float64, device=device) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(function, (heatmap, beta))
    assert torch.autograd.gradgradcheck(function, (heatmap[:1, :2].detach().requires_grad_(), beta[:2]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)], ids=str)
def test_opcheck(device: str, layout: str, needs: tuple[bool, bool]) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 4, 5)).float().to(device)).requires_grad_(needs[0])
    beta = torch.rand(3, device=device).requires_grad_(needs[1])
    mask, size = heatmap.detach() > -1, torch.tensor([[[3, 4]], [[4, 5]]], device=device)
    for pixels in ((), (mask, None, 0.5), (None, size, None)):
        torch.library.opcheck(torch.ops.kpfused.spatial_moments2d.default, (heatmap, beta, 0.0, 1, *pixels))


def test_compiled_gives_the_same_bits(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(kpfused.spatial_moments2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        leaf = cases.random((batch, 3, 12, 10)).float().to(device).requires_grad_()
        got, want = compiled(leaf, 2.0), kpfused.spatial_moments2d(leaf, 2.0)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        gradients = [torch.autograd.grad(cases.mixture(m), leaf)[0] for m in (got, want)]
        assert torch.equal(*gradients)


def test_function_transforms(device: str) -> None:
    heatmap = cases.random((4, 3, 5, 6)).to(device)
    for got, want in zip(
        torch.vmap(kpfused.spatial_moments2d)(heatmap), reference.spatial_moments2d(heatmap), strict=True
    ):
        torch.testing.assert_close(got, want)

    def loss(function: Callable[..., SpatialMoments]) -> Callable[[Tensor], Tensor]:
        return lambda h: function(h).covariance.sum() + function(h).entropy.sum()

    mine, theirs = loss(kpfused.spatial_moments2d), loss(reference.spatial_moments2d)
    torch.testing.assert_close(torch.vmap(torch.func.grad(mine))(heatmap), torch.vmap(torch.func.grad(theirs))(heatmap))
    for got, want in zip(
        torch.func.jvp(mine, (heatmap,), (heatmap,)), torch.func.jvp(theirs, (heatmap,), (heatmap,)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_layer(device: str) -> None:
    layer = kpfused.SpatialMoments2d(2.0, learnable=True, num_keypoints=3, coordinates="corners").to(device)
    heatmap = cases.random((2, 3, 7, 9)).float().to(device)
    expected = kpfused.spatial_moments2d(heatmap, 2.0, coordinates="corners")
    for got, want in zip(layer(heatmap), expected, strict=True):
        torch.testing.assert_close(got, want)
    layer(heatmap).entropy.sum().backward()
    assert layer.log_beta.grad is not None
    assert set(layer.state_dict()) == {"log_beta"}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_lowest_number_may_be_the_peak(device: str, layout: str, dtype: torch.dtype, sign: int) -> None:
    """Of all pixels, and of a few among -inf, which weigh nothing."""
    heatmap = torch.full((2, 16, 6, 10), torch.finfo(dtype).min, dtype=dtype, device=device)
    few = torch.zeros(6, 10, dtype=torch.bool, device=device)
    few[[1, 1, 2, 4], [2, 3, 7, 6]] = True
    heatmap[1, :, ~few] = -torch.inf
    heatmap = cases.LAYOUTS[layout](sign * heatmap)
    moments = kpfused.spatial_moments2d(heatmap, float(sign))
    flat = kpfused.spatial_moments2d(
        torch.zeros(2, 16, 6, 10, dtype=dtype, device=device), mask=torch.stack((few | True, few))[:, None]
    )
    for field in ("mean", "covariance", "entropy", "peak", "peak_probability"):
        torch.testing.assert_close(getattr(moments, field), getattr(flat, field))
