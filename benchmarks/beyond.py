# SPDX-License-Identifier: MIT
"""What lies beyond the mean costs: as multiples of the plain function, and beside compositions.

    python -m benchmarks.beyond                   # CPU: a table, and JSON with --json PATH
    python -m benchmarks.beyond --device cuda

Every line compares two calls on the same input, in interleaved rounds: the figure is the median of the rounds' ratios,
so that a machine that slows down for a while slows both. A composition is what one writes in PyTorch today: one
softmax, and each field from the marginals it can come from. What fails, or does not agree with its composition, is
noted and left out. The file is written anew after every line.
"""

from __future__ import annotations

import argparse
import gc
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kpfused
from benchmarks.baselines import axes
from benchmarks.cases import Case, head, heatmaps, not_measured, row, skipped, write
from benchmarks.memory import peak_bytes_beyond

Thunk = Callable[[], Any]


def moments_composition(heatmap: Tensor) -> tuple[Tensor, ...]:
    """Mean, covariance (xx, xy, yx, yy), entropy, logsumexp and peak probability."""
    flat = heatmap.flatten(-2)
    logsumexp = torch.logsumexp(flat, -1)
    probability = torch.softmax(flat, -1)
    entropy = logsumexp - (probability * flat).sum(-1)
    chance = torch.exp(flat.amax(-1) - logsumexp)
    maps = probability.view(heatmap.shape)
    x, y = axes(maps, *heatmap.shape[-2:])
    columns, rows = maps.sum(-2), maps.sum(-1)
    mean_x, mean_y = (columns * x).sum(-1, keepdim=True), (rows * y).sum(-1, keepdim=True)
    dx, dy = x - mean_x, y - mean_y
    xy = ((maps @ dx[..., None])[..., 0] * dy).sum(-1)
    covariance = torch.stack([(columns * dx**2).sum(-1), xy, xy, (rows * dy**2).sum(-1)], -1)
    return torch.cat((mean_x, mean_y), -1), covariance, entropy, logsumexp, chance


def expectation3d(heatmap: Tensor) -> Tensor:
    """Softmax over the volume and its three marginals."""
    volume = torch.softmax(heatmap.flatten(-3), -1).view(heatmap.shape)
    sums = volume.sum((-3, -2)), volume.sum((-3, -1)), volume.sum((-2, -1))
    steps = (torch.arange(s.shape[-1], dtype=s.dtype, device=s.device) for s in sums)
    return torch.stack([(s * n).sum(-1) for s, n in zip(sums, steps, strict=True)], -1)


def expectation1d(heatmap: Tensor) -> Tensor:
    steps = torch.arange(heatmap.shape[-1], dtype=heatmap.dtype, device=heatmap.device)
    return (torch.softmax(heatmap, -1) * steps).sum(-1, keepdim=True)


def softmax_map(heatmap: Tensor) -> Tensor:
    return torch.softmax(heatmap.flatten(-2), -1).view(heatmap.shape)


def expectation_of_values(heatmap: Tensor, values: Tensor) -> Tensor:
    """Values (B, K, C, H, W), or (B, 1, C, H, W) for all keypoints: a batched product of matrices."""
    maps = softmax_map(heatmap).flatten(-2)
    if values.shape[1] == 1:
        return torch.bmm(maps, values[:, 0].flatten(-2).mT)
    return (values.flatten(-2) @ maps[..., None])[..., 0]


def window_composition(heatmap: Tensor, size: int) -> Tensor:
    """The window as a mask of the whole map."""
    maps = softmax_map(heatmap)
    rows, columns = (torch.arange(n, device=heatmap.device) for n in heatmap.shape[-2:])
    x, y = (maps.sum(-2) * columns).sum(-1), (maps.sum(-1) * rows).sum(-1)
    near = [(steps - mean.detach().round()[..., None]).abs() <= size // 2 for steps, mean in ((rows, y), (columns, x))]
    return (maps * (near[0][..., None] & near[1][..., None, :])).sum((-2, -1))


def off_the_border(heatmap: Tensor) -> Tensor:
    """Maps whose means are nearer to one pixel than to any other, where rounding is the same for everyone.

    The others are replaced by the first that is.
    """
    mean = kpfused.soft_argmax2d(heatmap)
    near = ((mean - mean.floor() - 0.5).abs() < 0.02).any(-1)
    return torch.where(near[..., None, None], heatmap[~near][0], heatmap)


def agrees(name: str, ours: Callable[..., Tensor], composition: Callable[..., Tensor], inputs: list[Tensor]) -> bool:
    """Whether both compute the same; if not, that is noted."""
    try:
        torch.testing.assert_close(ours(*inputs).float(), composition(*inputs).float(), rtol=1e-3, atol=1e-3)
    except Exception as failure:
        not_measured(name, failure)
        return False
    return True


def until_failure(lines: Iterator[Comparison]) -> Iterator[Comparison]:
    """Those ahead of the first whose inputs cannot be made."""
    try:
        yield from lines
    except Exception as failure:
        not_measured("a line whose inputs could not be made, and all behind it", failure)


def forward_backward(function: Callable[..., Any], *inputs: Tensor) -> Thunk:
    """Gradients of all real-valued results at once."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def results() -> list[Tensor]:
        found = function(*leaves)
        return [t for t in ([found] if isinstance(found, Tensor) else found) if t.requires_grad]

    upstream: list[Tensor] = []

    def thunk() -> Any:
        found = results()
        if not upstream:  # at the first call, so that what fails does so where that is noted
            upstream.extend(torch.randn_like(t) for t in found)
        return torch.autograd.grad(found, leaves, upstream)

    return thunk


@dataclass(frozen=True)
class Comparison:
    """``thunk``, kpfused's, and ``other``, also kpfused's where ``cost``, else a peer's.

    The figure of a cost is our time as a multiple of the other; elsewhere the reverse. ``reading`` does no more than
    read what the cost is for, a mask, once for each direction: what it takes is another multiple of the other.
    """

    question: str
    case: str
    thunk: Thunk
    other: Thunk
    cost: bool
    reading: Thunk | None = None


def both_ways(
    question: str,
    case: str,
    ours: Callable[..., Any],
    other: Callable[..., Any],
    inputs: Sequence[Tensor],
    cost: bool,
    reading: Thunk | None = None,
) -> Iterator[Comparison]:
    """Of two functions of the same inputs: forward, and forward with backward."""
    yield Comparison(f"{question}, forward", case, lambda: ours(*inputs), lambda: other(*inputs), cost, reading)
    thunks = forward_backward(ours, *inputs), forward_backward(other, *inputs)
    twice = None if reading is None else lambda: (reading(), reading())
    yield Comparison(f"{question}, forward+backward", case, *thunks, cost, twice)


def reading_of(mask: Tensor) -> Thunk:
    """A sum over its bytes as they lie in memory, eight at a time: each is read once."""
    words = torch.empty(0, dtype=torch.int64, device=mask.device).set_(mask.untyped_storage())
    return words.sum


Shrink = Callable[..., tuple[int, ...]]
LAYOUTS = ("contiguous", "channels_last")


def comparisons(device: str, tiny: bool) -> Iterator[Comparison]:
    shrink: Shrink = (lambda *shape: (2, 3, *(min(n, 16) for n in shape[2:]))) if tiny else (lambda *shape: shape)
    for shape in [(64, 17, 64, 64), (16, 17, 256, 256), (4, 4, 1024, 1024)]:
        for layout in LAYOUTS:
            case = Case(shrink(*shape), layout=layout)
            h = heatmaps(case, device)
            yield Comparison(
                "moments over soft_argmax2d, forward",
                case.label,
                lambda h=h: kpfused.spatial_moments2d(h),
                lambda h=h: kpfused.soft_argmax2d(h),
                True,
            )
            question = "composition of moments over moments"
            yield from both_ways(question, case.label, kpfused.spatial_moments2d, moments_composition, [h], False)
    yield from masks(device, shrink)
    yield from expectations(device, shrink)
    for function, composition, shape in [
        (kpfused.soft_argmax1d, expectation1d, (256, 17, 384)),
        (kpfused.soft_argmax3d, expectation3d, (2, 17, 16, 16, 16)),
        (kpfused.soft_argmax3d, expectation3d, (32, 18, 64, 64, 64)),
    ]:
        shape = (2, 3, *(16 for _ in shape[2:])) if tiny else shape
        h = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
        label = ",".join(map(str, shape))
        yield from both_ways(f"composition over {function.__name__}", label, function, composition, [h], False)


def masks(device: str, shrink: Shrink) -> Iterator[Comparison]:
    """What pixels that do not count cost, beside the same function of whole maps."""
    for layout in LAYOUTS:
        case = Case(shrink(16, 17, 256, 256), layout=layout)
        h = heatmaps(case, device)
        batch, _, height, width = case.shape
        of_maps = torch.rand(case.shape, device=device) < 0.7
        settings: dict[str, dict[str, Any]] = {
            "mask (H, W)": {"mask": torch.rand(height, width, device=device) < 0.7},
            "mask (B, 1, H, W)": {"mask": torch.rand(batch, 1, height, width, device=device) < 0.7},
            "mask (B, K, H, W)": {"mask": of_maps},
            # As comparisons of a channels_last heatmap are.
            "mask (B, K, H, W) channels_last": {"mask": of_maps.contiguous(memory_format=torch.channels_last)},
            "flags (B, K, 1, 1)": {"mask": torch.rand(*case.shape[:2], 1, 1, device=device) < 0.7},
            "valid_size of half the rows": {"valid_size": (height // 2, width)},
        }
        for name, keywords in settings.items():
            question, masked = f"{name} over all pixels", partial(kpfused.soft_argmax2d, **keywords)
            reading = reading_of(keywords["mask"]) if "mask" in keywords else None
            yield from both_ways(question, case.label, masked, kpfused.soft_argmax2d, [h], True, reading)
    for shape in [(64, 17, 64, 64), (16, 17, 256, 256)]:
        for layout in LAYOUTS:
            case = Case(shrink(*shape), layout=layout)
            h = heatmaps(case, device)
            mask = torch.empty_like(h, dtype=torch.bool).copy_(torch.rand_like(h) < 0.7)
            for name, function, inputs in [
                ("spatial_moments2d", kpfused.spatial_moments2d, [h]),
                ("spatial_softmax2d", kpfused.spatial_softmax2d, [h]),
                ("expectation2d", kpfused.expectation2d, [h]),
                (
                    "spatial_expectation2d",
                    lambda h, v, **k: kpfused.spatial_expectation2d(h, v.unsqueeze(2), **k),
                    [h, torch.randn_like(h)],
                ),
            ]:
                question = f"{name}, mask (B, K, H, W) over all pixels"  # in the order of the heatmap
                masked = partial(function, mask=mask)
                yield from both_ways(question, case.label, masked, function, inputs, True, reading_of(mask))
                if shape[-1] == 64:
                    question = f"{name}, valid_size of 3/4 each way over all pixels"
                    size = tuple(torch.full((case.shape[0], 1), n * 3 // 4, device=device) for n in case.shape[-2:])
                    sized = partial(function, valid_size=size)
                    yield from both_ways(question, case.label, sized, function, inputs, True)


def expectations(device: str, shrink: Shrink) -> Iterator[Comparison]:
    """The softmax map, expectations of values under it, and the mass of a window, beside compositions."""
    window, window_peer = (lambda h: kpfused.window_mass(h, 11)), (lambda h: window_composition(h, 11))
    asked: list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[int, ...], tuple[int, int] | None]] = [
        ("spatial_softmax2d", kpfused.spatial_softmax2d, softmax_map, (64, 17, 64, 48), None),
        ("spatial_softmax2d", kpfused.spatial_softmax2d, softmax_map, (64, 512, 10, 12), None),
        ("spatial_softmax2d", kpfused.spatial_softmax2d, softmax_map, (16, 17, 256, 256), None),
        ("offsets of each keypoint", kpfused.spatial_expectation2d, expectation_of_values, (64, 17, 64, 48), (17, 2)),
        ("256 shared features", kpfused.spatial_expectation2d, expectation_of_values, (8, 17, 64, 64), (1, 256)),
        ("depth of each keypoint", kpfused.spatial_expectation2d, expectation_of_values, (16, 17, 256, 256), (17, 1)),
        ("window_mass of 11 x 11", window, window_peer, (64, 17, 64, 48), None),
        ("window_mass of 11 x 11", window, window_peer, (16, 17, 256, 256), None),
    ]
    for name, ours, composition, shape, of_values in asked:
        for layout in LAYOUTS:
            case = Case(shrink(*shape), layout=layout)
            heatmap = heatmaps(case, device)
            inputs = [off_the_border(heatmap) if ours is window else heatmap]
            if of_values is not None:
                keypoints, channels = min(of_values[0], case.shape[1]), of_values[1]
                # As a convolution leaves them.
                values = torch.randn(case.shape[0], keypoints * channels, *case.shape[2:], device=device)
                if layout == "channels_last":
                    values = values.contiguous(memory_format=torch.channels_last)
                inputs.append(values.unflatten(1, (keypoints, channels)))
            if agrees(f"{name} at {case.label}", ours, composition, inputs):
                yield from both_ways(f"composition over {name}", case.label, ours, composition, inputs, False)


def medians(each: Comparison, rounds: int, device: str) -> dict[str, float]:
    """Seconds of each, and the first as a multiple of the other: medians of ``rounds``, up to five times as many where
    calls are quick. A round of calls lasts a tenth of a millisecond at least, and one where there are launches: what
    takes less is repeated, and then finds in the caches what it reads.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    thunks = [each.thunk, each.other, *([each.reading] if each.reading else [])]

    def seconds(thunk: Thunk, calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            thunk()
        synchronize()
        return (time.perf_counter() - start) / calls

    for thunk in thunks * 2:  # what is set up at a first call counts for none
        thunk()
    once = [seconds(thunk, 1) for thunk in thunks]
    least = 1e-3 if device == "cuda" else 1e-4
    calls = [max(1, int(least / took)) for took in once]
    found: list[list[float]] = [[] for _ in thunks]
    a_round = sum(map(operator.mul, once, calls))
    for _ in range(min(max(rounds, int(0.3 / a_round)), 5 * rounds)):
        for into, thunk, count in zip(found, thunks, calls, strict=True):
            into.append(seconds(thunk, count))

    def multiple(of: int) -> float:
        return statistics.median(a / b for a, b in zip(found[of], found[1], strict=True))

    stats = {"median": statistics.median(found[0]), "other": statistics.median(found[1]), "ratio": multiple(0)}
    if each.reading:
        stats["reading"] = multiple(2)
    return {**stats, "rounds": len(found[0])}


def check(device: str) -> None:
    """The compositions compute what they are compared with."""
    h = torch.randn(2, 3, 8, 9, 10, device=device, generator=torch.Generator(device).manual_seed(0))
    m = kpfused.spatial_moments2d(h)
    ours = (m.mean, m.covariance.flatten(-2), m.entropy, m.logsumexp, m.peak_probability)
    torch.testing.assert_close(moments_composition(h), ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expectation3d(h), kpfused.soft_argmax3d(h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expectation1d(h), kpfused.soft_argmax1d(h), rtol=1e-4, atol=1e-4)


def measure(device: str, rounds: int, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows, one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    case = ""
    for each in until_failure(comparisons(device, tiny)):
        if each.case != case:  # what the last one leaves behind may be large
            gc.collect()
        case = each.case
        try:
            stats = medians(each, rounds, device)
        except Exception as failure:
            not_measured(f"{each.question} at {each.case}", failure)
            continue
        if not each.cost:
            stats["ratio"] = 1 / stats["ratio"]
        extra = {"question": each.question, "case": each.case, "cost": each.cost, "device": device, "threads": 1}
        took = stats["median"] * 1e6
        beside = f", {stats['reading']:.2f}x to read" if each.reading else ""
        print(f"{each.question:58} {each.case:28} {took:12,.0f} us {stats['ratio']:8.2f}x{beside}", flush=True)
        yield row(f"{each.question}[{each.case}]", each.question, stats, kind="beyond", **extra)
    torch.set_num_threads(before)
    shape = (2, 3, 16, 16, 16) if tiny else (32, 18, 64, 64, 64)
    h = torch.randn(shape, device=device)
    for name, function in (("soft_argmax3d", kpfused.soft_argmax3d), ("composition", expectation3d)):
        try:
            beyond = peak_bytes_beyond(function, h)
        except Exception as failure:
            not_measured(f"peak memory of {name}", failure)
            continue
        share = beyond / h.nbytes
        label = ",".join(map(str, shape))
        question = f"peak memory of {name} beyond input and gradient"
        extra = {"question": question, "case": label, "device": device}
        stats = {"bytes_beyond": beyond, "share_of_input": share}
        print(f"{question:58} {label:28} {beyond:12,} B  {share:8.2%}", flush=True)
        yield row(f"memory[{label}-{name}]", "memory", stats, kind="beyond", **extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="tiny inputs")
    options = parser.parse_args()
    machine = head(options.device, "python -m benchmarks.beyond")
    try:
        check(options.device)
    except Exception as failure:
        not_measured("a composition beside kpfused on a small map", failure)
    rows: list[dict[str, Any]] = []
    for found in measure(options.device, options.rounds, options.dry_run):
        rows.append(found)
        if options.json:
            machine["load"] = round(os.getloadavg()[0], 1)
            write(options.json, {**machine, "skipped": skipped}, rows)
    if skipped:
        raise SystemExit("\n  ".join(["not measured:", *skipped]))


if __name__ == "__main__":
    main()
