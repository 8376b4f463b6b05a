# SPDX-License-Identifier: MIT
"""What compilers and exporters see of CUDA tensors, also on machines that have no CUDA device: fake tensors need none.

Autograd does, even for fake ones. Gradients are those of the backward ops, asked by themselves.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils.cpp_extension import include_paths, library_paths

sys.path.insert(0, str(Path(__file__).parent))

from simt import build

import kpfused
from kpfused import kernels, ops
from tests import cases

OPS = torch.ops.kpfused
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def _guard() -> None:
    """A device for a PyTorch that knows of none, until the process ends."""
    if torch.backends.cuda.is_built():
        return
    if shutil.which(build.CXX) is None:
        pytest.skip(f"needs a C++ compiler; {build.CXX} is none")
    source = Path(__file__).with_name("fake_device.cpp")
    flags = ["-std=c++20", "-DNDEBUG", "-shared", "-fPIC", *(f"-I{folder}" for folder in include_paths())]
    link = [*(f"-L{folder}" for folder in library_paths()), "-lc10"]
    library = build.cached(".so", [*flags, torch.__version__, source], [build.CXX, *flags, source, *link])
    ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a build that has CUDA kernels."""
    monkeypatch.setattr(ops, "HAS_CUDA", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fake(argument: Any) -> Any:
    """A fake CUDA tensor with the strides of a real one."""
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=CUDA)


def masked(heatmap: Tensor) -> Tensor:
    return torch.arange(heatmap.shape[-1], device=heatmap.device) % 3 != 1


# Of a heatmap (B, 4, H, W) and a beta of keypoints.
PROGRAMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "mean": (kpfused.soft_argmax2d, "soft_argmax2d"),
    "numbers": (lambda h, _: kpfused.soft_argmax2d(h, temperature=0.5, coordinates="unit"), "soft_argmax2d"),
    "debias": (lambda h, b: kpfused.soft_argmax2d(h, b, debias=True), "spatial_moments2d"),
    "valid size": (lambda h, b: kpfused.soft_argmax2d(h, b, valid_size=(3, 4), empty_value=0.0), "soft_argmax2d"),
    "rows": (lambda h, b: kpfused.soft_argmax1d(h[..., 0, :], b), "soft_argmax2d"),
    "moments": (lambda h, b: kpfused.spatial_moments2d(h, b, mask=masked(h)), "spatial_moments2d"),
    "volumes": (lambda h, b: kpfused.soft_argmax3d(h.unflatten(1, (2, 2)), b[:2]), "spatial_moments3d"),
    "softmax": (kpfused.spatial_softmax2d, "spatial_softmax2d"),
    "expected values": (
        lambda h, b: kpfused.spatial_expectation2d(h, h.unsqueeze(2), b, mask=masked(h)),
        "spatial_expectation2d",
    ),
    "probability maps": (lambda h, _: kpfused.expectation2d(h), "expectation2d"),
    "window": (lambda h, b: kpfused.window_mass(h, 3, b, around="peak"), "window_mass2d"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_graph_for_any_size(name: str, layout: torch.memory_format) -> None:
    """No graph break, nothing compiled again for another batch or size, and the op in it."""
    program, op = PROGRAMS[name]
    graphs = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append({str(node.target) for node in module.graph.nodes})
        return module.forward

    compiled = torch.compile(program, backend=keep, fullgraph=True, dynamic=True)
    with FakeTensorMode(), torch.no_grad():
        for batch, height, width in [(2, 6, 8), (3, 6, 8), (5, 9, 31)]:
            heatmap = torch.empty((batch, 4, height, width), device=CUDA).to(memory_format=layout)
            results = compiled(heatmap, torch.ones(4, device=CUDA))
            for result in results if isinstance(results, tuple) else (results,):
                assert result.device == CUDA
                assert result.shape[0] == batch
    (targets,) = graphs
    assert f"kpfused.{op}.default" in targets


Calls = Iterator[tuple[Any, tuple[Any, ...]]]


def calls(kernel: kernels.Kernel, layout: str, dtype: torch.dtype, pixels: str) -> Calls:
    """The ops of a kernel, each with arguments on the CPU."""
    volumes = kernel.of_slices is not None
    heatmap = cases.LAYOUTS[layout](cases.random((2, 4, 3, 6, 8) if volumes else (2, 3, 6, 8)).to(dtype))
    beta = None if kernel is kernels.EXPECTATION2D else torch.rand(3).to(kernels.accumulator_dtype(dtype)) + 0.5
    counting = {
        "all": (),
        "mask": ((torch.rand(6, 8) < 0.6).expand(heatmap.shape), None, 0.0),
        "size": (None, torch.tensor([4, 5]), None),
    }[pixels]
    setting = 3 if kernel is kernels.WINDOW_MASS2D else 0
    forward = (heatmap, beta, 1.5, setting, *counting)
    results = kernel.forward(*forward)
    yield from ((op, forward) for op in (kernel.forward, kernel.eager_forward))
    kept = [results[i] for i in kernel.kept]
    grads = [torch.randn_like(results[i]) for i in kernel.differentiable]
    backward = (*grads, heatmap, *kept, beta, 1.5, setting, beta is not None, *counting)
    yield from ((op, backward) for op in (kernel.backward, kernel.eager_backward))
    if kernel.takes_result:
        of_result = (*grads, results[0], *kept, beta, 1.5, kernels.OF_RESULT, False, *counting)
        yield from ((op, of_result) for op in (kernel.backward, kernel.eager_backward))


def expectation_calls(layout: str, dtype: torch.dtype) -> Calls:
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 6, 8)).to(dtype))
    values = cases.LAYOUTS[layout](torch.randn(2, 5, 6, 8).to(dtype)).unsqueeze(1)  # shared by the keypoints
    beta = torch.rand(3).to(kernels.accumulator_dtype(dtype)) + 0.5
    mask = (torch.rand(6, 8) < 0.6).expand(heatmap.shape)
    for counting in ((), (mask, None, 0.0), (None, torch.tensor([4, 5]), None)):
        forward = (heatmap, values, beta, 0.0, *counting)
        mean, stats = OPS.spatial_expectation2d(*forward)
        yield OPS.spatial_expectation2d.default, forward
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            backward = (torch.randn_like(mean), heatmap, values, mean, stats, beta, 0.0, *needs, *counting)
            yield OPS.spatial_expectation2d_backward.default, backward


def described(results: Any) -> list[tuple[Any, ...] | None]:
    results = results if isinstance(results, tuple) else (results,)
    return [None if t is None else (tuple(t.shape), tuple(t.stride()), t.dtype) for t in results]


def assert_like_the_cpu(op: Any, call: tuple[Any, ...]) -> None:
    with FakeTensorMode():
        promised = op(*map(fake, call))
    assert {t.device for t in promised if t is not None} == {CUDA}
    assert described(promised) == described(op(*call)), op


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_results_of_the_ops(kernel: kernels.Kernel, layout: str, dtype: torch.dtype) -> None:
    """Forward and backward, on the device of the heatmap, in the shapes, strides and dtypes of the CPU's."""
    for pixels in ("all", "mask") if kernel.of_slices else ("all", "mask", "size"):
        for op, call in calls(kernel, layout, dtype, pixels):
            assert_like_the_cpu(op, call)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_results_of_expectations(layout: str, dtype: torch.dtype) -> None:
    for op, call in expectation_calls(layout, dtype):
        assert_like_the_cpu(op, call)


def test_exported_network() -> None:
    """With a batch and a size that may change."""
    with FakeTensorMode(), torch.device(CUDA):
        head = kpfused.SoftArgmax2d(2.0, learnable=True, num_keypoints=5, coordinates="corners")
        network = nn.Sequential(nn.AvgPool2d(2), head).eval()
        dynamic = ({0: Dim("batch"), 2: 2 * Dim("height", min=2), 3: 2 * Dim("width", min=2)},)
        program = torch.export.export(network, (torch.empty(2, 5, 16, 12),), dynamic_shapes=dynamic)
    (node,) = (node for node in program.graph.nodes if node.target is OPS.soft_argmax2d.default)
    points = node.meta["val"][0]
    assert points.device == CUDA
    assert points.shape[1:] == (5, 2)
    assert isinstance(points.shape[0], torch.SymInt)
