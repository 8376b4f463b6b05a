# SPDX-License-Identifier: MIT
"""Every regime and every function once, forward and backward: a program for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 -m benchmarks.sanitize_cases

Maps are small, since a watched kernel is slow. All data comes from the host and results are compared there, so that
hardly a kernel but ours is watched. Without torch's caching, every tensor is an allocation of its own, and a step
beyond its end is seen.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kpfused
from kpfused import _C, reference, soft_argmax2d, spatial_moments2d

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Tiny, vectors and single elements; usual; odd; beyond what one block takes, vectors and single elements.
ROWS = [(2, 3, 3, 3), (3, 5, 7, 9), (2, 3, 12, 16), (2, 2, 64, 48), (1, 2, 47, 53), (1, 1, 520, 512), (1, 1, 521, 511)]
# Channels of whole vectors and not, fewer and more than a tile; images that are split, by rows and, where these are
# long, by columns.
CHANNELS = [
    (2, 3, 3, 3),
    (2, 17, 7, 9),
    (1, 16, 12, 10),
    (1, 133, 8, 12),
    (1, 520, 3, 4),
    (1, 8, 112, 80),
    (1, 17, 96, 72),
    (1, 17, 1, 6001),
    (1, 16, 2, 3100),
]
# For the other functions: whole vectors along rows and channels, and single elements of maps that channels_last splits.
FUNCTION_SHAPES = [(2, 8, 9, 16), (1, 3, 201, 123), (1, 8, 3, 3100)]


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


def functions(shape: tuple[int, ...]) -> dict[str, Callable[..., Tensor]]:
    """The other functions, of kpfused or its reference, of heatmaps and, if it takes two, of values."""
    batch, _, height, width = shape
    mask = torch.rand(shape) < 0.7
    sizes = torch.arange(batch)[:, None] + height // 2, torch.arange(batch)[:, None] + width // 2

    def masked_moments(api: Any, h: Tensor, pixels: Tensor) -> Tensor:
        found = api.spatial_moments2d(h, mask=pixels.to(h.device))
        return torch.cat((found.mean, found.covariance.flatten(-2), found.entropy[..., None]), -1)

    def moments_of_volumes(api: Any, h: Tensor, **settings: Any) -> Tensor:
        """With the keypoints for depth."""
        found = api.spatial_moments3d(h, **settings)
        return torch.cat((found.mean, found.covariance.flatten(-2), found.entropy[..., None]), -1)

    return {
        "volumes": moments_of_volumes,
        "volumes, mask": lambda api, h: moments_of_volumes(api, h, mask=mask.to(h.device)),
        "spatial_softmax2d": lambda api, h: api.spatial_softmax2d(h, 1.5),
        "spatial_softmax2d, mask": lambda api, h: api.spatial_softmax2d(h, mask=mask.to(h.device)),
        "spatial_expectation2d": lambda api, h, v: api.spatial_expectation2d(h, v, 1.5),
        "spatial_expectation2d, mask": lambda api, h, v: api.spatial_expectation2d(h, v, mask=mask.to(h.device)),
        "expectation2d": lambda api, h: api.expectation2d(h),
        "expectation2d, mask": lambda api, h: api.expectation2d(h, mask=mask[0, 0].to(h.device)),
        "window_mass": lambda api, h: api.window_mass(h, 5),
        "window_mass around the peak": lambda api, h: api.window_mass(h, 3, around="peak"),
        "mask (H, W)": lambda api, h: api.soft_argmax2d(h, mask=mask[0, 0].to(h.device)),
        "mask (B, 1, H, W)": lambda api, h: api.soft_argmax2d(h, mask=mask[:, :1].to(h.device)),
        "mask (B, K, H, W)": lambda api, h: api.soft_argmax2d(h, mask=mask.to(h.device)),
        "valid_size": lambda api, h: api.soft_argmax2d(h, valid_size=(height - 2, width - 3)),
        "valid_size of each image": lambda api, h: api.soft_argmax2d(
            h, valid_size=(sizes[0].to(h.device), sizes[1].to(h.device))
        ),
        "moments, mask (B, 1, H, W)": lambda api, h: masked_moments(api, h, mask[:, :1]),
        "moments, mask (B, K, H, W)": lambda api, h: masked_moments(api, h, mask),
    }


def check_function(function: Callable[..., Tensor], inputs: list[Tensor], name: str) -> str | None:
    """What is wrong with its result, or with its gradient of any input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    plain = [t.cpu().double().requires_grad_() for t in inputs]
    actual, expected = function(kpfused, *leaves), function(reference, *plain)
    gradient = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).view(actual.shape)
    gradients = torch.autograd.grad(actual, leaves, gradient.to(actual.device))
    wanted = torch.autograd.grad(expected, plain, gradient.double())
    tolerance = max(1e-4, torch.finfo(inputs[0].dtype).eps)
    offs = []
    for got, want in zip((actual, *gradients), (expected, *wanted), strict=True):
        offs.append(((got.detach().cpu().double() - want).abs().max() / want.abs().max()).item())
    if all(off <= tolerance for off in offs):
        return None
    return f"{name}: result and gradients off by " + ", ".join(f"{off:.2g}" for off in offs)


def check_functions(device: str) -> list[str]:
    """What is wrong with the other functions, in both layouts and two dtypes."""
    wrong: list[str | None] = []
    for shape, dtype in itertools.product(FUNCTION_SHAPES, (torch.float32, torch.bfloat16)):
        maps = layouts(shape, dtype, device)
        batch, keypoints, height, width = shape
        for layout in ("contiguous", "channels_last"):
            values = layouts((batch * keypoints, 3, height, width), dtype, device)[layout].unflatten(0, (batch, -1))
            for name, function in functions(shape).items():
                label = f"{name}, {shape} {dtype} {layout}"
                if "spatial_expectation2d" not in name:
                    wrong.append(check_function(function, [maps[layout]], label))
                    continue
                wrong.append(check_function(function, [maps[layout], values], label))
                wrong.append(check_function(function, [maps[layout], values[:, :1]], f"{label}, shared"))
    print(f"{len(wrong)} calls of other functions, forward and backward")
    return [each for each in wrong if each]


def regime(heatmap: Tensor, channels_last: bool) -> str:
    """The regime that the launch plan gives an aligned map."""
    height, width = heatmap.shape[-2:]
    dtype = str(heatmap.dtype).removeprefix("torch.")
    return _C.launch_plan(height, width, dtype, heatmap.shape[1] if channels_last else 0)["regime"]


def check_regimes(device: str) -> list[str]:
    """What is wrong with coordinates and moments, in every regime."""
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
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small maps gain nothing from more, and several tools may watch at the same time
    wrong = []
    for part in (check_functions, check_regimes):
        start = time.monotonic()
        wrong += part(device)
        print(f"{part.__name__}: {time.monotonic() - start:.1f} s", flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
