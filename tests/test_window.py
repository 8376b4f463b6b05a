# SPDX-License-Identifier: MIT
"""The probability within a window, against the float64 reference, which sums the whole map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kpfused
from kpfused import reference
from tests import cases
from tests.cases import PIXELS, on


def maps(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Maps whose means lie off the border between two pixels, where float32 may round to the other."""

    def at_border(heatmap: Tensor) -> Tensor:
        mean = reference.soft_argmax2d(heatmap.double())
        return ((mean - mean.floor() - 0.5).abs() < 1e-3).any(-1)[..., None, None]

    heatmap = cases.random(shape).to(dtype)
    while at_border(heatmap).any():
        heatmap = torch.where(at_border(heatmap), cases.random(shape).to(dtype), heatmap)
    return heatmap


def check(heatmap: Tensor, size: int, *args: Any, **kwargs: Any) -> None:
    """The mass, and its gradient in the memory format of the heatmap."""
    leaf = heatmap.detach().requires_grad_()
    oracle = heatmap.double().detach().requires_grad_()
    actual = kpfused.window_mass(leaf, size, *args, **kwargs)
    expected = reference.window_mass(oracle, size, *args, **kwargs)
    eps = torch.finfo(actual.dtype).eps
    assert actual.dtype == torch.promote_types(heatmap.dtype, torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=40 * eps, atol=4 * eps, equal_nan=True)
    upstream = cases.upstream_of(actual)
    (gradient,) = torch.autograd.grad(actual, leaf, upstream.to(actual.dtype))
    (wanted,) = torch.autograd.grad(expected, oracle, upstream)
    cases.assert_gradients(gradient, wanted, size=1)  # of a certain window the gradient is nothing but rounding
    assert gradient.stride() == torch.empty_like(heatmap).stride()


@pytest.mark.parametrize("around", ["mean", "peak"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("size", [1, 5, 41])
def test_against_the_reference(device: str, size: int, layout: str, dtype: torch.dtype, around: str) -> None:
    for shape in [(2, 3, 7, 9), (1, 17, 24, 32), (2, 1, 1, 1)]:
        check(cases.LAYOUTS[layout](maps(shape, dtype).to(device)), size, around=around)


@pytest.mark.parametrize("around", ["mean", "peak"])
@pytest.mark.parametrize("empty_value", [None, -1.0])
@pytest.mark.parametrize("pixels", PIXELS)
def test_pixels_that_do_not_count(device: str, pixels: str, empty_value: float | None, around: str) -> None:
    torch.manual_seed(0)
    shape = (2, 3, 12, 17)
    keywords = on(device, PIXELS[pixels](shape))
    heatmap = cases.random(shape).to(device)  # float64: the mean may lie anywhere
    check(heatmap, 3, -0.7, around=around, empty_value=empty_value, **keywords)


@pytest.mark.parametrize("shape", [(9, 11), (4, 9, 11), (2, 1, 3, 9, 11)], ids=str)
def test_any_leading_dimensions(device: str, shape: tuple[int, ...]) -> None:
    check(maps(shape).to(device), 5, torch.tensor(0.5, device=device))


@pytest.mark.parametrize("kind", ["offset_1e4", "spread_1e4", "masked", "border_peaked"])
def test_kinds_of_maps(device: str, kind: str) -> None:
    check(cases.FINITE[kind]((2, 5, 24, 32)).float().to(device), 5, around="peak")


def test_all_of_the_map_is_certain(device: str) -> None:
    heatmap = cases.random((2, 3, 9, 11)).float().to(device)
    torch.testing.assert_close(kpfused.window_mass(heatmap, 21), torch.ones(2, 3, device=device))
    flat = torch.zeros(1, 9, 11, device=device)
    torch.testing.assert_close(kpfused.window_mass(flat, 3), torch.full((1,), 9 / 99, device=device))


def test_beta_and_temperature(device: str) -> None:
    heatmap = maps((2, 3, 9, 11), torch.float64).to(device)
    heatmap[0, 0, 0] = -torch.inf  # of no weight, and no part of beta's gradient
    beta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    results = []
    for function in (kpfused.window_mass, reference.window_mass):
        leaf = beta.clone().requires_grad_()
        mass = function(heatmap, 3, leaf, around="peak")
        results.append((mass.detach(), *torch.autograd.grad(mass, leaf, cases.upstream_of(mass))))
    torch.testing.assert_close(results[0], results[1])
    by_temperature = kpfused.window_mass(heatmap, 3, temperature=1 / beta, around="peak")
    torch.testing.assert_close(by_temperature, results[0][0])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_map(device: str, poison: float) -> None:
    heatmap = maps((2, 3, 9, 11)).to(device)
    expected = kpfused.window_mass(heatmap, 3)
    heatmap[1, 2, 3, 4] = poison
    actual = kpfused.window_mass(heatmap, 3)
    assert actual[1, 2].isnan()
    assert torch.equal(actual.flatten()[:-1], expected.flatten()[:-1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_map_of_nan_has_no_mass_where_nothing_counts(device: str, layout: str) -> None:
    """The mean is no number either, and what stands for it is the first pixel, around which nothing counts."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 9, 11)).float().to(device))
    heatmap[1, 2, 8, 8] = torch.nan
    mask = torch.ones(9, 11, dtype=torch.bool, device=device)
    mask[:2, :2] = False
    mass = kpfused.window_mass(heatmap, 3, mask=mask, empty_value=-1.0)
    assert mass[1, 2].isnan()
    assert mass.flatten()[:-1].isfinite().all()


def test_backward_with_dbeta_of_split_maps(device: str) -> None:
    """Each map in several parts, forward and backward."""
    for layout in ("contiguous", "channels_last"):
        heatmap = cases.LAYOUTS[layout](maps((1, 2, 300, 320)).to(device))
        beta = torch.tensor([0.5, 2.0], device=device)
        leaves = [t.clone().requires_grad_() for t in (heatmap, beta)]
        oracles = [t.double().requires_grad_() for t in (heatmap, beta)]
        mass = kpfused.window_mass(leaves[0], 99, leaves[1], around="peak")
        expected = reference.window_mass(oracles[0], 99, oracles[1], around="peak")
        torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=0)
        upstream = cases.upstream_of(mass)
        gradients = torch.autograd.grad(mass, leaves, upstream.float())
        wanted = torch.autograd.grad(expected, oracles, upstream)
        cases.assert_gradients(gradients[0], wanted[0])
        # Over 96000 pixels, both signs nearly cancel.
        torch.testing.assert_close(gradients[1].double(), wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "around", "error"),
    [(4, "mean", ValueError), (0, "mean", ValueError), (-3, "mean", ValueError), (3, "median", ValueError),
     (3.0, "mean", TypeError), (True, "mean", TypeError)],
)  # fmt: skip
def test_bad_windows(size: Any, around: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"window|around"):
        kpfused.window_mass(torch.zeros(1, 1, 4, 4), size, around=around)


def test_opcheck(device: str) -> None:
    heatmap = maps((2, 3, 9, 11)).to(device)
    heatmap.requires_grad_()
    beta = torch.tensor([0.5, 1.0, 2.0], device=device, requires_grad=True)
    mask = torch.rand(9, 11, device=device).expand(heatmap.shape) < 0.8
    for window, pixels in ((5, ()), (-5, (mask, None, 0.0))):
        torch.library.opcheck(torch.ops.kpfused.window_mass2d.default, (heatmap, beta, 0.0, window, *pixels))
    with pytest.raises(RuntimeError, match="window"):
        torch.ops.kpfused.window_mass2d(heatmap, beta, 0.0, 4)


def test_derivatives(device: str) -> None:
    heatmap = maps((2, 2, 4, 5), torch.float64).to(device).requires_grad_()
    beta = torch.tensor([0.5, 1.5], dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).to(device) < 0.8

    def mass(heatmap: Tensor, beta: Tensor) -> Tensor:
        return kpfused.window_mass(heatmap, 3, beta, around="peak", mask=mask)

    assert torch.autograd.gradcheck(mass, (heatmap, beta), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(mass, (heatmap, beta))


def test_transforms(device: str) -> None:
    heatmap = maps((4, 3, 9, 11), torch.float64).to(device)
    mass = torch.vmap(lambda h: kpfused.window_mass(h, 3))(heatmap)
    torch.testing.assert_close(mass, kpfused.window_mass(heatmap, 3))
    gradient = torch.vmap(torch.func.grad(lambda h: kpfused.window_mass(h, 3).sum()))(heatmap)
    leaf = heatmap.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(kpfused.window_mass(leaf, 3).sum(), leaf)[0])


def test_compiled(device: str) -> None:
    program = torch.compile(lambda h: kpfused.window_mass(h, 3), fullgraph=True, dynamic=True)
    for step, shape in enumerate([(2, 3, 9, 11), (4, 3, 12, 17)]):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            leaf = maps(shape).to(device).requires_grad_()
            other = leaf.detach().clone().requires_grad_()
            got, want = program(leaf), kpfused.window_mass(other, 3)
            torch.testing.assert_close(got, want)
            got.sum().backward()
            want.sum().backward()
            torch.testing.assert_close(leaf.grad, other.grad)


def test_exported(device: str) -> None:
    class Confidence(torch.nn.Module):
        def forward(self, heatmap: Tensor) -> Tensor:
            return kpfused.window_mass(heatmap, 5)

    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(Confidence(), (maps((2, 3, 9, 11)).to(device),), dynamic_shapes=(dims,))
    heatmap = maps((3, 3, 12, 17)).to(device)
    torch.testing.assert_close(program.module()(heatmap), kpfused.window_mass(heatmap, 5))


@pytest.mark.parametrize("shape", [(16, 17, 24, 32), (64, 17, 7, 9), (8, 1, 600, 600)], ids=str)
def test_a_mass_is_at_most_one(device: str, shape: tuple[int, ...]) -> None:
    """Which rounding would exceed in places, and losses that take its logarithm refuse."""
    heatmap = torch.randn(shape, device=device)
    for layout in cases.LAYOUTS.values():
        for sharpness in (1.0, 100.0):
            mass = kpfused.window_mass(layout(heatmap * sharpness), 9999)
            assert (mass <= 1).all()
            torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
    # Not so what empty maps give.
    heatmap[0] = -torch.inf
    assert (kpfused.window_mass(heatmap, 3, empty_value=2.0)[0] == 2).all()
