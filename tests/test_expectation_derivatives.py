# SPDX-License-Identifier: MIT
"""Derivatives of expectations and of the softmax map: gradcheck in slow mode, transforms, forward mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import kpfused
from kpfused import reference
from tests import cases
from tests.expectations import FUNCTIONS, VALUES, inputs_of


@pytest.mark.parametrize("beta_shape", [(), (3,), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(device: str, name: str, layout: str, beta_shape: tuple[int, ...]) -> None:
    mine, _ = FUNCTIONS[name]
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 4, 3)).to(device))
    beta = (torch.rand(beta_shape, dtype=torch.float64, device=device) + 0.5) * -1
    for kind in VALUES if name == "expectation" else ("image",):
        if kind == "many":
            continue
        inputs = tuple(t.requires_grad_() for t in (*inputs_of(name, heatmap, kind), beta))
        assert gradcheck(mine, inputs)
        assert gradgradcheck(mine, inputs)


def test_gradcheck_with_masks(device: str) -> None:
    mask = torch.rand(4, 5, device=device) < 0.7
    heatmap = cases.random((2, 3, 4, 5)).to(device).requires_grad_()
    values = cases.random((2, 1, 2, 4, 5)).to(device).requires_grad_()
    sizes = (torch.tensor([[4], [3]], device=device), 4)
    for keywords in ({"mask": mask}, {"valid_size": sizes}, {"mask": mask, "valid_size": sizes}):
        assert gradcheck(lambda h, v, k=keywords: kpfused.spatial_expectation2d(h, v, **k), (heatmap, values))
        assert gradgradcheck(lambda h, v, k=keywords: kpfused.spatial_expectation2d(h, v, **k), (heatmap, values))
    numbers = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64, device=device)
    empty = (torch.arange(3, device=device) > 0)[:, None, None]  # nothing of the first keypoint counts
    last = (cases.random((2, 3, 4, 5)).to(device) > 0) & empty
    for keywords in (
        {},
        {"beta": numbers},
        {"mask": mask},
        {"valid_size": sizes, "beta": -1.5},
        {"mask": last, "valid_size": sizes, "empty_value": 0.5, "beta": numbers},
        {"empty_value": 0.0},
    ):
        assert gradcheck(lambda h, k=keywords: kpfused.spatial_softmax2d(h, **k), heatmap)
        assert gradgradcheck(lambda h, k=keywords: kpfused.spatial_softmax2d(h, **k), heatmap)


def test_nested_derivatives_of_the_softmax(device: str) -> None:
    """Of its own result: the inner gradient is the heatmap's alone, the outer one beta's too, backward and forward."""
    heatmap, weight = cases.random((2, 4, 5)).to(device), cases.random((2, 4, 5)).to(device)
    beta, mask = torch.tensor([0.7, -1.3], dtype=torch.float64, device=device), torch.rand(4, 5, device=device) < 0.7

    def nested(softmax: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        def loss(h: Tensor, b: Tensor) -> Tensor:
            return (softmax(h, b, mask=mask) * weight).square().sum()

        def slope(h: Tensor, b: Tensor) -> Tensor:
            return torch.func.grad(loss)(h, b)

        of_heatmap, of_beta = torch.func.jacrev(slope, (0, 1))(heatmap, beta)
        forward = torch.func.jacfwd(slope, (0, 1))(heatmap, beta)
        leaf, number = heatmap.clone().requires_grad_(), beta.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf, beta), leaf, create_graph=True)
        (eager,) = torch.autograd.grad((first * weight).sum(), leaf)
        (first,) = torch.autograd.grad(loss(leaf, number), leaf, create_graph=True)
        return of_heatmap, of_beta, *forward, eager, *torch.autograd.grad((first * weight).sum(), (leaf, number))

    for got, want in zip(nested(kpfused.spatial_softmax2d), nested(reference.spatial_softmax2d), strict=True):
        torch.testing.assert_close(got, want)


def test_only_what_is_asked_for(device: str) -> None:
    """A tensor without a gradient gets none; the others theirs."""
    tensors = [cases.random((2, 3, 4, 5)), cases.random((2, 3, 2, 4, 5)), torch.tensor([0.5, -1.0, 2.0]).double()]
    for wanted in range(1, 8):
        leaves = [t.to(device).requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
        used = [t for t in leaves if t.requires_grad]
        pairs = [
            torch.autograd.grad(f(*leaves).square().sum(), used)
            for f in (kpfused.spatial_expectation2d, reference.spatial_expectation2d)
        ]
        for got, want in zip(*pairs, strict=True):
            torch.testing.assert_close(got, want)


def test_second_derivatives_of_what_comes_along(device: str) -> None:
    """The gradient of the heatmap comes with that of beta, and is differentiable even where it was not asked for."""
    heatmap, values = cases.random((2, 3, 4, 5)).to(device), cases.random((2, 3, 2, 4, 5)).to(device)
    heatmap.requires_grad_()
    beta = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    ops = torch.ops.kpfused
    mean, stats = (t.detach() for t in ops.spatial_expectation2d(heatmap, values, beta, 0.0))
    grad = torch.randn_like(mean)
    second = []
    for needs in ((True, False, True), (False, False, True)):
        first = ops.spatial_expectation2d_backward(grad, heatmap, values, mean, stats, beta, 0.0, *needs)
        assert first[1] is None
        second += torch.autograd.grad(first[0].square().sum(), heatmap)
    assert second[0].abs().max() > 0
    assert torch.equal(*second)


def test_transforms(device: str) -> None:
    heatmap, values = cases.random((4, 3, 5, 6)).to(device), cases.random((4, 2, 5, 6)).to(device)

    def mean(h: Tensor, v: Tensor) -> Tensor:
        return kpfused.spatial_expectation2d(h, v, 1.5)

    def points(h: Tensor) -> Tensor:
        return kpfused.expectation2d(kpfused.spatial_softmax2d(h, 1.5), coordinates="centers")

    def plain_points(h: Tensor) -> Tensor:
        return reference.soft_argmax2d(h, 1.5, coordinates="centers")

    vmapped = torch.vmap(mean)(heatmap, values)
    torch.testing.assert_close(vmapped, kpfused.spatial_expectation2d(heatmap, values[:, None], 1.5))
    torch.testing.assert_close(torch.vmap(points)(heatmap), plain_points(heatmap))
    torch.testing.assert_close(torch.vmap(points, in_dims=1, out_dims=1)(heatmap), plain_points(heatmap))
    for transform in (torch.func.jacrev, torch.func.jacfwd, lambda f: torch.func.grad(lambda h: f(h).square().sum())):
        torch.testing.assert_close(transform(points)(heatmap), transform(plain_points)(heatmap))
        torch.testing.assert_close(torch.vmap(transform(points))(heatmap), torch.vmap(transform(plain_points))(heatmap))
    tangents = torch.randn_like(heatmap), torch.randn_like(values)
    for got, want in zip(
        torch.func.jvp(mean, (heatmap[0], values[0]), tuple(t[0] for t in tangents)),
        torch.func.jvp(
            lambda h, v: reference.spatial_expectation2d(h, v, 1.5),
            (heatmap[0], values[0]),
            tuple(t[0] for t in tangents),
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_dual_upstream_of_an_earlier_call(device: str) -> None:
    """The tangent passes through the backward of a call made outside the dual level."""
    leaves = [
        t.to(device).requires_grad_()
        for t in (cases.random((2, 3, 4, 5)), cases.random((2, 1, 2, 4, 5)), cases.random((3,)))
    ]
    upstream = torch.randn(2, 2, 3, 2, dtype=torch.float64).to(device)
    results = []
    for f in (kpfused.spatial_expectation2d, reference.spatial_expectation2d):
        expectation = f(*leaves)
        with forward_ad.dual_level():
            found = torch.autograd.grad(expectation, leaves, forward_ad.make_dual(upstream[0], upstream[1]))
            results.append([forward_ad.unpack_dual(g).tangent for g in found])
    assert all(tangent is not None for tangent in results[1])
    torch.testing.assert_close(results[0], results[1])
