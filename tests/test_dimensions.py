# SPDX-License-Identifier: MIT
"""Soft-argmax and moments of rows and of volumes, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kpfused
from kpfused import SpatialMoments, reference
from tests import cases

SHAPE = (2, 3, 4, 5, 6)
DEPTH = SHAPE[2]


def joint(volume: Tensor) -> Tensor:
    return volume.reshape(SHAPE[0], -1, *SHAPE[3:])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.contiguous(),
    "channels_last_3d": lambda v: v.contiguous(memory_format=torch.channels_last_3d),
    "joint": joint,
    "joint_channels_last": lambda v: joint(v).contiguous(memory_format=torch.channels_last),
}


def real_fields(moments: SpatialMoments) -> tuple[Tensor, ...]:
    return tuple(field for field in moments if field is not moments.peak)


def assert_moments(heatmap: Tensor, actual: SpatialMoments, expected: SpatialMoments, leaves: list[Tensor]) -> None:
    """Fields, and one backward of a random mixture of all of them. ``leaves``: of actual, then of expected."""
    assert torch.equal(actual.peak, expected.peak)
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if heatmap.dtype != torch.float64 else {"rtol": 1e-10, "atol": 1e-12}
    losses = []
    for got, want in zip(real_fields(actual), real_fields(expected), strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)
        upstream = cases.upstream_of(want)
        losses.append(((got * upstream.to(got.dtype)).sum(), (want * upstream).sum()))
    count = len(leaves) // 2
    of_actual = torch.autograd.grad(sum(a for a, _ in losses), leaves[:count])  # type: ignore[arg-type]
    of_expected = torch.autograd.grad(sum(b for _, b in losses), leaves[count:])  # type: ignore[arg-type]
    for got, want in zip(of_actual, of_expected, strict=True):
        torch.testing.assert_close(got.double().reshape(want.shape), want.nan_to_num(0), **tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta_shape", [None, (3,), (2, 1), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_volume(device: str, layout: str, dtype: torch.dtype, beta_shape: tuple[int, ...] | None, masked: bool) -> None:
    volume = (cases.random(SHAPE) * 2).to(dtype).to(device)
    mask = None
    if masked:
        mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], device=device) < 0.5
        mask[:, :, 2] = False  # a slice without a voxel
    else:
        volume[0, 0, 1] = -torch.inf  # likewise
    heatmap = LAYOUTS[layout](volume.to(dtype)).detach().requires_grad_()
    oracle = volume.double().requires_grad_()
    leaves = [heatmap, oracle]
    beta: Tensor | float = -1.5
    if beta_shape is not None:
        beta = (torch.rand(beta_shape, device=device, dtype=torch.float64) + 0.5).requires_grad_()
        leaves = [heatmap, beta, oracle, beta]
    elif not masked:
        beta = 1.5
    arguments = {"mask": mask, "coordinates": "corners"}
    actual = kpfused.spatial_moments3d(heatmap, beta, depth=DEPTH if "joint" in layout else None, **arguments)  # type: ignore[arg-type]
    if dtype == torch.bfloat16:
        torch.testing.assert_close(
            actual.mean.double(),
            reference.spatial_moments3d(oracle, beta, **arguments).mean,
            rtol=0,
            atol=1e-5,  # type: ignore[arg-type]
        )
        return
    assert_moments(heatmap, actual, reference.spatial_moments3d(oracle, beta, **arguments), leaves)  # type: ignore[arg-type]
    point = kpfused.soft_argmax3d(heatmap, beta, depth=DEPTH if "joint" in layout else None, **arguments)  # type: ignore[arg-type]
    assert torch.equal(point, actual.mean)


def test_slices_of_large_logits_are_weighed_exactly(device: str) -> None:
    """At logits of 1e6 a rounded log-sum-exp would not tell slices apart that differ by one sixteenth."""
    volume = torch.full((1, 8, 8, 8), 1e6, device=device)
    volume[0, 3] += 0.0625
    expected = reference.spatial_moments3d(volume.double())
    torch.testing.assert_close(kpfused.soft_argmax3d(volume).double(), expected.mean, rtol=0, atol=1e-6)


def test_a_leading_dimension_of_one_between_others(device: str) -> None:
    """It interrupts no run of beta's dimensions. As many slices as keypoints, which would hide a wrong broadcast."""
    volume, beta = cases.random((2, 1, 4, 4, 5, 6)).float().to(device), torch.rand(2, 1, 4, device=device) + 0.5
    actual = kpfused.spatial_moments3d(volume, beta)
    expected = reference.spatial_moments3d(volume.double(), beta.double())
    assert actual.logsumexp.shape == (2, 1, 4)
    torch.testing.assert_close(actual.logsumexp.double(), expected.logsumexp, rtol=0, atol=1e-5)
    torch.testing.assert_close(kpfused.soft_argmax3d(volume, beta).double(), expected.mean, rtol=0, atol=1e-5)


def test_degenerate_volumes(device: str) -> None:
    volume = cases.random((4, 3, 4, 5)).float().to(device)
    volume[0, 1, 2, 3], volume[1, 0, 0, 0], volume[2] = torch.nan, torch.inf, -torch.inf
    heatmap = volume.requires_grad_()
    point = kpfused.soft_argmax3d(heatmap)
    assert point.isnan().all(-1).tolist() == [True, True, True, False]
    (grad,) = torch.autograd.grad(point.sum(), heatmap)
    assert (grad[2] == 0).all()
    assert not grad[3].isnan().any()


@pytest.mark.parametrize("empty_value", [None, -1.0])
def test_empty_volumes(device: str, empty_value: float | None) -> None:
    """Of two volumes whose mask is empty, one holds NaN; of the last, one slice is empty."""
    volume = cases.random((4, 3, 4, 5)).to(device)
    mask = torch.ones_like(volume, dtype=torch.bool)
    volume[0, 1, 2, 3], mask[0], mask[1], mask[3, 1] = torch.nan, False, False, False
    heatmap, oracle = volume.clone().requires_grad_(), volume.nan_to_num().requires_grad_()
    actual = kpfused.spatial_moments3d(heatmap, 1.5, mask=mask, empty_value=empty_value)
    expected = reference.spatial_moments3d(oracle, 1.5, mask=mask, empty_value=empty_value)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    upstream = [torch.randn_like(field) for field in real_fields(expected)]
    got, want = (
        torch.autograd.grad(real_fields(m), leaf, upstream)[0] for m, leaf in ((actual, heatmap), (expected, oracle))
    )
    torch.testing.assert_close(got, want.nan_to_num(0))
    assert (got[:2] == 0).all()


def test_gradcheck(device: str) -> None:
    heatmap = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    beta = (torch.rand(2, dtype=torch.float64, device=device) + 0.5).requires_grad_()

    def function(h: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return real_fields(kpfused.spatial_moments3d(h, b, coordinates="unit"))

    assert torch.autograd.gradcheck(function, (heatmap, beta))
    assert torch.autograd.gradgradcheck(function, (heatmap, beta))


def test_function_transforms(device: str) -> None:
    heatmap = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64, device=device)
    expected = reference.spatial_moments3d(heatmap).mean
    torch.testing.assert_close(torch.vmap(kpfused.soft_argmax3d)(heatmap), expected)
    _, tangent = torch.func.jvp(kpfused.soft_argmax3d, (heatmap,), (heatmap,))
    _, wanted = torch.func.jvp(lambda h: reference.spatial_moments3d(h).mean, (heatmap,), (heatmap,))
    torch.testing.assert_close(tangent, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 384])
def test_row(device: str, size: int, dtype: torch.dtype) -> None:
    rows = (cases.random((4, 17, size)) * 2).to(device, dtype)
    mask = torch.rand(17, size, device=device) < 0.6
    mask[..., 0] = True
    actual = kpfused.spatial_moments1d(rows, 2.0, coordinates="unit", mask=mask)
    expected = reference.spatial_moments2d(
        rows.double()[..., None, :], 2.0, coordinates="unit", mask=mask[..., None, :]
    )
    shapes = {"mean": (1,), "covariance": (1, 1), "peak": (1,)}
    for name, got in actual._asdict().items():
        assert got.shape == (4, 17, *shapes.get(name, ()))
    cases.assert_coordinates(actual.mean[..., 0], expected.mean[..., 0], size, 1 / size)
    torch.testing.assert_close(
        actual.covariance[..., 0, 0].double(), expected.covariance[..., 0, 0], rtol=1e-5, atol=1e-9
    )
    assert torch.equal(actual.peak[..., 0], expected.peak[..., 0])
    point = kpfused.soft_argmax1d(rows, 2.0, coordinates="unit", mask=mask)
    cases.assert_coordinates(point[..., 0], expected.mean[..., 0], size, 1 / size)


@pytest.mark.parametrize(
    ("function", "shape", "words"),
    [
        (kpfused.soft_argmax1d, (), r"at least one dimension \(..., W\); got shape \(\)"),
        (kpfused.soft_argmax1d, (3, 0), r"W >= 1; got shape \(3, 0\)"),
        (kpfused.soft_argmax3d, (3, 3), r"at least three dimensions \(..., D, H, W\); got shape \(3, 3\)"),
        (kpfused.soft_argmax3d, (2, 0, 3, 3), r"D >= 1 and H >= 1 and W >= 1"),
    ],
)
def test_bad_shapes(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        function(torch.zeros(shape))


def test_bad_depth() -> None:
    with pytest.raises(ValueError, match="depth must divide the 6 channels of heatmap; got 4"):
        kpfused.soft_argmax3d(torch.zeros(2, 6, 3, 3), depth=4)
    with pytest.raises(TypeError, match="depth must be an int; got float"):
        kpfused.soft_argmax3d(torch.zeros(2, 6, 3, 3), depth=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"beta must broadcast against the leading dimensions \(2, 3\)"):
        kpfused.soft_argmax3d(torch.zeros(2, 3, 4, 5, 6), torch.ones(4))
