# SPDX-License-Identifier: MIT
"""Hypothesis: any shape, stride, dtype and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kpfused
from tests import cases, expectations
from tests.conftest import DEVICES

DTYPES = st.sampled_from(cases.DTYPES)
SEEDS = st.integers(0, 2**31)


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A heatmap as a view: any order of dimensions in memory, any step and offset in each."""
    rank = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 40 if d >= rank - 2 else 4)) for d in range(rank)]
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    offsets = [draw(st.sampled_from([0, 0, 1])) for _ in shape]
    order = draw(st.one_of(st.just(list(range(rank))), st.permutations(range(rank))))
    torch.manual_seed(draw(SEEDS))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e3]))
    sizes = [n * step + offset for n, step, offset in zip(shape, steps, offsets, strict=True)]
    base = (torch.randn([sizes[d] for d in order]) * scale).to(draw(DTYPES))
    back = base.permute([order.index(d) for d in range(rank)])
    slices = tuple(slice(o, o + n * s, s) for n, s, o in zip(shape, steps, offsets, strict=True))
    view = back[slices]
    assert list(view.shape) == shape
    return view


@pytest.mark.parametrize("device", DEVICES)
@given(heatmap=views(), beta=st.floats(-4, 4), coordinates=st.sampled_from(kpfused.reference.COORDINATES))
def test_any_view(device: str, heatmap: Tensor, beta: float, coordinates: str) -> None:
    heatmap = heatmap.to(device)
    size = max(heatmap.shape[-2:])
    result = kpfused.soft_argmax2d(heatmap, beta, coordinates=coordinates)
    cases.assert_coordinates(result, cases.oracle(heatmap, beta, coordinates), size)
    actual = cases.gradients(kpfused.soft_argmax2d, heatmap, beta, coordinates=coordinates)
    expected = cases.gradients(cases.oracle, heatmap.double(), beta, coordinates)
    # exp of a product of size |z| carries |z| roundings; sharp maps have them in every weight.
    spread = 1 + abs(beta) * (heatmap.double().max() - heatmap.double().min()).item()
    largest = expected.abs().max().item()
    eps = torch.finfo(result.dtype).eps
    rounding = 0.0 if actual.dtype == result.dtype else torch.finfo(actual.dtype).eps
    tolerance = eps * (40 * min(spread, 100) * largest + 4 * size) + torch.finfo(actual.dtype).tiny
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@given(
    values=st.lists(
        st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([-torch.inf, 0.0, 1e30, -1e30])),
        min_size=1,
        max_size=40,
    ),
    width=st.integers(1, 7),
)
def test_any_values(device: str, values: list[float], width: int) -> None:
    """Every float32 there is, infinities included: finite results agree, and NaN comes where the oracle has it."""
    flat = torch.tensor(values, dtype=torch.float32)[: max(1, len(values) // width) * width]
    width = min(width, len(flat))
    heatmap = flat[: len(flat) // width * width].view(1, -1, width).to(device)
    actual = kpfused.soft_argmax2d(heatmap)
    expected = cases.oracle(heatmap)
    assert torch.equal(actual.isnan(), expected.isnan())
    cases.assert_coordinates(actual, expected, max(heatmap.shape[-2:]))


@pytest.mark.parametrize("device", DEVICES)
@given(seed=SEEDS, shift=st.floats(-100, 100), height=st.integers(2, 24), width=st.integers(2, 24))
def test_invariants(device: str, seed: int, shift: float, height: int, width: int) -> None:
    """A shift of all logits changes nothing; flipping or transposing the map does the same to the point."""
    torch.manual_seed(seed)
    heatmap = torch.randn(2, height, width, dtype=torch.float64, device=device)
    x, y = kpfused.soft_argmax2d(heatmap).unbind(-1)

    def expect(other: Tensor, want_x: Tensor, want_y: Tensor) -> None:
        torch.testing.assert_close(kpfused.soft_argmax2d(other), torch.stack((want_x, want_y), -1))

    expect(heatmap + shift, x, y)
    expect(heatmap.flip(-1), width - 1 - x, y)
    expect(heatmap.flip(-2), x, height - 1 - y)
    expect(heatmap.mT, y, x)
    padded = torch.nn.functional.pad(heatmap, (3, 0, 2, 0), value=-torch.inf)
    expect(padded, x + 3, y + 2)


# A negative beta that CUDA flushes to zero has another peak there.
BETAS = st.floats(-2, 2, width=32, allow_subnormal=False)


@pytest.mark.parametrize("device", DEVICES)
@given(heatmap=views(), share=st.floats(0, 1), beta=BETAS, sized=st.booleans(), seed=SEEDS)
def test_any_mask(device: str, heatmap: Tensor, share: float, beta: float, sized: bool, seed: int) -> None:
    """Moments of the pixels that count are those of the same map with -inf elsewhere, and their gradients are zero."""
    torch.manual_seed(seed)
    heatmap = heatmap.to(device)
    height, width = heatmap.shape[-2:]
    mask = torch.rand(height, width, device=device) < share
    settings: dict[str, Any] = {"mask": mask, "empty_value": 0.0}
    if sized:
        leading = heatmap.shape[:-2]
        settings["valid_size"] = tuple(torch.randint(0, n + 1, leading, device=device) for n in (height, width))
    expected = kpfused.reference.spatial_moments2d(heatmap.double(), beta, **settings)
    actual = kpfused.spatial_moments2d(heatmap, beta, **settings)
    logits = abs(beta) * heatmap.double().abs().max().item()
    cases.assert_moments(actual, expected, height, width, logits)
    points = kpfused.soft_argmax2d(heatmap, beta, **settings)
    torch.testing.assert_close(points, actual.mean, rtol=0, atol=8 * torch.finfo(points.dtype).eps * max(height, width))
    leaf = heatmap.clone().requires_grad_()
    result = kpfused.spatial_moments2d(leaf, beta, **settings)
    (gradient,) = torch.autograd.grad(cases.mixture(result), leaf)
    counts = mask.expand(heatmap.shape)
    if sized:
        rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
        tall, wide = (n[..., None, None] for n in settings["valid_size"])
        counts = counts & (rows < tall) & (columns < wide)
    assert torch.count_nonzero(gradient.masked_fill(counts, 0)) == 0
    assert gradient.isfinite().all()


ORDERS = st.one_of(
    st.sampled_from([(0, 1, 2, 3, 4), (0, 3, 4, 1, 2), (0, 1, 3, 4, 2), (0, 2, 3, 4, 1)]), st.permutations(range(5))
)


@pytest.mark.parametrize("device", DEVICES)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.sampled_from([1, 5, 8, 16, 33])),
    channels=st.integers(1, 20),
    shared=st.tuples(st.booleans(), st.booleans()),
    orders=st.tuples(ORDERS, ORDERS),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_values_of_any_order(
    device: str,
    shape: tuple[int, int, int, int],
    channels: int,
    shared: tuple[bool, bool],
    orders: tuple[tuple[int, ...], tuple[int, ...]],
    masked: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Expectations and their gradients, whatever lies side by side in memory and whoever shares values."""
    torch.manual_seed(seed)

    def lay(x: Tensor, order: tuple[int, ...]) -> Tensor:
        return x.permute(order).contiguous().permute([order.index(d) for d in range(5)])

    batch, keypoints = (1 if is_shared else n for n, is_shared in zip(shape[:2], shared, strict=True))
    heatmap = lay(torch.randn(*shape[:2], 1, *shape[2:], dtype=dtype, device=device), orders[0]).squeeze(2)
    values = lay(torch.randn(batch, keypoints, channels, *shape[2:], dtype=dtype, device=device), orders[1])
    keywords: dict[str, Any] = {"empty_value": 0.5}
    if masked:
        keywords["mask"] = torch.rand(shape, device=device) < 0.7
    expectations.check(
        kpfused.spatial_expectation2d, kpfused.reference.spatial_expectation2d, (heatmap, values), **keywords
    )
