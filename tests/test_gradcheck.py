# SPDX-License-Identifier: MIT
"""gradcheck in slow mode, float64: the op, the function and the layer, with respect to heatmap and beta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import kpfused
from kpfused import reference
from tests import cases

LAYOUTS = ["contiguous", "channels_last", "sliced"]
COORDINATES = reference.COORDINATES


def op(coordinates: str) -> Callable[[Tensor, Tensor], Tensor]:
    index = COORDINATES.index(coordinates)
    return lambda heatmap, beta: torch.ops.kpfused.soft_argmax2d(heatmap, beta, 0.0, index)[0]


def function(coordinates: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda heatmap, beta: kpfused.soft_argmax2d(heatmap, beta, coordinates=coordinates)


def layer(coordinates: str) -> Callable[[Tensor, Tensor], Tensor]:
    module = kpfused.SoftArgmax2d(beta=torch.ones(()), coordinates=coordinates).double()
    return lambda heatmap, beta: torch.func.functional_call(module, {"beta": beta}, (heatmap,))


FORMS = {f.__name__: f for f in (op, function, layer)}


def inputs(device: str, layout: str, beta_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 4, 5)).to(device)).detach().requires_grad_()
    beta = (torch.rand(beta_shape, dtype=torch.float64) + 0.5).to(device).requires_grad_()
    return heatmap, beta


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("beta_shape", [(), (3,), (2, 1)], ids=str)
def test_gradcheck(device: str, form: str, layout: str, coordinates: str, beta_shape: tuple[int, ...]) -> None:
    assert gradcheck(FORMS[form](coordinates), inputs(device, layout, beta_shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", [1.0, -0.7, 0.0])
def test_gradcheck_number(device: str, layout: str, beta: float) -> None:
    heatmap, _ = inputs(device, layout, ())
    assert gradcheck(lambda h: kpfused.soft_argmax2d(h, beta), heatmap)


def test_gradcheck_temperature_and_learnable_layer(device: str) -> None:
    heatmap, temperature = inputs(device, "contiguous", (3,))
    assert gradcheck(lambda h, t: kpfused.soft_argmax2d(h, temperature=t), (heatmap, temperature))
    module = kpfused.SoftArgmax2d(2.0, learnable=True, num_keypoints=3).double().to(device)

    def call(h: Tensor, log_beta: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"log_beta": log_beta}, (h,))

    assert gradcheck(call, (heatmap, module.log_beta.detach().requires_grad_()))


@pytest.mark.parametrize("shape", [(1, 2, 9, 18), (1, 17, 3, 3), (2, 1, 1, 7)], ids=str)
def test_gradcheck_across_vector_tails(device: str, shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS:
        heatmap = cases.LAYOUTS[layout](cases.random(shape).to(device)).detach().requires_grad_()
        assert gradcheck(kpfused.soft_argmax2d, heatmap)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_second_derivatives(device: str, form: str, layout: str) -> None:
    assert gradgradcheck(FORMS[form]("corners"), inputs(device, layout, (3,)))


def test_second_derivatives_of_a_number(device: str) -> None:
    heatmap, _ = inputs(device, "contiguous", ())
    assert gradgradcheck(lambda h: kpfused.soft_argmax2d(h, 0.7), heatmap)


def test_second_derivatives_of_a_nonlinear_loss(device: str) -> None:
    """The upstream gradient depends on the heatmap too; gradgradcheck holds it fixed."""
    heatmap, beta = inputs(device, "contiguous", (3,))
    results = []
    for f in (kpfused.soft_argmax2d, reference.soft_argmax2d):
        first = torch.autograd.grad(f(heatmap, beta).pow(2).sum(), (heatmap, beta), create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), (heatmap, beta)))
    torch.testing.assert_close(results[0], results[1])
