# SPDX-License-Identifier: MIT
"""torch.func, vmap and forward mode against the reference in float64, and how often they call a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import kpfused
from kpfused import SoftArgmax2d, reference
from tests import cases

Function = Callable[..., Tensor]


def inputs(device: str, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Odd and different sizes everywhere, so that no dimension can be taken for another."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 4, 5)).to(device))
    return heatmap, (torch.rand(3, dtype=torch.float64) + 0.5).to(device)


def loss(f: Function) -> Function:
    """Nonlinear, and not the same in x and y."""
    return lambda h, b: f(h, b, coordinates="unit").mul(torch.tensor([1.0, 3.0], device=h.device)).pow(2).sum()


def second_grad(f: Function, h: Tensor, b: Tensor) -> Any:
    def slope(h: Tensor, b: Tensor) -> Tensor:
        return sum((g.pow(2).sum() for g in grad(loss(f), (0, 1))(h, b)), torch.zeros((), device=h.device))

    return grad(slope, (0, 1))(h, b)


def per_sample(f: Function, h: Tensor, b: Tensor) -> Any:
    return vmap(grad(loss(f), (0, 1)), (0, None))(h, b)


# What a transform computes, and the kernels that it calls: (forward, backward). Forward mode takes the composition.
TRANSFORMS: dict[str, tuple[Callable[[Function, Tensor, Tensor], Any], tuple[int, int]]] = {
    "vmap": (lambda f, h, b: vmap(f, (0, None))(h, b), (1, 0)),
    "vmap of vmap": (lambda f, h, b: vmap(vmap(f), (0, None))(h, b), (1, 0)),
    "grad": (lambda f, h, b: grad(loss(f), (0, 1))(h, b), (1, 1)),
    "vmap of grad": (per_sample, (1, 1)),
    "grad of vmap": (lambda f, h, b: grad(loss(lambda *a, **k: vmap(f, (0, None))(*a)), (0, 1))(h, b), (1, 1)),
    "vmap of vmap of grad": (lambda f, h, b: vmap(vmap(grad(loss(f), (0, 1))), (0, None))(h, b), (1, 1)),
    "jacrev": (lambda f, h, b: jacrev(f, (0, 1))(h, b), (1, 1)),
    "vmap of jacrev": (lambda f, h, b: vmap(jacrev(f, (0, 1)), (0, None))(h, b), (1, 1)),
    "grad of grad": (second_grad, (1, 2)),
    "vmap of grad of grad": (lambda f, h, b: vmap(lambda x: second_grad(f, x, b))(h), (1, 2)),
    "jacrev of jacrev": (lambda f, h, b: jacrev(jacrev(loss(f)))(h, b), (1, 2)),
    "jvp": (lambda f, h, b: jvp(f, (h, b), (h.cos(), b.sin())), (0, 0)),
    "vmap of jvp": (lambda f, h, b: vmap(lambda x: jvp(f, (x, b), (x.cos(), b.sin())))(h), (0, 0)),
    "jacfwd": (lambda f, h, b: jacfwd(f, (0, 1))(h, b), (0, 0)),
    "hessian": (lambda f, h, b: hessian(loss(f), (0, 1))(h, b), (0, 0)),
    "vmap of hessian": (lambda f, h, b: vmap(hessian(loss(f), (0, 1)), (0, None))(h, b), (0, 0)),
    "jvp of a pulled back vector": (
        lambda f, h, b: jvp(vjp(f, h, b)[1], (h[..., 0, :2].cos(),), (h[..., 1, :2],)),
        (1, 0),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_transforms(device: str, name: str, layout: str) -> None:
    transform, expected = TRANSFORMS[name]
    heatmap, beta = inputs(device, layout)
    with cases.KernelCalls() as counted:
        actual = transform(kpfused.soft_argmax2d, heatmap, beta)
    torch.testing.assert_close(actual, transform(reference.soft_argmax2d, heatmap, beta))
    assert counted.calls() == expected


def fields(module: Any, pixels: dict[str, Any]) -> Function:
    """All real-valued fields of the moments under a mask or a size, as one vector a map."""

    def function(heatmap: Tensor, beta: Tensor, coordinates: str = "pixel") -> Tensor:
        m = module.spatial_moments2d(heatmap, beta, coordinates=coordinates, **pixels)
        numbers = torch.stack([m.entropy, m.logsumexp, m.peak_probability], -1)
        # The loss of these tests weighs two things: mixtures of all.
        whole = torch.cat([m.mean, m.covariance.flatten(-2), numbers], -1)
        return torch.stack([whole.cos().sum(-1), whole.sum(-1)], -1)

    return function


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("pixels", ["all", "mask", "size"])
def test_transforms_of_masks_and_moments(device: str, name: str, pixels: str) -> None:
    heatmap, beta = inputs(device)
    generator = torch.Generator().manual_seed(3)
    settings: dict[str, Any] = {
        "all": {},
        "mask": {"mask": (torch.rand(4, 5, generator=generator) < 0.7).to(device)},
        "size": {"valid_size": (3, 4), "empty_value": 0.0},
    }[pixels]
    transform, _ = TRANSFORMS[name]
    actual = transform(fields(kpfused, settings), heatmap, beta)
    torch.testing.assert_close(actual, transform(fields(reference, settings), heatmap, beta))


@pytest.mark.parametrize("name", ["vmap of grad", "jacrev", "hessian"])
def test_transforms_of_a_number(device: str, name: str) -> None:
    transform, expected = TRANSFORMS[name]
    heatmap, beta = inputs(device)

    def with_number(f: Function) -> Function:
        return lambda h, b, **kwargs: f(h, 0.7, **kwargs) + b.sum() * 0

    with cases.KernelCalls() as counted:
        actual = transform(with_number(kpfused.soft_argmax2d), heatmap, beta)
    torch.testing.assert_close(actual, transform(with_number(reference.soft_argmax2d), heatmap, beta))
    assert counted.calls() == expected


# Maps (2, 3, 6, 7) with the vmapped dimension of 5 anywhere, and beta in every shape that broadcasts against (2, 3),
# with and without one. (5, 1, 3) against (5, 2, 3) is no single run of dimensions, and has to be expanded.
DIMS = [pair for pair in itertools.product([None, 0, 1, 2, 3, -1], [None, 0, -1]) if pair != (None, None)]


@pytest.mark.parametrize(("heatmap_dim", "beta_dim"), DIMS)
@pytest.mark.parametrize("beta_shape", [(), (3,), (1,), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_vmap_folds_any_dimensions(
    device: str, heatmap_dim: int | None, beta_dim: int | None, beta_shape: tuple[int, ...], layout: str
) -> None:
    size = 5
    heatmap = cases.LAYOUTS[layout](cases.random((size, 2, 3, 6, 7) if heatmap_dim is not None else (2, 3, 6, 7)))
    heatmap = heatmap.to(device) if heatmap_dim is None else heatmap.to(device).movedim(0, heatmap_dim)
    beta = (torch.rand(beta_shape if beta_dim is None else (size, *beta_shape), dtype=torch.float64) + 0.5).to(device)
    beta = beta if beta_dim is None else beta.movedim(0, beta_dim)
    in_dims = (heatmap_dim, beta_dim)

    def values_and_gradients(f: Function) -> Any:
        values = vmap(f, in_dims)(heatmap, beta)
        return values, vmap(grad(loss(f), (0, 1)), in_dims)(heatmap, beta)

    with cases.KernelCalls() as counted:
        actual = values_and_gradients(kpfused.soft_argmax2d)
    assert counted.calls() == (2, 1)
    torch.testing.assert_close(actual, values_and_gradients(reference.soft_argmax2d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vmap_gives_the_bits_of_the_folded_call(device: str, dtype: torch.dtype) -> None:
    heatmap = cases.random((4, 2, 3, 16, 12)).to(device, dtype)
    assert torch.equal(vmap(kpfused.soft_argmax2d)(heatmap), kpfused.soft_argmax2d(heatmap))
    upstream = torch.rand(4, 2, 3, 2, device=device)
    per_item = vmap(lambda h, u: vjp(kpfused.soft_argmax2d, h)[1](u)[0])(heatmap, upstream)
    assert torch.equal(per_item, cases.gradients(kpfused.soft_argmax2d, heatmap, upstream=upstream))


def test_vmap_in_a_graph_of_autograd(device: str) -> None:
    """Ordinary backward through a vmapped call, and through per-sample gradients."""
    leaves = [t.requires_grad_() for t in inputs(device)]
    results = []
    for f in (kpfused.soft_argmax2d, reference.soft_argmax2d):
        first = torch.autograd.grad(loss(lambda h, b, f=f, **_: vmap(f, (0, None))(h, b))(*leaves), leaves)
        slopes = sum(g.pow(2).sum() for g in per_sample(f, *leaves))
        results.append((first, torch.autograd.grad(slopes, leaves)))
    torch.testing.assert_close(results[0], results[1])


def test_batched_upstream_gradients(device: str) -> None:
    """``is_grads_batched`` runs the eager backward under autograd's own, older vmap."""
    heatmap, beta = (t.requires_grad_() for t in inputs(device))
    upstream = torch.randn(6, 2, 3, 2, dtype=torch.float64).to(device)
    actual, expected = (
        torch.autograd.grad(f(heatmap, beta), (heatmap, beta), upstream, is_grads_batched=True)
        for f in (kpfused.soft_argmax2d, reference.soft_argmax2d)
    )
    torch.testing.assert_close(actual, expected)


def test_dual_numbers(device: str) -> None:
    heatmap, beta = inputs(device)
    results = []
    for f in (kpfused.soft_argmax2d, reference.soft_argmax2d):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(heatmap, heatmap.cos()), forward_ad.make_dual(beta, beta.sin())
            results.append(forward_ad.unpack_dual(f(*dual)))
    torch.testing.assert_close(results[0].primal, results[1].primal)
    torch.testing.assert_close(results[0].tangent, results[1].tangent)


def test_a_dual_upstream_of_an_earlier_call(device: str) -> None:
    """The tangent passes through the backward of a call made outside the dual level."""
    heatmap, beta = (t.requires_grad_() for t in inputs(device))
    upstream = torch.randn(2, 2, 3, 2, dtype=torch.float64).to(device)
    results = []
    for f in (kpfused.soft_argmax2d, reference.soft_argmax2d):
        points = f(heatmap, beta)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(upstream[0], upstream[1])
            found = torch.autograd.grad(points, (heatmap, beta), dual)
            results.append([forward_ad.unpack_dual(g).tangent for g in found])
    torch.testing.assert_close(results[0], results[1])


def test_gradcheck_of_forward_and_batched_modes(device: str) -> None:
    leaves = [t.to(device).requires_grad_() for t in (cases.random((1, 2, 2, 3)), cases.random((2,)))]
    checks = ("check_forward_ad", "check_batched_grad", "check_batched_forward_grad")
    assert torch.autograd.gradcheck(kpfused.soft_argmax2d, leaves, **dict.fromkeys(checks, True))


def test_an_ensemble_of_layers(device: str) -> None:
    """One call for many layers that each learned a beta of their own."""
    layers = [SoftArgmax2d(0.5 + i, learnable=True, num_keypoints=3).double().to(device) for i in range(4)]
    heatmap, _ = inputs(device)
    parameters, buffers = stack_module_state(layers)

    def call(parameters: Any, buffers: Any, heatmap: Tensor) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (heatmap,))

    with cases.KernelCalls() as counted:
        together = vmap(call, (0, 0, None))(parameters, buffers, heatmap)
    assert counted.calls() == (1, 0)
    torch.testing.assert_close(together, torch.stack([layer(heatmap) for layer in layers]))


def test_checks_see_the_unbatched_shape() -> None:
    with pytest.raises(ValueError, match=r"leading dimensions \(3,\) of heatmap; got shape \(2, 3\)"):
        vmap(kpfused.soft_argmax2d, (0, None))(torch.zeros(2, 3, 4, 5), torch.ones(2, 3))


def test_tensors_that_outlive_a_transform(device: str) -> None:
    """They look like others, and lead to the gradient of what they were made from."""
    leaf, kept = torch.randn(1, 2, 5, 4, device=device, requires_grad=True), []

    def function(x: Tensor) -> Tensor:
        kept.append(x * leaf)
        return x.sum()

    torch.func.grad(function)(torch.ones(1, 2, 5, 4, device=device))
    kpfused.soft_argmax2d(kept[0], kept[0].mean()).sum().backward()
    expected = torch.autograd.grad(kpfused.soft_argmax2d(leaf, leaf.mean()).sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: kpfused.spatial_moments2d(h).covariance,
        lambda h: kpfused.window_mass(h, 3),
        lambda h: kpfused.soft_argmax2d(h, debias=True),
        kpfused.soft_argmax3d,
    ],
    ids=["moments", "window", "debias", "volumes"],
)
def test_no_maps_by_the_composition(device: str, function: Callable[[Tensor], Tensor]) -> None:
    none = torch.zeros(0, 3, 6, 7, device=device)
    result, tangent = torch.func.jvp(function, (none,), (none,))
    assert result.shape == tangent.shape == function(none).shape
