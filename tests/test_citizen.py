# SPDX-License-Identifier: MIT
"""The layer and the function where PyTorch's users take them: checkpoints, workers, threads, streams, graphs."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kpfused
from kpfused import SoftArgmax2d, reference

LAYERS: dict[str, Callable[[], SoftArgmax2d]] = {
    "number": lambda: SoftArgmax2d(3.0, coordinates="corners"),
    "temperature": lambda: SoftArgmax2d(temperature=0.5),
    "learnable": lambda: SoftArgmax2d(2.0, learnable=True),
    "per keypoint": lambda: SoftArgmax2d(2.0, learnable=True, num_keypoints=5),
}


def maps(batch: int = 2, height: int = 16, width: int = 12) -> Tensor:
    return torch.randn(batch, 5, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpoint_works_at_any_resolution(name: str) -> None:
    """Nothing of the map's size, and no coordinate grid, is in the state."""
    trained = LAYERS[name]()
    for parameter in trained.parameters():
        torch.nn.init.uniform_(parameter, -1.0, 1.0)
    trained(maps())
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert sum(value.numel() for value in state.values()) == {"learnable": 1, "per keypoint": 5}.get(name, 0)
    fresh = LAYERS[name]()
    fresh.load_state_dict(state)
    larger = maps(1, 33, 47)
    assert torch.equal(fresh(larger), trained(larger))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def point_and_gradients(heatmap: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    leaves = heatmap.detach().requires_grad_(), beta.detach().requires_grad_()
    points = kpfused.soft_argmax2d(*leaves)
    return points.detach(), *torch.autograd.grad(points.square().sum(), leaves)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_deterministic_algorithms(device: str, layout: torch.memory_format) -> None:
    heatmap = maps(8, 64, 48).to(device, memory_format=layout)
    beta = torch.full((5,), 2.0, device=device)
    first, second = (point_and_gradients(heatmap, beta) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_threads_at_once() -> None:
    """Python threads share the kernels, their tables and the choice of an instruction set, made at the first call."""
    inputs = [(maps(1 + i % 3, 8 + i, 20 - i), torch.rand(5) + 0.5) for i in range(12)]
    expected = [point_and_gradients(*pair) for pair in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda pair: point_and_gradients(*pair), inputs), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Points(Dataset[Tensor]):
    """What a data loader's worker computes: a map's point."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return kpfused.soft_argmax2d(maps()[index % 2] + index, 2.0)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    """A forked worker inherits a thread pool without its threads; a spawned one loads the module anew."""
    kpfused.soft_argmax2d(maps(8, 64, 64))  # so that the pool of this process has started
    loader = DataLoader(Points(), batch_size=2, num_workers=2, multiprocessing_context=start)
    got = torch.cat(list(loader))
    assert torch.equal(got, torch.stack([Points()[i] for i in range(6)]))


def test_inference_mode(device: str) -> None:
    heatmap = maps().to(device)
    with torch.inference_mode():
        points = kpfused.soft_argmax2d(heatmap, torch.tensor(2.0, device=device))
    assert points.is_inference()
    torch.testing.assert_close(points, reference.soft_argmax2d(heatmap, 2.0))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_streams() -> None:
    """The launch goes to the current stream: behind what fills the map there, and without a wait in between."""
    heatmaps = [maps(4, 64, 64) + i for i in range(4)]
    expected = [kpfused.soft_argmax2d(h.cuda(), 2.0) for h in heatmaps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in heatmaps]
    got = []
    for stream, heatmap in zip(streams, heatmaps, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            got.append(kpfused.soft_argmax2d(heatmap.pin_memory().to("cuda", non_blocking=True), 2.0))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_cuda
@pytest.mark.parametrize("shape", [(64, 48), (1024, 1024)], ids=["one launch", "split"])
def test_graph_capture(shape: tuple[int, int]) -> None:
    static = maps(2, *shape).cuda().requires_grad_()
    upstream = torch.ones(2, 5, 2, device="cuda")
    torch.autograd.grad(kpfused.soft_argmax2d(static), static, upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        points = kpfused.soft_argmax2d(static)
        (gradient,) = torch.autograd.grad(points, static, upstream)
    fresh = maps(2, *shape).flip(-1).cuda()
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    leaf = fresh.clone().requires_grad_()
    expected = kpfused.soft_argmax2d(leaf)
    assert torch.equal(points, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, leaf, upstream)[0])


FIRST_LAUNCH = """
import sys, torch, kpfused

function, layout = getattr(kpfused, sys.argv[1]), getattr(torch, sys.argv[2])

def run(leaf, beta):
    result = function(leaf, beta)
    points = result if torch.is_tensor(result) else result.mean
    return result, torch.autograd.grad(points.square().sum(), (leaf, beta))

heatmap = torch.randn(2, 5, int(sys.argv[3]), 64).cuda().to(memory_format=layout)
leaf, beta = heatmap.requires_grad_(), torch.ones(5, device="cuda", requires_grad=True)
torch.autograd.grad(((leaf * beta[:, None, None])[..., 0].square()).sum(), (leaf, beta))  # PyTorch's own first launches
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result, gradients = run(leaf, beta)
graph.replay()
expected, expected_gradients = run(leaf, beta)
flat = lambda result: [result] if torch.is_tensor(result) else list(result)
for got, want in zip([*flat(result), *gradients], [*flat(expected), *expected_gradients], strict=True):
    assert torch.equal(got, want)
"""


@needs_cuda
@pytest.mark.parametrize("height", ["48", "4096"], ids=["one launch", "split"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("function", ["soft_argmax2d", "spatial_moments2d"])
def test_graph_capture_of_the_first_launch(function: str, layout: str, height: str) -> None:
    """A process's first launch of a kernel loads its code: while a graph is captured too."""
    command = [sys.executable, "-c", FIRST_LAUNCH, function, layout, height]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    first, second = (point_and_gradients(maps().to(d), torch.ones(5, device=d)) for d in ("cuda:0", "cuda:1"))
    for a, b in zip(first, second, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())
