# SPDX-License-Identifier: MIT
"""torch.export, AOTInductor and ONNX of a small pose network and of every kind of head, with dynamic batch and size."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import kpfused
from kpfused import SoftArgmax2d, reference
from tests import cases

with contextlib.suppress(ImportError):  # without them, torch.export is tested all the same
    import onnx
    import onnxruntime

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)

FORMATS = [torch.contiguous_format, torch.channels_last]
SIZES = [(5, 3, 20, 31), (2, 3, 16, 12), (1, 3, 8, 40)]
DYNAMIC = ({0: Dim("batch"), 2: Dim("height", min=2), 3: Dim("width", min=2)},)


def network() -> nn.Module:
    head = SoftArgmax2d(2.0, learnable=True, num_keypoints=5, coordinates="corners")
    nn.init.uniform_(head.log_beta, -1.0, 2.0)
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), head).eval()


def exported(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, (example,), dynamic_shapes=DYNAMIC)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_export_save_and_load(device: str, layout: torch.memory_format) -> None:
    module = network().to(device, memory_format=layout)
    program = exported(module, torch.randn(2, 3, 16, 12, device=device).to(memory_format=layout))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in SIZES:
        image = torch.randn(size, device=device).to(memory_format=layout)
        with cases.KernelCalls() as counted:
            points = loaded(image)
        assert counted.calls() == (1, 0)
        assert torch.equal(points, module(image))
        gradients = [torch.autograd.grad(m(image).square().sum(), list(m.parameters())) for m in (loaded, module)]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_aot_inductor(device: str, tmp_path: Path) -> None:
    """A compiled package without Python in its path, with a channels_last input and a learned beta."""
    module = network().to(device, memory_format=torch.channels_last)
    example = torch.randn(2, 3, 16, 12, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported(module, example), package_path=str(tmp_path / "pose.pt2")
        )
        compiled = torch._inductor.aoti_load_package(package)
        for size in SIZES:
            image = torch.randn(size, device=device).to(memory_format=torch.channels_last)
            torch.testing.assert_close(compiled(image), module(image))


class Heads(nn.Module):
    """Every kind of head and every unit on one heatmap, so that one export covers them all."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            [
                SoftArgmax2d(3.0),
                SoftArgmax2d(-1.5),
                SoftArgmax2d(temperature=0.25, coordinates="corners"),
                SoftArgmax2d(torch.tensor([0.5, 1.0, 4.0]), coordinates="centers"),
                SoftArgmax2d(temperature=nn.Parameter(torch.tensor(0.5)), coordinates="unit"),
                SoftArgmax2d(2.0, learnable=True),
                SoftArgmax2d(2.0, learnable=True, num_keypoints=3, coordinates="unit_centered"),
            ]
        )

    def forward(self, heatmap: Tensor) -> list[Tensor]:
        return [head(heatmap) for head in self.heads]


def onnx_model(module: nn.Module) -> onnx.ModelProto:
    """The model, in which no op of this package is left and none of any domain but ONNX's own."""
    image = torch.randn(2, 3, 16, 12)
    program = torch.onnx.export(module.eval(), (image,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    assert program is not None
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    return model


def assert_runs_alike(model: onnx.ModelProto, module: nn.Module, image: Tensor) -> None:
    """Within 1e-4 of a pixel."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = module(image)
    heads = [m for m in module.modules() if isinstance(m, SoftArgmax2d)]
    expected = [expected] if isinstance(expected, Tensor) else expected
    for a, b, head in zip(got, expected, heads, strict=True):
        pixel = min(reference.coordinate_units(size, head.coordinates)[0] for size in image.shape[-2:])
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=0, atol=1e-4 * pixel, equal_nan=True)


@needs_onnx
def test_onnx_of_a_network() -> None:
    module = network()
    model = onnx_model(module)
    for size in SIZES:
        assert_runs_alike(model, module, torch.randn(size))


@needs_onnx
def test_onnx_of_every_head() -> None:
    """Sharp maps too, and maps with logits of -inf, which are NaN where beta is negative."""
    module = Heads()
    model = onnx_model(module)
    for size in SIZES:
        for kind in (cases.random, cases.peaked, cases.masked):
            assert_runs_alike(model, module, kind(size).float())


class Masked(nn.Module):
    """What else a head may give and take: masks, valid sizes, moments, debiasing."""

    def forward(self, heatmap: Tensor, mask: Tensor, size: Tensor) -> list[Tensor]:
        moments = kpfused.spatial_moments2d(heatmap, 2.0, coordinates="centers", mask=mask)
        sized = kpfused.spatial_moments2d(heatmap, valid_size=(size[:, :1], size[:, 1:]), empty_value=-1.0)
        return [
            kpfused.soft_argmax2d(heatmap, mask=mask, valid_size=(size[:, :1], size[:, 1:]), empty_value=0.0),
            kpfused.soft_argmax2d(heatmap, debias=True),
            *moments,
            *sized,
        ]


MASKED_DYNAMIC = (DYNAMIC[0], {0: DYNAMIC[0][0], 2: DYNAMIC[0][2], 3: DYNAMIC[0][3]}, {0: DYNAMIC[0][0]})


def masked_inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    batch, _, height, width = shape
    mask = torch.rand(batch, 1, height, width, generator=generator) < 0.6
    size = torch.stack([torch.randint(0, n + 1, (batch,), generator=generator) for n in (height, width)], -1)
    return torch.randn(shape, generator=generator), mask, size


@needs_onnx
def test_onnx_of_masks_and_moments() -> None:
    module = Masked()
    program = torch.onnx.export(
        module, masked_inputs((2, 3, 16, 12)), dynamo=True, dynamic_shapes=MASKED_DYNAMIC, verbose=False
    )
    assert program is not None
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for shape in SIZES:
        inputs = masked_inputs(shape)
        got = session.run(None, dict(zip(names, (i.numpy() for i in inputs), strict=True)))
        for a, b in zip(got, module(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_export_of_masks_and_moments(tmp_path: Path, device: str) -> None:
    module = Masked()
    inputs = tuple(i.to(device) for i in masked_inputs((2, 3, 16, 12)))
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=MASKED_DYNAMIC), tmp_path / "masked.pt2")
    loaded = torch.export.load(tmp_path / "masked.pt2").module()
    for shape in SIZES:
        inputs = tuple(i.to(device) for i in masked_inputs(shape))
        for a, b in zip(loaded(*inputs), module(*inputs), strict=True):
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


class Sized(nn.Module):
    """A valid size from the sizes that a program leaves open, and results by name."""

    def forward(self, heatmap: Tensor) -> kpfused.SpatialMoments:
        height, width = heatmap.shape[-2:]
        return kpfused.spatial_moments2d(heatmap, valid_size=(height - 1, width // 2))


def test_export_of_a_size_from_sizes(tmp_path: Path, device: str) -> None:
    torch.export.save(exported(Sized(), torch.randn(2, 3, 16, 12, device=device)), tmp_path / "sized.pt2")
    loaded = torch.export.load(tmp_path / "sized.pt2").module()
    for size in SIZES:
        image = torch.randn(size, device=device)
        got = loaded(image)
        assert isinstance(got, kpfused.SpatialMoments)
        assert all(map(torch.equal, got, Sized()(image)))


@needs_onnx
def test_onnx_of_a_size_from_sizes() -> None:
    module = Sized()
    session = onnxruntime.InferenceSession(onnx_model(module).SerializeToString(), providers=["CPUExecutionProvider"])
    for size in SIZES:
        image = torch.randn(size)
        got = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        for a, b in zip(got, module(image), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("with_grad", [False, True])
def test_torchscript(device: str, tmp_path: Path, with_grad: bool) -> None:
    """torch.jit.trace, which most call with gradients on: a program of the ops that users see, for any batch and size,
    through which gradients pass."""
    module = network().to(device)
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(module, torch.randn(2, 3, 16, 12, device=device))
    assert "kpfused::soft_argmax2d" in str(traced.inlined_graph)
    traced.save(tmp_path / "pose.pt")
    loaded = torch.jit.load(tmp_path / "pose.pt")
    for size in SIZES:
        image = torch.randn(size, device=device)
        assert torch.equal(loaded(image), module(image))
        gradients = [torch.autograd.grad(m(image).square().sum(), list(m.parameters())) for m in (loaded, module)]
        torch.testing.assert_close(gradients[0], gradients[1])


class Others(nn.Module):
    """The other ops, with a mask: the softmax map, expectations, the mass of a window, rows and volumes."""

    def forward(self, heatmap: Tensor, mask: Tensor, size: Tensor) -> list[Tensor]:
        p = kpfused.spatial_softmax2d(heatmap, mask=mask)
        return [
            p,
            kpfused.expectation2d(p),
            kpfused.spatial_expectation2d(heatmap, heatmap.unsqueeze(1), mask=mask),
            kpfused.window_mass(heatmap, 5, mask=mask),
            kpfused.soft_argmax1d(heatmap),
            kpfused.soft_argmax3d(heatmap, depth=3),
        ]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("module", [Masked(), Others()])
def test_torchscript_of_all_ops(device: str, module: nn.Module) -> None:
    inputs = tuple(i.to(device) for i in masked_inputs((2, 3, 16, 12)))
    inputs[0].requires_grad_()
    traced = torch.jit.trace(module, inputs)
    assert "kpfused::_" not in str(traced.inlined_graph)
    for shape in SIZES:
        inputs = tuple(i.to(device) for i in masked_inputs(shape))
        for a, b in zip(traced(*inputs), module(*inputs), strict=True):
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
