# SPDX-License-Identifier: MIT
"""Expectations of values, the softmax map, and expected coordinates of probability maps, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import kpfused
from kpfused import reference
from tests import cases
from tests.test_masks import PIXELS, on

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Of values for heatmaps (B, K, H, W): what they share, and how they lie.
VALUES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "map": lambda b, k: (b, k, 3),
    "image": lambda b, k: (b, 1, 5),
    "keypoint": lambda b, k: (k, 2),
    "all": lambda b, k: (4,),
    "many": lambda b, k: (1, 1, 29),
}
SHAPES = [(2, 3, 1, 1), (2, 3, 1, 9), (3, 9, 5, 7), (2, 17, 24, 41), (1, 11, 64, 48), (2, 2, 200, 190)]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def values_for(shape: tuple[int, ...], kind: str) -> Tensor:
    return cases.random((*VALUES[kind](*shape[:2]), *shape[-2:]))


def close(actual: Tensor, expected: Tensor, steps: float = 60, size: float = 1.0) -> None:
    """Within roundings of the largest, and of one rounding to the result's own dtype."""
    rounding = torch.finfo(actual.dtype).eps if accumulator(actual.dtype) != actual.dtype else 0.0
    eps = torch.finfo(accumulator(actual.dtype)).eps * (1 if accumulator(actual.dtype) == torch.float32 else 10)
    largest = expected.nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0.0
    atol = eps * steps * (largest + size) + torch.finfo(actual.dtype).smallest_normal
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=atol, equal_nan=True)


def check(
    mine: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: tuple[Tensor, ...], **keywords: Any
) -> Tensor:
    """Result and gradients with respect to all tensors, which keep their memory format. Returns the result."""
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    oracles = tuple(t.detach().double().requires_grad_() for t in tensors)
    actual, expected = mine(*leaves, **keywords), theirs(*oracles, **keywords)
    close(actual, expected)
    upstream = cases.upstream_of(actual).to(actual.dtype)
    got = torch.autograd.grad(actual, leaves, upstream)
    want = torch.autograd.grad(expected, oracles, upstream.double())
    for g, w, leaf in zip(got, want, leaves, strict=True):
        close(g, w)
        assert g.stride() == torch.empty_like(leaf).stride()
    return actual.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_softmax(device: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random(shape).to(dtype).to(device))
    result = check(kpfused.spatial_softmax2d, reference.spatial_softmax2d, (heatmap,))
    assert result.dtype == dtype
    assert result.stride() == torch.empty_like(heatmap).stride()


@pytest.mark.parametrize("kind", cases.FINITE)
def test_softmax_of_kinds_of_maps(device: str, kind: str) -> None:
    heatmap = cases.FINITE[kind]((2, 5, 24, 32)).float().to(device)
    result = kpfused.spatial_softmax2d(heatmap)
    torch.testing.assert_close(result.double(), reference.spatial_softmax2d(heatmap.double()), rtol=4e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_channels_last", "every_other"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", VALUES)
def test_expectation(device: str, kind: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    move = cases.LAYOUTS[layout]
    heatmap = move(cases.random(shape).to(dtype).to(device))
    values = move(values_for(shape, kind).to(dtype).to(device))
    result = check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))
    assert result.dtype == accumulator(dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("of_values", ["contiguous", "channels_last", "transposed"])
def test_expectation_of_values_in_another_layout(device: str, layout: str, of_values: str) -> None:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 5, 9, 16)).float().to(device))
    for kind in VALUES:
        values = cases.LAYOUTS[of_values](values_for((2, 5, 9, 16), kind).float().to(device))
        check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))


@pytest.mark.parametrize(
    ("leading", "of_values"),
    [((), ()), ((4,), ()), ((2, 3, 4), (3, 1)), ((2, 3, 4), (2, 1, 4)), ((2, 3, 4), (1, 3, 1)), ((2, 1, 4), (2, 1, 1))],
    ids=str,
)
def test_any_leading_dimensions(device: str, leading: tuple[int, ...], of_values: tuple[int, ...]) -> None:
    """Values that share in the middle too, or in front and behind."""
    heatmap = cases.random((*leading, 6, 8)).float().to(device)
    values = cases.random((*of_values, 3, 6, 8)).float().to(device)
    result = check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))
    assert result.shape == (*leading, 3)


def test_no_maps(device: str) -> None:
    """Shared values of no maps: a gradient of zero, not of what memory held."""
    heatmap = torch.zeros(0, 3, 4, 5, device=device, requires_grad=True)
    values = torch.randn(2, 4, 5, device=device, requires_grad=True)
    result = kpfused.spatial_expectation2d(heatmap, values)
    assert result.shape == (0, 3, 2)
    grads = torch.autograd.grad(result.sum(), (heatmap, values))
    assert torch.equal(grads[1], torch.zeros_like(values))
    assert kpfused.spatial_softmax2d(heatmap).shape == heatmap.shape
    assert kpfused.expectation2d(heatmap).shape == (0, 3, 2)
    assert kpfused.spatial_expectation2d(torch.zeros(2, 4, 5), torch.zeros(0, 4, 5)).shape == (2, 0)


@pytest.mark.parametrize("coordinates", reference.COORDINATES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probability_maps(device: str, dtype: torch.dtype, layout: str, coordinates: str) -> None:
    for shape in [(2, 3, 1, 9), (2, 17, 24, 41), (1, 2, 300, 310), (7, 9)]:
        p = cases.LAYOUTS[layout](reference.spatial_softmax2d(cases.random(shape)).to(dtype).to(device))
        result = check(kpfused.expectation2d, reference.expectation2d, (p,), coordinates=coordinates)
        assert result.dtype == accumulator(dtype)


def test_probability_maps_are_taken_as_they_are(device: str) -> None:
    """No normalisation, no softmax: DSNT after a sigmoid, of zeros, of NaN."""
    p = torch.rand(2, 3, 9, 11, device=device)
    p[0, 0] = 0
    p[1, 2, 3, 4] = torch.nan
    torch.testing.assert_close(
        kpfused.expectation2d(p).double(), reference.expectation2d(p.double()), rtol=1e-5, atol=0, equal_nan=True
    )


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "softmax": (kpfused.spatial_softmax2d, reference.spatial_softmax2d),
    "expectation": (kpfused.spatial_expectation2d, reference.spatial_expectation2d),
}


def inputs_of(name: str, heatmap: Tensor, kind: str = "image") -> tuple[Tensor, ...]:
    if name == "softmax":
        return (heatmap,)
    return heatmap, values_for(tuple(heatmap.shape), kind).to(heatmap)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("shape", [(2, 3, 12, 17), (2, 11, 40, 41)], ids=str)
def test_pixels_that_do_not_count(
    device: str, shape: tuple[int, int, int, int], pixels: str, layout: str, kind: str
) -> None:
    """They hold NaN, values too where all that share them skip the pixel, and have a gradient of exactly zero."""
    keywords = on(device, PIXELS[pixels](shape)) | {"empty_value": 0.5}
    heatmap = cases.random(shape).to(device)
    counts = reference.counting(heatmap, keywords.get("mask"), keywords.get("valid_size"))
    assert counts is not None
    counts = counts.expand(shape)
    heatmap = cases.LAYOUTS[layout](heatmap.masked_fill(~counts, torch.nan))
    values = values_for(shape, kind).to(device)
    sharing = tuple(n if v > 1 else 1 for n, v in zip(shape[:2], value_leading(values), strict=True))
    unused = ~counts.sum_to_size((*sharing, *shape[2:])).bool()
    values = values.masked_fill(unused.view(*values.shape[:-3], 1, *shape[2:]), torch.nan)
    for beta in (-0.7, 1.3):
        leaves = [t.clone().requires_grad_() for t in (heatmap, values)]
        result = kpfused.spatial_expectation2d(leaves[0], leaves[1], beta, **keywords)
        expected = reference.spatial_expectation2d(heatmap, values, beta, **keywords)
        close(result, expected)
        upstream = cases.upstream_of(result)
        grads = torch.autograd.grad(result, leaves, upstream)
        assert (grads[0][~counts] == 0).all()
        assert (grads[1].masked_select(unused.view(*values.shape[:-3], 1, *shape[2:])) == 0).all()
        p = reference.spatial_softmax2d(heatmap, beta, **keywords).masked_fill(~counts, 0)
        empty = ~counts.flatten(-2).any(-1)
        p = p.masked_fill(empty[..., None, None], 0)
        mean = expected.masked_fill(empty[..., None], 0)
        clean = values.nan_to_num(0)
        want = beta * p * ((upstream[..., None, None] * clean).sum(-3) - (upstream * mean).sum(-1)[..., None, None])
        close(grads[0], want)
        close(grads[1], (p.unsqueeze(-3) * upstream[..., None, None]).sum_to_size(values.shape))


def value_leading(values: Tensor) -> tuple[int, int]:
    """Leading sizes of values against (B, K)."""
    own = values.shape[:-3]
    return (*(1,) * (2 - len(own)), *own)  # type: ignore[return-value]


@pytest.mark.parametrize("empty_value", [None, -1.0, 0.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", PIXELS)
def test_softmax_of_pixels_that_count(device: str, pixels: str, layout: str, empty_value: float | None) -> None:
    shape = (2, 9, 12, 17)
    keywords = on(device, PIXELS[pixels](shape)) | {"empty_value": empty_value}
    heatmap = cases.random(shape).to(device)
    counts = reference.counting(heatmap, keywords.get("mask"), keywords.get("valid_size"))
    assert counts is not None
    counts = counts.expand(shape)
    heatmap = cases.LAYOUTS[layout](heatmap.masked_fill(~counts, torch.nan)).requires_grad_()
    result = kpfused.spatial_softmax2d(heatmap, -1.5, **keywords)
    close(result, reference.spatial_softmax2d(heatmap, -1.5, **keywords))
    some = counts.flatten(-2).any(-1)
    assert (result[some].masked_select(~counts[some]) == 0).all()
    (grad,) = torch.autograd.grad(result, heatmap, cases.upstream_of(result))
    assert (grad[~counts] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("pixels", PIXELS)
def test_probabilities_that_count(device: str, pixels: str) -> None:
    for layout in ("contiguous", "channels_last"):
        shape = (2, 9, 12, 17)
        keywords = on(device, PIXELS[pixels](shape))
        p = cases.LAYOUTS[layout](torch.rand(shape, dtype=torch.float64, device=device))
        check(kpfused.expectation2d, reference.expectation2d, (p,), **keywords)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bad_map_stays_alone(device: str, name: str, layout: str) -> None:
    for bad in (torch.nan, torch.inf):
        heatmap = cases.LAYOUTS[layout](cases.random((2, 9, 12, 10)).float().to(device))
        heatmap[1, 2, 3, 4] = bad
        mine, _ = FUNCTIONS[name]
        leaves = tuple(t.requires_grad_() for t in inputs_of(name, heatmap, "map"))
        result = mine(*leaves)
        grads = torch.autograd.grad(result, leaves, torch.ones_like(result))
        for tensor in (result, *grads):
            assert tensor[1, 2].isnan().all()
            tensor = tensor.detach().clone()
            tensor[1, 2] = 0
            assert tensor.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_maps_without_weight(device: str, name: str) -> None:
    mine, theirs = FUNCTIONS[name]
    heatmap = cases.random((2, 3, 4, 5)).to(device)
    heatmap[0, 1] = -torch.inf
    inputs = inputs_of(name, heatmap)
    assert mine(*inputs)[0, 1].isnan().all()
    for empty_value in (0.0, 2.0):
        close(mine(*inputs, empty_value=empty_value), theirs(*inputs, empty_value=empty_value))


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


def test_gradcheck_of_probability_maps(device: str) -> None:
    p = torch.rand(2, 3, 4, 5, dtype=torch.float64, device=device).requires_grad_()
    assert gradcheck(kpfused.expectation2d, p)
    assert gradgradcheck(kpfused.expectation2d, p)


def test_gradcheck_with_masks(device: str) -> None:
    mask = torch.rand(4, 5, device=device) < 0.7
    heatmap = cases.random((2, 3, 4, 5)).to(device).requires_grad_()
    values = cases.random((2, 1, 2, 4, 5)).to(device).requires_grad_()
    sizes = (torch.tensor([[4], [3]], device=device), 4)
    for keywords in ({"mask": mask}, {"valid_size": sizes}, {"mask": mask, "valid_size": sizes}):
        assert gradcheck(lambda h, v, k=keywords: kpfused.spatial_expectation2d(h, v, **k), (heatmap, values))
        assert gradgradcheck(lambda h, v, k=keywords: kpfused.spatial_expectation2d(h, v, **k), (heatmap, values))
        assert gradcheck(lambda h, k=keywords: kpfused.spatial_softmax2d(h, **k), heatmap)
        assert gradgradcheck(lambda h, k=keywords: kpfused.spatial_softmax2d(h, **k), heatmap)


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


@pytest.mark.parametrize("kind", ["none", "own", "of_image", "of_all"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(12, 10), (64, 64), (100, 100), (150, 150), (300, 310)], ids=str)
def test_a_map_gives_the_same_bits_alone(device: str, layout: str, size: tuple[int, int], kind: str) -> None:
    """Results and gradients, of the softmax where there are no values."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 9, *size)).float().to(device))
    leading = {"none": (), "own": (2, 9), "of_image": (2, 1), "of_all": ()}[kind]
    values = cases.random((*leading, 4, *size)).float().to(device)

    def results(heatmap: Tensor, values: Tensor) -> list[Tensor]:
        leaf = heatmap.detach().requires_grad_()
        if kind == "none":
            result = kpfused.spatial_softmax2d(leaf)
            result.backward(values.select(-3, 0).expand(leaf.shape))
        else:
            result = kpfused.spatial_expectation2d(leaf, values)
            result.sum().backward()
        return [result.detach(), leaf.grad]

    together = results(heatmap, values)
    # How many channels stand side by side is part of the layout.
    picks = [(slice(1, 2), slice(None))] + ([(slice(1, 2), slice(k, k + 1)) for k in (0, 5)] * (layout == "contiguous"))
    for pick in picks:
        own = values[pick if kind == "own" else pick[:1]] if kind in ("own", "of_image") else values
        for alone, of_all in zip(results(heatmap[pick], own), together, strict=True):
            assert torch.equal(alone, of_all[pick])
    for again, of_all in zip(results(heatmap, values), together, strict=True):
        assert torch.equal(again, of_all)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 1), (3, 3), (7, 7), (8, 16), (10, 12), (37, 41), (64, 48), (96, 72)], ids=str)
@pytest.mark.parametrize("leading", [(2, 5), (1, 5)], ids=["own", "of_keypoints"])
def test_a_run_of_pixels_gives_the_bits_of_rows_with_gaps(
    leading: tuple[int, int], size: tuple[int, int], dtype: torch.dtype
) -> None:
    """On CPU, where other kernels read them. Negative beta, one map of NaN and one of -inf."""
    heatmap = cases.random((2, 5, *size)).to(dtype)
    heatmap[0, 1, -1, -1], heatmap[1, 2] = torch.nan, -torch.inf
    values = cases.random((*leading, 4, *size)).to(dtype)
    beta = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=accumulator(dtype))

    def results(*tensors: Tensor) -> list[Tensor]:
        heatmap, values, beta = (t.detach().requires_grad_() for t in tensors)
        softmax = kpfused.spatial_softmax2d(heatmap, beta)
        mean = kpfused.spatial_expectation2d(heatmap, values, beta)
        of_softmax = torch.autograd.grad(softmax, (heatmap, beta), cases.upstream_of(softmax).to(dtype))
        upstream = cases.upstream_of(mean).to(mean.dtype)
        return [softmax, mean, *of_softmax, *torch.autograd.grad(mean, (heatmap, values, beta), upstream)]

    wide = cases.LAYOUTS["sliced"]
    for run, rows in zip(results(heatmap, values, beta), results(wide(heatmap), wide(values), beta), strict=True):
        torch.testing.assert_close(run, rows, rtol=0, atol=0, equal_nan=True)


def test_channels_side_by_side_give_a_map_the_same_bits_alone(device: str) -> None:
    """Of maps of one row, whose pixels overlap: channels and pixels are both neighbours in memory."""
    heatmap = cases.random((8, 1, 100)).float().to(device).requires_grad_()
    values = cases.random((8, 115)).float().to(device).unfold(1, 100, 1).unsqueeze(2)
    together = kpfused.spatial_expectation2d(heatmap, values)
    for i in range(8):
        assert torch.equal(kpfused.spatial_expectation2d(heatmap[i], values[i]), together[i])


def test_any_number_of_threads(device: str) -> None:
    heatmap = cases.random((2, 5, 300, 310)).float().to(device).requires_grad_()
    values = cases.random((2, 5, 2, 300, 310)).float().to(device).requires_grad_()

    def everything() -> tuple[Tensor, ...]:
        mean = kpfused.spatial_expectation2d(heatmap, values)
        return mean, *torch.autograd.grad(mean.sum(), (heatmap, values))

    threads = torch.get_num_threads()
    want = everything()
    try:
        torch.set_num_threads(1)
        for got, expected in zip(everything(), want, strict=True):
            assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)


def program(heatmap: Tensor, values: Tensor, beta: Tensor) -> Tensor:
    mask = torch.arange(heatmap.shape[-1], device=heatmap.device) % 3 != 1
    p = kpfused.spatial_softmax2d(heatmap, beta, mask=mask)
    fields = [
        kpfused.spatial_expectation2d(heatmap, values, beta),
        kpfused.spatial_expectation2d(heatmap, values, beta, mask=mask, empty_value=0.0),
        kpfused.expectation2d(p, coordinates="unit"),
        kpfused.expectation2d(kpfused.spatial_softmax2d(heatmap)),
    ]
    return torch.cat(fields, -1)


@pytest.mark.parametrize(("layout", "backend"), [("contiguous", "aot_eager"), ("channels_last", "inductor")])
def test_compiled_once_for_any_size(device: str, layout: str, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=backend)
    for step, (batch, size) in enumerate([(2, (16, 12)), (3, (16, 12)), (4, (9, 31))]):
        heatmap = cases.LAYOUTS[layout](cases.random((batch, 5, *size)).float().to(device)).requires_grad_()
        values = cases.random((batch, 1, 3, *size)).float().to(device).requires_grad_()
        beta = torch.linspace(0.5, 2, 5, device=device).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got, want = compiled(heatmap, values, beta), program(heatmap, values, beta)
            assert torch.equal(got, want)
            pairs = [torch.autograd.grad(r, (heatmap, values, beta), torch.ones_like(r)) for r in (got, want)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device: str, layout: str) -> None:
    ops = torch.ops.kpfused
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 4, 5)).float().to(device)).requires_grad_()
    beta = torch.rand(3, device=device).requires_grad_()
    mask = (torch.rand(2, 1, 4, 5, device=device) < 0.6).expand(2, 3, 4, 5)
    kinds = list(VALUES)  # of which each memory format takes every other, whole or masked
    for pixels in ((), (mask, None, 0.0)):
        for kind in kinds[(len(pixels) > 0) ^ (layout == "contiguous") :: 2]:
            values = values_for((2, 3, 4, 5), kind).float().to(device).requires_grad_()
            forward = (heatmap, values, beta, 0.0, *pixels)
            torch.library.opcheck(ops.spatial_expectation2d.default, forward)
            mean, stats = (t.detach() for t in ops.spatial_expectation2d(*forward))
            for needs in ((True, True, True), (False, True, False) if pixels else (True, False, False)):
                grad = torch.randn_like(mean).requires_grad_()
                backward = (grad, heatmap, values, mean, stats, beta, 0.0, *needs, *pixels)
                torch.library.opcheck(ops.spatial_expectation2d_backward.default, backward)
        for op, index, number in ((ops.spatial_softmax2d, 0, beta), (ops.expectation2d, 2, None)):
            forward = (heatmap, number, 1.0, index, *pixels)
            torch.library.opcheck(op.default, forward)
            result, stats = (t.detach() for t in op(*forward))
            grad = torch.randn_like(result).requires_grad_()
            backward = (grad, heatmap, stats, number, 1.0, index, number is not None)
            torch.library.opcheck(getattr(ops, f"{op.__name__}_backward").default, (*backward, *pixels))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_half(dtype: torch.dtype) -> None:
    heatmap, values = torch.randn(2, 3, 8, 9), torch.randn(2, 1, 4, 8, 9)
    with torch.autocast("cpu", dtype):
        assert kpfused.spatial_softmax2d(heatmap.to(dtype)).dtype == dtype
        assert kpfused.spatial_expectation2d(heatmap.to(dtype), values.to(dtype)).dtype == torch.float32


def test_nothing_of_map_size_is_kept(device: str) -> None:
    """Autograd holds the inputs and a few numbers a map; no softmax map."""
    heatmap = torch.randn(2, 17, 64, 48, device=device, requires_grad=True)
    values = torch.randn(2, 1, 8, 64, 48, device=device, requires_grad=True)
    inputs = {heatmap.data_ptr(), values.data_ptr()}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in inputs:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kpfused.spatial_softmax2d(heatmap)
        kpfused.spatial_expectation2d(heatmap, values)
        kpfused.expectation2d(heatmap)
    assert sum(kept) <= 2 * 17 * (4 + 4 + 8)


MAP = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "values must be a torch.Tensor; got int", lambda: kpfused.spatial_expectation2d(MAP, 1)),  # type: ignore[arg-type]
        (
            TypeError,
            "values must have the dtype of heatmap, torch.float32; got torch.float64",
            lambda: kpfused.spatial_expectation2d(MAP, MAP.double()),
        ),
        (
            ValueError,
            r"values must be \(..., C, H, W\) and broadcast to \(2, 3, C, 4, 5\) of heatmap; got shape \(4, 5\)",
            lambda: kpfused.spatial_expectation2d(MAP, MAP[0, 0]),
        ),
        (
            ValueError,
            r"values must be .* got shape \(2, 1, 5, 4\)",
            lambda: kpfused.spatial_expectation2d(MAP, torch.zeros(2, 1, 5, 4)),
        ),
        (
            ValueError,
            r"values must be .* got shape \(2, 1, 4, 5\)",
            lambda: kpfused.spatial_expectation2d(MAP, torch.zeros(2, 1, 4, 5)),
        ),
        (
            ValueError,
            "values must be on the device of heatmap, cpu; got meta",
            lambda: kpfused.spatial_expectation2d(MAP, MAP.to("meta")),
        ),
        (ValueError, "coordinates must be one of", lambda: kpfused.expectation2d(MAP, coordinates="x")),
        (TypeError, "heatmap must be float32", lambda: kpfused.expectation2d(MAP.long())),
        (TypeError, "heatmap must be float32", lambda: kpfused.spatial_softmax2d(MAP.long())),
        (ValueError, "give beta or temperature", lambda: kpfused.spatial_softmax2d(MAP, 2.0, temperature=1.0)),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else None,
)
def test_bad_input(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("kind", ["own", "shared"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_are_not_finite_leave_other_pixels_alone(device: str, layout: str, kind: str) -> None:
    """NaN from above in one channel of one map: no gradient where no pixel counts, nor in values of other maps."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 6, 9)).float().to(device)).requires_grad_()
    values = cases.random((2, 3 if kind == "own" else 1, 2, 6, 9)).float().to(device).requires_grad_()
    mask = torch.rand(6, 9, device=device) < 0.6
    result = kpfused.spatial_expectation2d(heatmap, values, mask=mask)
    upstream = torch.ones_like(result)
    upstream[0, 1, 1] = torch.nan
    of_heatmap, of_values = torch.autograd.grad(result, (heatmap, values), upstream)
    assert (of_heatmap.masked_select(~mask) == 0).all()
    assert (of_values.masked_select(~mask) == 0).all()
    assert of_heatmap[0, 1].masked_select(mask).isnan().all()
    assert of_values[0, 1 if kind == "own" else 0, 1].masked_select(mask).isnan().all()
    assert of_values[1].isfinite().all()


@pytest.mark.parametrize("keywords", [{}, {"valid_size": (3, 4)}], ids=str)
def test_no_channels(device: str, keywords: dict[str, Any]) -> None:
    heatmap = cases.random((2, 3, 6, 9)).float().to(device).requires_grad_()
    values = torch.zeros(2, 1, 0, 6, 9, device=device, requires_grad=True)
    result = kpfused.spatial_expectation2d(heatmap, values, **keywords)
    assert result.shape == (2, 3, 0)
    of_heatmap, of_values = torch.autograd.grad(result.sum(), (heatmap, values))
    assert of_values.shape == values.shape
    assert (of_heatmap == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", ["all", "some"])
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_sums_of_many_pixels_keep_their_digits(device: str, kind: str, pixels: str, layout: str) -> None:
    """Of seven, pixel after pixel would lose three. Channels that stand side by side fill vectors, or are left over."""
    heatmap = cases.LAYOUTS[layout](torch.zeros(1, 2, 256, 256, device=device))
    values = torch.full((1, 2 if kind == "own" else 1, 256, 256, 19), 0.1, device=device).permute(0, 1, 4, 2, 3)
    mask = torch.ones(256, 256, dtype=torch.bool, device=device)
    mask[0, 0] = pixels == "all"
    keywords = {} if pixels == "all" else {"mask": mask}
    mean = kpfused.spatial_expectation2d(heatmap, values, **keywords)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("leading", "channels"), [((8192, 1), 3), ((1, 8192), 17)], ids=str)
def test_gradients_of_values_that_many_maps_share_keep_their_digits(
    device: str, leading: tuple[int, int], channels: int
) -> None:
    heatmap = torch.zeros(*leading, 4, 5, device=device)
    values = torch.zeros(channels, 4, 5, device=device, requires_grad=True)
    mean = kpfused.spatial_expectation2d(heatmap, values)
    (grad,) = torch.autograd.grad(mean, values, torch.full_like(mean, 0.1))
    torch.testing.assert_close(grad, torch.full_like(grad, 8192 * 0.1 / 20), rtol=3e-5, atol=0)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, (192, 256)), (torch.float64, (150, 160)), (torch.float32, (24, 32))], ids=str
)
def test_a_copy_of_a_heatmap_whose_stats_are_read_in_place(
    device: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    """Two leading dimensions fold beside channels that are innermost, and do not beside values shared by every other.

    Maps of one part as rows: of several with channels innermost, of one, and small enough to be kept.
    """
    channels = 3 if dtype == torch.float32 else 2
    heatmap = cases.random((2, 2, *size, channels)).to(dtype).to(device).permute(0, 1, 4, 2, 3)
    for leading in ((2, 1, 1), (2, channels)):
        values = cases.random((*leading, 2, *size)).to(dtype).to(device)
        check(kpfused.spatial_expectation2d, reference.spatial_expectation2d, (heatmap, values))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_values_that_fold_otherwise_than_the_heatmap(device: str, layout: str) -> None:
    """Three leading dimensions in another order in memory: copied, and the gradient comes back as values lie."""
    heatmap = cases.LAYOUTS[layout](cases.random((2, 2, 5, 6, 7)).to(device)).requires_grad_()
    for leading in ((2, 2, 5), (1, 1, 5), (2, 1, 1)):
        values = cases.random((5, leading[1], leading[0], 3, 6, 7)).to(device)
        values = values[: leading[2]].permute(2, 1, 0, 3, 4, 5).requires_grad_()
        results = []
        for function in (kpfused.spatial_expectation2d, reference.spatial_expectation2d):
            result = function(heatmap, values, 1.5)
            upstream = cases.upstream_of(result)
            results.append((result.detach(), *torch.autograd.grad(result, (heatmap, values), upstream)))
        torch.testing.assert_close(results[0], results[1])
        assert results[0][2].stride() == torch.empty_like(values).stride()
