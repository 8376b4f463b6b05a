# SPDX-License-Identifier: MIT
"""Sample maps, memory layouts and tolerances that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kpfused import SpatialMoments, reference

inf = torch.inf
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Why these sizes: one pixel; one row; one column; below one vector; vector tails of every kernel (odd widths); widths
# of whole vectors for every dtype; sizes in use; a map of several chunks on the CPU (256 x 256).
SHAPES = [
    (2, 3, 1, 1),
    (2, 3, 1, 9),
    (2, 3, 9, 1),
    (5, 3, 3, 3),
    (2, 2, 4, 5),
    (2, 5, 7, 9),
    (2, 17, 12, 10),
    (2, 3, 8, 17),
    (1, 2, 47, 53),
    (2, 3, 16, 47),
    (2, 17, 64, 48),
    (2, 5, 9, 32),
    (1, 3, 96, 72),
    (1, 2, 256, 256),
    (2, 1, 1, 20000),
    (1, 1, 20000, 1),
    (7, 13, 16),
    (13, 16),
    (2, 2, 2, 3, 6, 8),
]


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def flat(shape: tuple[int, ...]) -> Tensor:
    return random(shape) * 1e-3 + 3


def peaked(shape: tuple[int, ...]) -> Tensor:
    """One sharp peak at a random pixel."""
    maps = random(shape).flatten(-2)
    at = torch.randint(maps.shape[-1], (*maps.shape[:-1], 1))
    return maps.scatter_add(-1, at, torch.full_like(at, 20, dtype=maps.dtype)).view(shape)


def two_peaked(shape: tuple[int, ...]) -> Tensor:
    return peaked(shape) + peaked(shape)


def border_peaked(shape: tuple[int, ...]) -> Tensor:
    """All weight in the last row and column, where coordinates are largest."""
    maps = random(shape)
    maps[..., -1, :] += 15
    maps[..., :, -1] += 15
    return maps


def offset_1e4(shape: tuple[int, ...]) -> Tensor:
    """Differences that matter on top of logits of 1e4."""
    return random(shape) * 2 + 1e4


def spread_1e4(shape: tuple[int, ...]) -> Tensor:
    return random(shape).sign() * 1e4 + random(shape)


def spread_1e30(shape: tuple[int, ...]) -> Tensor:
    return random(shape) * 1e30


def masked(shape: tuple[int, ...]) -> Tensor:
    """-inf on about half of the pixels, never on all of a map."""
    maps = random(shape)
    maps[torch.rand(shape) < 0.5] = -inf
    maps[..., -1, -1] = 0.5
    return maps


FINITE: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    f.__name__: f
    for f in (random, flat, peaked, two_peaked, border_peaked, offset_1e4, spread_1e4, spread_1e30, masked)
}


def contiguous(heatmap: Tensor) -> Tensor:
    return heatmap.contiguous()


def channels_last(heatmap: Tensor) -> Tensor:
    """Keypoints innermost, for any number of leading dimensions."""
    if heatmap.dim() < 3:
        return heatmap.contiguous()
    return heatmap.movedim(-3, -1).contiguous().movedim(-1, -3)


def sliced(heatmap: Tensor) -> Tensor:
    """A window of a larger tensor: rows apart, first element off every vector boundary."""
    *leading, height, width = heatmap.shape
    base = torch.full((*leading, height + 2, width + 3), torch.nan, dtype=heatmap.dtype, device=heatmap.device)
    window = base[..., 1:-1, 1:-2]
    return window.copy_(heatmap)


def sliced_channels_last(heatmap: Tensor) -> Tensor:
    """channels_last with more channels in memory than in the tensor."""
    if heatmap.dim() < 3:
        return sliced(heatmap)
    base = torch.full_like(channels_last(torch.cat([heatmap, heatmap[..., :1, :, :]], -3)), torch.nan)
    window = base[..., 1:, :, :]
    return window.copy_(heatmap)


def transposed(heatmap: Tensor) -> Tensor:
    return heatmap.mT.contiguous().mT


def every_other(heatmap: Tensor) -> Tensor:
    """Every second pixel of a wider tensor along x: no kernel reads it in place."""
    base = heatmap.repeat_interleave(2, -1)
    return base[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (contiguous, channels_last, sliced, sliced_channels_last, transposed, every_other)
}


# Which pixels count of maps (B, K, H, W), as the arguments that say so.
PIXELS: dict[str, Callable[[tuple[int, int, int, int]], dict[str, Any]]] = {
    "map": lambda s: {"mask": torch.rand(s[2:]) < 0.6},
    "image": lambda s: {"mask": torch.rand(s[0], 1, *s[2:]) < 0.6},
    "keypoint": lambda s: {"mask": torch.rand(s[1], 1, s[3]) < 0.6},
    "all": lambda s: {"mask": torch.rand(s) < 0.6},
    "all_channels_last": lambda s: {"mask": (torch.rand(s) < 0.6).contiguous(memory_format=torch.channels_last)},
    "strided": lambda s: {"mask": (torch.rand(s[3], s[2]) < 0.6).mT},
    "numbers": lambda s: {"valid_size": ((s[2] + 1) // 2, (s[3] + 2) // 3)},
    "size_of_image": lambda s: {
        "valid_size": (torch.randint(0, s[2] + 2, (s[0], 1)), torch.randint(0, s[3] + 2, (s[0], 1)))
    },
    "size_of_map": lambda s: {"valid_size": (torch.randint(1, s[2] + 1, s[:2]), s[3])},
    "both": lambda s: {
        "mask": torch.rand(s) < 0.6,
        "valid_size": (torch.randint(1, s[2] + 1, (s[1],)), (s[3] + 1) // 2),
    },
    "nothing": lambda s: {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)},
}


def on(device: str, pixels: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return {k: tuple(map(move, v)) if isinstance(v, tuple) else move(v) for k, v in pixels.items()}


def faked(mode: FakeTensorMode, call: Iterable[Any]) -> list[Any]:
    """Arguments of an op, with fake tensors in place of real ones."""
    return [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call]


def oracle(heatmap: Tensor, beta: Tensor | float = 1.0, coordinates: str = "pixel") -> Tensor:
    """The reference in float64."""
    beta = beta.double() if isinstance(beta, Tensor) else beta
    return reference.soft_argmax2d(heatmap.double(), beta, coordinates=coordinates)


def gradients(
    function: Callable[..., Tensor], heatmap: Tensor, *args: object, upstream: Tensor | None = None, **kwargs: object
) -> Tensor:
    """d(sum of upstream * function) / d heatmap; a fixed random upstream, in which x and y differ."""
    leaf = heatmap.detach().requires_grad_()
    result = function(leaf, *args, **kwargs)
    if upstream is None:
        upstream = upstream_of(result)
    return torch.autograd.grad(result, leaf, upstream.to(result.dtype))[0]


def upstream_of(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.device)


def real_fields(moments: SpatialMoments) -> list[Tensor]:
    """All fields that have a gradient."""
    return [field for field in moments if field is not moments.peak]


def mixture(moments: SpatialMoments) -> Tensor:
    """A loss of every field, of which the parts of a field weigh differently."""
    return torch.stack([(f * upstream_of(f).to(f.dtype)).sum() for f in real_fields(moments)]).sum()


def assert_moments(
    actual: SpatialMoments, expected: SpatialMoments, height: int, width: int, logits: float = 0.0
) -> None:
    """As :func:`assert_coordinates`; fields beside the mean within a few roundings of their own size.

    ``logits``: the size of the largest, in whose float64 rounding the oracle itself errs.
    """
    size = max(height, width)
    oracle = 4 * torch.finfo(torch.float64).eps * logits
    assert_coordinates(actual.mean, expected.mean, size, slack=oracle * size)
    assert torch.equal(actual.peak, expected.peak)
    eps = torch.finfo(actual.mean.dtype).eps
    relative = {"covariance": 400 * eps, "entropy": 40 * eps, "logsumexp": 10 * eps, "peak_probability": 60 * eps}
    # Near zero, what the logits' differences are rounded to decides: of a variance and of an entropy.
    absolute = {"covariance": 40 * eps, "entropy": 40 * eps, "logsumexp": 40 * eps, "peak_probability": 0.0}
    for name, rtol in relative.items():
        got, want = getattr(actual, name).double(), getattr(expected, name)
        scale = want.nan_to_num(0, 0, 0).abs().max().item() if name == "covariance" else 0.0
        slack = oracle * (size**2 if name == "covariance" else 1)
        torch.testing.assert_close(
            got,
            want,
            rtol=rtol,
            atol=absolute[name] + 4 * eps * scale + slack,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_coordinates(actual: Tensor, expected: Tensor, size: int, scale: float = 1.0, slack: float = 0.0) -> None:
    """Within a few float32 roundings of a coordinate on an axis of ``size`` pixels; ``scale``: one pixel in units."""
    steps = 4 if actual.dtype == torch.float32 else 64
    tolerance = steps * torch.finfo(actual.dtype).eps * max(size, 2) * scale + slack
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance, equal_nan=True)


def assert_gradients(actual: Tensor, expected: Tensor, size: float = 0) -> None:
    """Relative to the largest gradient of the tensor, and to a coordinate's rounding on an axis of ``size`` pixels.

    The second part counts for sharp maps: at the peak, P is near one and the gradient is that times the distance of
    the peak from the mean, which vanishes.
    """
    accumulator = torch.float64 if actual.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(actual.dtype).eps if actual.dtype != accumulator else 0.0
    largest = expected.nan_to_num(0).abs().max().item()
    # float64 has the oracle's own roundings on the other side.
    steps, pixels = (40, 4) if accumulator == torch.float32 else (400, 40)
    tolerance = torch.finfo(accumulator).eps * (steps * largest + pixels * size) + torch.finfo(actual.dtype).tiny
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=tolerance, equal_nan=True)


class KernelCalls(TorchDispatchMode):
    """Notes the dtype of the heatmap at each call of a kernel, forward and backward, whichever its name."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: list[torch.dtype] = []
        self.backward: list[torch.dtype] = []

    def calls(self) -> tuple[int, int]:
        return len(self.forward), len(self.backward)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kpfused":
            backward = "backward" in func.__name__
            (self.backward if backward else self.forward).append(args[backward].dtype)
        return func(*args, **(kwargs or {}))
