# SPDX-License-Identifier: MIT
"""The op of volumes: one call in each direction, fake kernels, compilers and transforms, and what makes it exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kpfused
from kpfused import SpatialMoments, reference
from tests import cases

OPS = torch.ops.kpfused
FORWARD, BACKWARD = OPS.spatial_moments3d.default, OPS.spatial_moments3d_backward.default
PRIVATE = OPS._spatial_moments3d.default, OPS._spatial_moments3d_backward.default
SHAPE = (2, 3, 4, 6, 5)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
REAL = [i for i, name in enumerate(SpatialMoments._fields) if name != "peak"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def volumes(device: str, layout: str = "contiguous", shape: tuple[int, ...] = SHAPE) -> Tensor:
    return cases.random(shape).float().to(device).contiguous(memory_format=LAYOUTS[layout])


def mask_of(device: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(shape[0], 1, *shape[2:], device=device) < 0.6


def outcome(function: Callable[..., SpatialMoments], *inputs: Tensor, only: list[int] = REAL) -> list[Tensor]:
    """All fields, and the gradients of a mixture of those in ``only``."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    moments = function(*leaves)
    fields = [moments[i] for i in only]
    return [*moments, *torch.autograd.grad(fields, leaves, [cases.upstream_of(f).to(f) for f in fields])]


class Calls(TorchDispatchMode):
    """Names of the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_call_in_each_direction(device: str, layout: str) -> None:
    heatmap = volumes(device, layout).requires_grad_()
    with Calls() as calls:
        point = kpfused.soft_argmax3d(heatmap, 2.0)
    assert calls.names == ["kpfused::_spatial_moments3d"]
    upstream = torch.ones_like(point)
    with Calls() as calls:
        (grad,) = torch.autograd.grad(point, heatmap, upstream)
    assert calls.names == ["kpfused::_spatial_moments3d_backward"]
    assert grad.stride() == heatmap.stride()


@pytest.mark.parametrize("only", [[i] for i in REAL], ids=[SpatialMoments._fields[i] for i in REAL])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_each_field_alone(device: str, layout: str, only: list[int]) -> None:
    heatmap, beta, mask = (
        volumes(device, layout).double(),
        torch.tensor([0.5, 1.0, 2.0], device=device),
        mask_of(device),
    )
    got = outcome(lambda h, b: kpfused.spatial_moments3d(h, b, mask=mask), heatmap, beta.double(), only=only)
    want = outcome(lambda h, b: reference.spatial_moments3d(h, b, mask=mask), heatmap, beta.double(), only=only)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("depth", [1, 2, 31, 33, 100])
def test_depths(device: str, depth: int) -> None:
    heatmap = volumes(device, shape=(2, 2, depth, 3, 4))
    got = outcome(kpfused.spatial_moments3d, heatmap)
    want = outcome(reference.spatial_moments3d, heatmap.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-4, atol=2e-5)


def test_covariance_of_a_sharp_peak_in_a_corner(device: str) -> None:
    """A tenth of a pixel wide on every axis, where sums about the centre would have lost all digits."""
    axes = (
        torch.arange(n, device=device, dtype=torch.float64) - at for n, at in ((48, 47.02), (200, 0.03), (256, 254.97))
    )
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    volume = (-50 * (x**2 + y**2 + z**2)).float()[None]
    got, want = kpfused.spatial_moments3d(volume), reference.spatial_moments3d(volume.double())
    torch.testing.assert_close(got.covariance.double(), want.covariance, rtol=1e-4, atol=1e-12)
    flat = torch.zeros(1, 3, 3, 3, device=device)
    flat[0, 1, 1, 1] = 200
    assert (kpfused.spatial_moments3d(flat).covariance[0].diagonal() == 0).all()


def test_first_of_equal_peaks(device: str) -> None:
    heatmap = torch.zeros(1, 4, 3, 3, device=device)
    heatmap[0, 1:, 2, 1] = 5.0
    assert kpfused.spatial_moments3d(heatmap).peak.tolist() == [[1, 2, 1]]
    only = [SpatialMoments._fields.index("peak_probability")]
    got = outcome(kpfused.spatial_moments3d, heatmap, only=only)[-1]
    torch.testing.assert_close(got.double(), outcome(reference.spatial_moments3d, heatmap.double(), only=only)[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_alone_and_among_others(device: str, layout: str) -> None:
    heatmap = volumes(device, layout, (7, 3, 40, 6, 5))
    together = outcome(kpfused.spatial_moments3d, heatmap)
    assert all(map(torch.equal, together, outcome(kpfused.spatial_moments3d, heatmap)))
    upstream = [cases.upstream_of(together[i]).to(together[i]) for i in REAL]
    for sample in (0, 6):
        alone = heatmap[sample : sample + 1].detach().requires_grad_()
        moments = kpfused.spatial_moments3d(alone)
        (grad,) = torch.autograd.grad([moments[i] for i in REAL], alone, [u[sample : sample + 1] for u in upstream])
        for a, b in zip((*moments, grad), together, strict=True):
            assert torch.equal(a, b[sample : sample + 1])


def test_no_volumes(device: str) -> None:
    heatmap = torch.zeros(0, 3, 4, 5, 6, device=device, requires_grad=True)
    moments = kpfused.spatial_moments3d(heatmap)
    assert [tuple(field.shape) for field in moments] == [(0, 3, 3), (0, 3, 3, 3), (0, 3), (0, 3), (0, 3, 3), (0, 3)]
    assert torch.autograd.grad(moments.mean.sum(), heatmap)[0].shape == heatmap.shape


# ---- Compilers and transforms ---------------------------------------------------------------------------------------


def everything(heatmap: Tensor, beta: Tensor) -> SpatialMoments:
    mask = torch.arange(heatmap.shape[-1], device=heatmap.device) % 3 != 1
    return kpfused.spatial_moments3d(heatmap, beta, coordinates="corners", mask=mask, empty_value=0.0)


@pytest.mark.parametrize(
    ("layout", "backend"), [("contiguous", "aot_eager"), ("channels_last_3d", "aot_eager"), ("contiguous", "inductor")]
)
def test_compiled_once_for_any_size(device: str, layout: str, backend: str) -> None:
    program = torch.compile(everything, fullgraph=True, dynamic=True, backend=backend)
    for step, shape in enumerate([SHAPE, (3, 3, 4, 6, 5), (4, 3, 7, 5, 9)]):
        heatmap, beta = volumes(device, layout, shape), torch.rand(3, device=device) + 0.5
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            *got, of_beta = outcome(program, heatmap, beta)
        *want, wanted_of_beta = outcome(everything, heatmap, beta)
        assert all(map(torch.equal, got, want))
        assert [t.stride() for t in got] == [t.stride() for t in want]
        torch.testing.assert_close(of_beta, wanted_of_beta)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_folds_the_batch(device: str, layout: str) -> None:
    heatmap, beta = volumes(device, layout), torch.rand(2, 3, device=device) + 0.5
    want = kpfused.spatial_moments3d(heatmap, beta)
    with Calls() as calls:
        got = torch.vmap(kpfused.spatial_moments3d)(heatmap, beta)
    assert calls.names.count("kpfused::_spatial_moments3d") == 1
    torch.testing.assert_close(got, want)
    moved = torch.vmap(lambda h: kpfused.soft_argmax3d(h, mask=h > -1), in_dims=1)(heatmap)
    torch.testing.assert_close(moved, kpfused.soft_argmax3d(heatmap, mask=heatmap > -1).transpose(0, 1))

    def loss(h: Tensor) -> Tensor:
        m = kpfused.spatial_moments3d(h)
        return m.mean.square().sum() + m.entropy.sum() + m.covariance.sum()

    each = torch.vmap(torch.func.grad(loss))(heatmap)
    leaf = heatmap.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(loss(leaf), leaf)[0])


def test_exported(device: str) -> None:
    class Head(torch.nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return kpfused.soft_argmax3d(image, 2.0, depth=4, coordinates="unit_centered")

    image = cases.random((2, 12, 6, 5)).float().to(device)
    dynamic = {"image": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    program = torch.export.export(Head().to(device), (image,), dynamic_shapes=dynamic)
    other = cases.random((3, 12, 9, 7)).float().to(device)
    assert torch.equal(program.module()(other), Head()(other))


# ---- The op itself --------------------------------------------------------------------------------------------------


def arguments(device: str, setting: int, masked: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of forward and of backward, with a gradient for all fields but one."""
    heatmap, beta = volumes(device), torch.rand(3, 1, device=device) + 0.5
    mask = mask_of(device).expand(SHAPE) if masked else None
    if setting < 0:
        heatmap, beta = heatmap.transpose(-3, -4).contiguous(), beta.mT.contiguous()
        mask = None if mask is None else mask.transpose(-3, -4)
    pixels = (mask, None, -1.0) if masked else ()
    forward = (heatmap.requires_grad_(), beta.requires_grad_(), 0.0, setting, *pixels)
    with torch.no_grad():
        *fields, stats, peaks, whole = FORWARD(*forward)
    grads = [cases.upstream_of(fields[i]).to(fields[i]).requires_grad_() for i in REAL]
    grads[2] = None
    return forward, (*grads, heatmap, stats, peaks, whole, beta, 0.0, setting, True, *pixels)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("setting", [1, ~1])
def test_opcheck(device: str, setting: int, masked: bool) -> None:
    forward, backward = arguments(device, setting, masked)
    torch.library.opcheck(FORWARD, forward)
    torch.library.opcheck(BACKWARD, backward)
    for op, call in zip(PRIVATE, (forward, backward), strict=True):
        torch.library.opcheck(op, tuple(a.detach() if isinstance(a, Tensor) else a for a in call))


@pytest.mark.parametrize("setting", [0, ~0])
def test_fake_results_are_like_the_real_ones(device: str, setting: int) -> None:
    for op, call in zip((FORWARD, BACKWARD), arguments(device, setting, masked=True), strict=True):
        with FakeTensorMode() as mode:
            promised = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call))
        found = op(*call)
        described = [[(t.shape, t.stride(), t.dtype, t.device) for t in results] for results in (promised, found)]
        assert described[0] == described[1]


BAD: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "no depth": lambda a: (a[0][0, 0, 0], None, 1.0, 0),
    "no keypoints beside depth": lambda a: (a[0][0, 0], None, 1.0, ~0),
    "no slices": lambda a: (a[0][:, :, :0], None, 1.0, 0),
    "unknown coordinates": lambda a: (*a[:3], 5),
    "unknown coordinates beside depth": lambda a: (*a[:3], ~5),
}


@pytest.mark.parametrize("name", BAD)
def test_fake_and_real_refuse_the_same(name: str) -> None:
    call = BAD[name](arguments("cpu", 0, masked=False)[0])
    with pytest.raises(RuntimeError):
        FORWARD(*call)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError):
        FORWARD(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call))


@pytest.mark.parametrize("position", [0, 6, 7, 8], ids=["grad_mean", "slice_stats", "slice_peaks", "stats"])
def test_backward_refuses_what_is_not_of_forward(position: int) -> None:
    call = list(arguments("cpu", 0, masked=False)[1])
    for bad in (call[position].half(), call[position][:1]):
        wrong = [*call[:position], bad, *call[position + 1 :]]
        with pytest.raises(RuntimeError):
            BACKWARD(*wrong)
        with FakeTensorMode() as mode, pytest.raises(RuntimeError):
            BACKWARD(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in wrong))


def test_volumes_have_no_valid_size() -> None:
    with pytest.raises(RuntimeError, match="volumes have no valid_size"):
        FORWARD(volumes("cpu"), None, 1.0, 0, None, torch.tensor([3, 4]), None)
