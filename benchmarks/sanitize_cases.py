# SPDX-License-Identifier: MIT
"""Every regime of the kernels once, forward and backward: a program for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 -m benchmarks.sanitize_cases

Maps are small, since a watched kernel is slow. All data comes from the host and results are compared there, so that
hardly a kernel but ours is watched. Without torch's caching, every tensor is an allocation of its own, and a step
beyond its end is seen.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

from kpfused import _C, reference, soft_argmax2d, spatial_moments2d

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Tiny, vectors and single elements; usual; odd; beyond what one block takes, vectors and single elements.
ROWS = [(2, 3, 3, 3), (3, 5, 7, 9), (2, 3, 12, 16), (2, 2, 64, 48), (1, 2, 47, 53), (1, 1, 520, 512), (1, 1, 521, 511)]
# Channels of whole vectors and not, fewer and more than a tile; an image that is split.
CHANNELS = [
    (2, 3, 3, 3),
    (2, 17, 7, 9),
    (1, 16, 12, 10),
    (1, 133, 8, 12),
    (1, 520, 3, 4),
    (1, 8, 112, 80),
    (1, 17, 96, 72),
]


def layouts(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The same maps contiguous, channels_last, and as windows of larger tensors of both kinds."""
    maps = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    batch, channels, height, width = shape
    wide = torch.zeros(batch, channels, height, width + 1, dtype=dtype)
    wide[..., 1:] = maps
    deep = torch.zeros(batch, channels + 1, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    deep[:, 1:] = maps
    last = maps.contiguous(memory_format=torch.channels_last)
    return {
        "contiguous": maps.to(device),
        "sliced": wide.to(device)[..., 1:],
        "channels_last": last.to(device),
        "sliced channels_last": deep.to(device)[:, 1:],
    }


def check(heatmap: Tensor, beta: float | Tensor, name: str) -> str | None:
    """What is wrong with forward and backward of one input, or None."""
    leaf = heatmap.detach().requires_grad_()
    result = soft_argmax2d(leaf, beta)
    gradient = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    actual = torch.autograd.grad(result, leaf, gradient.to(heatmap.device))[0]
    plain = heatmap.cpu().double().requires_grad_()
    expected = reference.soft_argmax2d(plain, beta.detach().cpu().double() if isinstance(beta, Tensor) else beta)
    expected_gradient = torch.autograd.grad(expected, plain, gradient.double())[0]
    off = (result.detach().cpu().double() - expected).abs().max().item()
    largest = expected_gradient.abs().max().item() or 1.0
    off_gradient = (actual.cpu().double() - expected_gradient).abs().max().item() / largest
    tolerance = 1e-9 if heatmap.dtype == torch.float64 else 1e-4
    rounding = torch.finfo(heatmap.dtype).eps
    if off <= tolerance * max(heatmap.shape[-2:]) and off_gradient <= max(tolerance, rounding):
        return None
    return f"{name}: {off:.2g} pixels, gradient {off_gradient:.2g} off"


def check_moments(heatmap: Tensor, beta: float | Tensor, name: str) -> str | None:
    """Likewise for all fields of the moments at once."""
    leaf = heatmap.detach().requires_grad_()
    plain = heatmap.cpu().double().requires_grad_()
    actual = spatial_moments2d(leaf, beta)
    number = beta.detach().cpu().double() if isinstance(beta, Tensor) else beta
    expected = reference.spatial_moments2d(plain, number)
    if not torch.equal(actual.peak.cpu(), expected.peak):
        return f"{name}: peaks differ"
    tolerance = 1e-9 if heatmap.dtype == torch.float64 else 1e-4
    size = max(heatmap.shape[-2:])
    scales = {"mean": size, "covariance": size * size, "entropy": 10, "logsumexp": 10, "peak_probability": 1}
    loss: Tensor | float = 0.0
    expected_loss: Tensor | float = 0.0
    for field, scale in scales.items():
        got, want = getattr(actual, field), getattr(expected, field)
        off = (got.detach().cpu().double() - want).abs().max().item()
        if off > tolerance * scale:
            return f"{name}: {field} is {off:.2g} off"
        loss, expected_loss = loss + got.sum() / scale, expected_loss + want.sum() / scale
    assert isinstance(loss, Tensor)
    assert isinstance(expected_loss, Tensor)
    gradient = torch.autograd.grad(loss, leaf)[0].cpu().double()
    expected_gradient = torch.autograd.grad(expected_loss, plain)[0]
    off = ((gradient - expected_gradient).abs().max() / expected_gradient.abs().max()).item()
    return None if off <= max(tolerance, torch.finfo(heatmap.dtype).eps) else f"{name}: gradient {off:.2g} off"


def regime(heatmap: Tensor, channels_last: bool) -> str:
    """The regime that the launch plan gives an aligned map."""
    height, width = heatmap.shape[-2:]
    dtype = str(heatmap.dtype).removeprefix("torch.")
    return _C.launch_plan(height, width, dtype, heatmap.shape[1] if channels_last else 0)["regime"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    wrong: list[str] = []
    reached: dict[str, int] = {}
    runs = 0
    for dtype, (shapes, names) in itertools.product(
        DTYPES, ((ROWS, ("contiguous", "sliced")), (CHANNELS, ("channels_last", "sliced channels_last")))
    ):
        for shape in shapes:
            maps = layouts(shape, dtype, device)
            for index, name in enumerate(names):
                heatmap = maps[name]
                found = regime(heatmap, "channels_last" in name)
                reached[found] = reached.get(found, 0) + 1
                accumulator = torch.float64 if dtype == torch.float64 else torch.float32
                per_keypoint = torch.linspace(0.5, 2, shape[1], dtype=accumulator).to(device).requires_grad_()
                # The gradient of beta is asked for along with the first layout, so both kinds of backward run.
                beta = 1.5 if index else per_keypoint
                label = f"{shape} {dtype} {name} ({found})"
                wrong += [m for m in (check(heatmap, beta, label), check_moments(heatmap, beta, label)) if m]
                runs += 1
    print(f"{runs} inputs, forward and backward; regimes: {reached}")
    missing = {"team", "block", "split", "channels", "channels_split"} - reached.keys()
    if missing:
        wrong.append(f"regimes not reached: {sorted(missing)}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
