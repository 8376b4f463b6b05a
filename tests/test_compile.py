# SPDX-License-Identifier: MIT
"""torch.compile without graph breaks or needless recompilation; what fake kernels promise; opcheck of every op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import kpfused
from kpfused import SoftArgmax2d, kernels, ops, reference
from tests import cases

OPS = torch.ops.kpfused
FORWARD = (OPS.soft_argmax2d.default, OPS._soft_argmax2d.default)
BACKWARD = (OPS.soft_argmax2d_backward.default, OPS._soft_argmax2d_backward.default)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    """With every size dynamic from the start, so that any compilation after the first is one too many.

    ``aot_eager`` traces forward and backward with fake kernels as inductor does, and is quick: nothing is compiled.
    """
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def maps(batch: int, device: str, layout: str = "contiguous", size: tuple[int, int] = (16, 12)) -> Tensor:
    return cases.LAYOUTS[layout](cases.random((batch, 5, *size)).float().to(device))


def leaf(tensor: Tensor) -> Tensor:
    """A copy with a gradient, and the strides of the original."""
    return torch.empty_strided(tensor.size(), tensor.stride()).to(tensor).copy_(tensor).requires_grad_()


def outcome(function: Callable[..., Tensor], heatmap: Tensor, *others: Any) -> tuple[Tensor, ...]:
    leaves = [leaf(t) if isinstance(t, Tensor) else t for t in (heatmap, *others)]
    points = function(*leaves)
    wanted = [t for t in leaves if isinstance(t, Tensor)]
    return points, *torch.autograd.grad(points, wanted, cases.upstream_of(points).to(points.dtype))


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Coordinates and the heatmap's gradient to the bit. The compiler sums the gradient of a shared beta itself."""
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    torch.testing.assert_close(got[2:], want[2:])


# Arguments after the heatmap, for a batch of a given size.
CALLS: dict[str, Callable[[int], tuple[Callable[..., Tensor], tuple[Any, ...]]]] = {
    "number": lambda _: (lambda h: kpfused.soft_argmax2d(h, 3.0, coordinates="unit"), ()),
    "temperature": lambda _: (lambda h, t: kpfused.soft_argmax2d(h, temperature=t), (torch.tensor(0.5),)),
    "beta of a keypoint": lambda _: (kpfused.soft_argmax2d, (torch.rand(5) + 0.5,)),
    "beta of a sample": lambda b: (kpfused.soft_argmax2d, (torch.rand(b, 1) + 0.5,)),
    "beta of a map": lambda b: (kpfused.soft_argmax2d, (torch.rand(b, 5) + 0.5,)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("layout", "backend"), [("contiguous", "aot_eager"), ("transposed", "aot_eager"), ("channels_last", "inductor")]
)
def test_compiled_once_for_any_size(device: str, name: str, layout: str, backend: str) -> None:
    """Forward and backward; batch, height and width change, the program does not."""
    function, _ = CALLS[name](2)
    program = compiled(function, backend)
    for step, (batch, size) in enumerate([(2, (16, 12)), (3, (16, 12)), (7, (9, 31)), (4, (33, 6))]):
        others = [t.to(device) for t in CALLS[name](batch)[1]]
        arguments = (maps(batch, device, layout, size), *others)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert_same(outcome(program, *arguments), outcome(function, *arguments))


def masked_moments(heatmap: Tensor, beta: Tensor) -> Tensor:
    """Everything at once, as one tensor."""
    batch, _, height, width = heatmap.shape
    mask = torch.arange(height, device=heatmap.device)[:, None] % 5 != torch.arange(width, device=heatmap.device) % 3
    size = torch.arange(1, batch + 1, device=heatmap.device)[:, None].clamp(max=height)
    moments = kpfused.spatial_moments2d(heatmap, beta, mask=mask, coordinates="unit")
    sized = kpfused.soft_argmax2d(heatmap, beta, valid_size=(size, width), empty_value=0.0)
    fields = [moments.mean, moments.covariance.flatten(-2), sized, kpfused.soft_argmax2d(heatmap, debias=True)]
    numbers = torch.stack([moments.entropy, moments.logsumexp, moments.peak_probability], -1)
    return torch.cat([*fields, numbers, moments.peak.to(numbers)], -1)


@pytest.mark.parametrize(("layout", "backend"), [("contiguous", "aot_eager"), ("channels_last", "inductor")])
def test_masks_and_moments_compile_once(device: str, layout: str, backend: str) -> None:
    program = compiled(masked_moments, backend)
    for step, (batch, size) in enumerate([(2, (16, 12)), (3, (16, 12)), (4, (9, 31))]):
        heatmap, beta = maps(batch, device, layout, size), (torch.rand(5) + 0.5).to(device)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got, want = outcome(program, heatmap, beta), outcome(masked_moments, heatmap, beta)
        # The compiler adds up the gradients of three calls in an order of its own.
        torch.testing.assert_close(got, want)
        assert torch.equal(got[0][..., :8], want[0][..., :8])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_compiled_dtypes(device: str, dtype: torch.dtype) -> None:
    heatmap = maps(2, device, "channels_last").to(dtype)
    assert_same(outcome(compiled(kpfused.soft_argmax2d), heatmap), outcome(kpfused.soft_argmax2d, heatmap))


def test_compiled_network_trains(device: str) -> None:
    """Between a convolution and a loss; automatic dynamic shapes compile a second time and then no more."""
    torch.manual_seed(0)
    head = SoftArgmax2d(2.0, learnable=True, num_keypoints=5, coordinates="corners")
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), head).to(device, memory_format=torch.channels_last)
    program = torch.compile(network, fullgraph=True)
    for step, batch in enumerate([2, 3, 5, 8]):
        image = torch.randn(batch, 3, 16, 12, device=device).to(memory_format=torch.channels_last)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            for module in (program, network):
                network.zero_grad()
                points = module(image)
                points.square().sum().backward()
                results.append((points.detach(), *[p.grad for p in network.parameters()]))
        torch.testing.assert_close(results[0], results[1])


def test_a_schedule_of_beta_compiles_once_as_a_tensor(device: str) -> None:
    head = SoftArgmax2d(torch.tensor(1.0)).to(device)
    program, heatmap = compiled(head), maps(2, device)
    for step in range(4):
        head.beta.fill_(1.0 + step)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert torch.equal(program(heatmap), kpfused.soft_argmax2d(heatmap, 1.0 + step))


def test_a_number_that_changes_breaks_no_graph(device: str) -> None:
    """The compiler turns a number that it has seen change into a symbol, which the checks have to accept."""
    for name in ("beta", "temperature"):
        program = compiled(lambda h, number, name=name: kpfused.soft_argmax2d(h, **{name: number}))
        heatmap = maps(2, device)
        for number in (0.5, 2.0, 3.5):
            assert torch.equal(program(heatmap, number), kpfused.soft_argmax2d(heatmap, **{name: number}))


def test_errors_under_the_compiler(device: str) -> None:
    with pytest.raises(Exception, match="must broadcast against the leading dimensions"):
        compiled(kpfused.soft_argmax2d)(maps(2, device), torch.ones(4, device=device))


def test_compiled_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "takes_composition", lambda *_: True)
    heatmap = maps(2, "cpu")
    got = torch.compile(kpfused.soft_argmax2d, fullgraph=True, backend=without_kernels)(heatmap, 2.0)
    torch.testing.assert_close(got, reference.soft_argmax2d(heatmap, 2.0))


def test_compiled_backward_of_an_eager_call(device: str) -> None:
    """Compiled autograd traces the Python that the engine would have called."""
    heatmap, beta = maps(2, device).requires_grad_(), torch.full((5,), 2.0, device=device, requires_grad=True)
    mask = torch.rand(heatmap.shape[-2:], device=device) < 0.7

    def gradients() -> tuple[Tensor, ...]:
        moments = kpfused.spatial_moments2d(heatmap, beta, mask=mask, empty_value=0.0)
        loss = kpfused.soft_argmax2d(heatmap, beta).square().sum() + moments.covariance.sum() + moments.entropy.sum()
        return torch.autograd.grad(loss, (heatmap, beta))

    expected = gradients()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        actual = gradients()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def without_kernels(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A compiler that runs the graph as it is, and accepts none of this package's ops in it."""
    assert not [node for node in module.graph.nodes if "kpfused" in str(node.target)]
    return module.forward


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "vmap": lambda f, h: vmap(f)(h),
    "vmap of grad": lambda f, h: vmap(grad(lambda x: f(x).square().sum()))(h),
    "jacrev": lambda f, h: jacrev(f)(h),
    "jvp": lambda f, h: jvp(f, (h,), (h.cos(),)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms(device: str, name: str) -> None:
    """These take the composition, which the compiler fuses."""
    heatmap = cases.random((2, 3, 4, 5)).to(device)
    program = torch.compile(lambda h: TRANSFORMS[name](kpfused.soft_argmax2d, h), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(program(heatmap), TRANSFORMS[name](reference.soft_argmax2d, heatmap))


def arguments(device: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, beta: Any) -> tuple[Any, ...]:
    """Of the forward ops. ``beta``: None or the shape of a tensor."""
    heatmap = cases.LAYOUTS[layout](cases.random(shape).to(device, dtype))
    tensor = None if beta is None else (torch.rand(beta) + 0.5).to(device, kernels.accumulator_dtype(dtype))
    return heatmap, tensor, 1.5, 3


def backward_arguments(forward: tuple[Any, ...], needs_grad_beta: bool) -> tuple[Any, ...]:
    points, stats = FORWARD[1](*forward)
    heatmap, beta, value, coordinates = forward
    return torch.randn_like(points), heatmap, stats, beta, value, coordinates, needs_grad_beta


# One point for each thing that strides, dtypes or sizes of results can depend on: rank, a dimension of one, no maps,
# dense and sliced memory, windows that overlap, each dtype, and beta absent, shared and of each map.
SAMPLES: list[tuple[tuple[int, ...], str, torch.dtype, Any]] = [
    *[((2, 3, 6, 8), layout, torch.float32, (3,)) for layout in cases.LAYOUTS],
    *[((2, 3, 6, 8), layout, torch.float32, None) for layout in cases.LAYOUTS],
    *[((2, 3, 6, 8), layout, dtype, ()) for dtype in cases.DTYPES[1:] for layout in ("contiguous", "channels_last")],
    *[((1, 3, 6, 8), layout, torch.float32, (1, 3)) for layout in ("channels_last", "sliced_channels_last")],
    *[((2, 1, 6, 8), layout, torch.float32, (2, 1)) for layout in ("channels_last", "transposed")],
    *[((2, 4, 3, 6, 8), layout, torch.float32, (2, 4, 3)) for layout in cases.LAYOUTS],
    *[(shape, "contiguous", torch.float32, ()) for shape in [(6, 8), (3, 6, 8), (0, 3, 6, 8), (2, 0, 6, 8)]],
    *[((2, 3, *size), "channels_last", torch.float32, (2, 3)) for size in [(1, 1), (1, 8), (6, 1)]],
]


def expanded(device: str) -> tuple[Any, ...]:
    return cases.random((1, 3, 6, 8)).float().to(device).expand(4, 3, 6, 8), None, 1.0, 0


def overlapping(device: str) -> tuple[Any, ...]:
    return cases.random((7, 40)).float().to(device).unfold(1, 20, 1)[:, :3].permute(1, 0, 2), None, 1.0, 0


def samples(device: str) -> Iterator[tuple[Any, ...]]:
    yield from (arguments(device, *sample) for sample in SAMPLES)
    yield expanded(device)
    yield overlapping(device)


def described(results: tuple[Tensor | None, ...]) -> list[tuple[Any, ...] | None]:
    return [
        t if t is None else (tuple(map(int, t.shape)), tuple(map(int, t.stride())), t.dtype, t.device) for t in results
    ]


@pytest.mark.parametrize("symbolic", [False, True])
def test_fake_results_are_like_the_real_ones(device: str, symbolic: bool) -> None:
    """With symbolic sizes, which are slow, for every third sample."""
    count = 0
    for forward in itertools.islice(samples(device), 0, None, 3 if symbolic else 1):
        calls = [(op, forward, True) for op in FORWARD]
        for needs in {False, forward[1] is not None}:
            calls += [(op, backward_arguments(forward, needs), needs) for op in BACKWARD]
        for op, call, has_all in calls:
            with FakeTensorMode(shape_env=ShapeEnv() if symbolic else None) as mode:
                promised = op(*cases.faked(mode, call))
            assert all(isinstance(t, FakeTensor) for t in (promised if has_all else promised[:-1]))
            assert has_all or promised[-1] is None  # the gradient of beta, which nobody asked for
            assert described(promised) == described(op(*call)), (op, call[0].shape, call[0].stride())
            count += 1
    assert count > (50 if symbolic else 150)


BAD: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "integers": lambda a: (a[0].long(), *a[1:]),
    "one dimension": lambda a: (a[0].flatten(), *a[1:]),
    "no pixels": lambda a: (a[0][..., :0], *a[1:]),
    "beta does not broadcast": lambda a: (a[0], torch.ones(4), *a[2:]),
    "beta of more dimensions": lambda a: (a[0], torch.ones(1, 2, 3), *a[2:]),
    "beta of another dtype": lambda a: (a[0], a[1].double(), *a[2:]),
    "beta is not contiguous": lambda a: (a[0], torch.ones(3, 2).mT, *a[2:]),
    "unknown coordinates": lambda a: (*a[:3], 5),
    "negative coordinates": lambda a: (*a[:3], -1),
}


@pytest.mark.parametrize("name", BAD)
def test_fake_and_real_refuse_the_same(name: str) -> None:
    call = BAD[name](arguments("cpu", (2, 3, 6, 8), "contiguous", torch.float32, (3,)))
    for op in FORWARD:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            op(*call)
        with FakeTensorMode() as mode, pytest.raises((RuntimeError, TypeError, ValueError)):
            op(*cases.faked(mode, call))


@pytest.mark.parametrize("position", [0, 2], ids=["grad", "stats"])
def test_fake_and_real_backward_refuse_the_same(position: int) -> None:
    call = list(backward_arguments(arguments("cpu", (2, 3, 6, 8), "contiguous", torch.float32, (3,)), True))
    for bad in (call[position].double(), call[position][:1]):
        wrong = [*call[:position], bad, *call[position + 1 :]]
        for op in BACKWARD:
            with pytest.raises(RuntimeError):
                op(*wrong)
            with FakeTensorMode() as mode, pytest.raises(RuntimeError):
                op(*cases.faked(mode, wrong))


CHECKED = [
    ((2, 3, 6, 8), "contiguous", torch.float32, None),
    ((2, 3, 6, 8), "channels_last", torch.float64, (3,)),
    ((2, 3, 6, 8), "transposed", torch.bfloat16, ()),
    ((2, 4, 3, 6, 8), "sliced_channels_last", torch.float32, (2, 1, 1)),
    ((6, 8), "sliced", torch.float16, ()),
]


@pytest.mark.parametrize("sample", CHECKED, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: str, sample: Any, requires_grad: bool) -> None:
    """Schema, autograd registration, fake kernels, and tracing of forward and backward with dynamic shapes."""
    forward = arguments(device, *sample)
    backward = backward_arguments(forward, forward[1] is not None)
    for public, private, call in ((*FORWARD, forward), (*BACKWARD, backward)):
        tensors = [a.requires_grad_(requires_grad) if isinstance(a, Tensor) else a for a in map(detached, call)]
        torch.library.opcheck(public, tensors)
        if not requires_grad:  # the private ops have no autograd formula: their caller brings its own
            torch.library.opcheck(private, tensors)


PIXELS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "all": lambda: (),
    "mask": lambda: ((torch.rand(2, 1, 6, 8) < 0.6).expand(2, 3, 6, 8), None, None),
    "size": lambda: (None, torch.tensor([[[3, 8]], [[6, 2]]]), None),
    "both": lambda: ((torch.rand(6, 8) < 0.6).expand(2, 3, 6, 8), torch.tensor([4, 5]), -1.0),
}


@pytest.mark.parametrize("name", ["soft_argmax2d", "spatial_moments2d"])
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_of_masks_and_moments(device: str, name: str, pixels: str, layout: str) -> None:
    kernel = {"soft_argmax2d": kernels.SOFT_ARGMAX2D, "spatial_moments2d": kernels.MOMENTS2D}[name]
    counting = [a.to(device) if isinstance(a, Tensor) else a for a in PIXELS[pixels]()]
    heatmap, beta, *units = arguments(device, (2, 3, 6, 8), layout, torch.float32, (3,))
    forward = (heatmap.requires_grad_(), beta.requires_grad_(), *units, *counting)
    torch.library.opcheck(kernel.forward, forward)
    with torch.no_grad():
        results = kernel.forward(*forward)
        torch.library.opcheck(kernel.eager_forward, tuple(map(detached, forward)))
    kept = [results[i] for i in kernel.kept]
    grads = [torch.randn_like(results[i]) for i in kernel.differentiable]
    backward = (*grads, heatmap, *kept, beta, *units, True, *counting)
    torch.library.opcheck(kernel.backward, backward)
    torch.library.opcheck(kernel.eager_backward, tuple(map(detached, backward)))


def detached(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) else argument
