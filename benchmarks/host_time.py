# SPDX-License-Identifier: MIT
"""Host time of one call on tiny maps, forward and forward+backward, beside the peers that do not compile, and beside
other ways to give the same kernels to autograd.

    python -m benchmarks.host_time                # CPU, one thread: a table, and JSON with --json PATH
    python -m benchmarks.host_time --device cuda  # calls are queued, not waited for

On a map this small what is measured is Python, dispatch and autograd; the kernel is a share of it on CPU and none on
CUDA. Rounds of all peers are interleaved, so that a busy moment of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import OURS, Function, available
from benchmarks.cases import Case, call, head, heatmaps, not_measured, row, skipped, upstream, write

CASE = Case((1, 1, 8, 8))
NAMES = (OURS, "eager", "marginals", "dsntnn", "kornia")


def arrangements() -> dict[str, Function]:
    """Other ways from a call to the kernels and back, bare: no argument is checked, no beta, no mask, and only the last
    works under compilers and function transforms alike."""
    forward = torch.ops.kpfused._soft_argmax2d.default
    backward = torch.ops.kpfused._soft_argmax2d_backward.default

    class Classic(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, heatmap: Tensor) -> Tensor:
            points, stats = forward(heatmap, None, 1.0, 0)
            ctx.save_for_backward(heatmap, stats)
            return points

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return backward(grad, *ctx.saved_tensors, None, 1.0, 0, False)[0]

    class SetupContext(torch.autograd.Function):
        @staticmethod
        def forward(heatmap: Tensor) -> tuple[Tensor, Tensor]:
            return forward(heatmap, None, 1.0, 0)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(*inputs, output[1])

        @staticmethod
        def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Tensor:
            return backward(grad, *ctx.saved_tensors, None, 1.0, 0, False)[0]

    return {
        "classic Function": Classic.apply,
        "setup_context": lambda heatmap: SetupContext.apply(heatmap)[0],
        "register_autograd": lambda heatmap: torch.ops.kpfused.soft_argmax2d(heatmap, None, 1.0, 0)[0],
    }


def _seconds(function: Callable[[], Any], calls: int, synchronize: Callable[[], None]) -> float:
    for _ in range(calls // 10):  # pay for what the peer before left in the caches
        function()
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = (time.perf_counter() - start) / calls
    synchronize()
    return seconds


def measure(device: str, rounds: int = 40, calls: int = 100) -> list[dict[str, Any]]:
    """Rows of every peer and direction. ``calls`` stays below what a CUDA stream queues before it blocks the host."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for direction in ("forward", "forward+backward"):
        heatmap = heatmaps(CASE, device).requires_grad_(direction != "forward")
        thunks: dict[str, Callable[[], Any]] = {}
        builds = {peer.name: peer.build for peer in available(device) if peer.name in NAMES}
        builds |= {name: lambda function=function: function for name, function in arrangements().items()}
        for name, build in builds.items():
            try:
                function = build()
                gradient = upstream(CASE, device, function(heatmap).dtype)
                thunk = call(function, heatmap, direction, gradient)
                thunk()
            except Exception as failure:
                if name == OURS:
                    raise
                not_measured(f"{name}, host time, {direction}", failure)
            else:
                thunks[name] = thunk
        seconds: dict[str, list[float]] = {name: [] for name in thunks}
        for index in range(rounds + 1):
            for name, thunk in thunks.items():
                measured = _seconds(thunk, calls, synchronize)
                if index > 0:  # the first round warms up
                    seconds[name].append(measured)
        for name, values in seconds.items():
            low, middle, high = statistics.quantiles(values, n=4)
            stats = {"median": middle, "iqr": high - low, "min": min(values), "rounds": rounds, "iterations": calls}
            extra = {"kind": "host", "peer": name, "case": CASE.label, "direction": direction, "device": device}
            rows.append(row(f"host[{direction}-{name}]", f"host {direction}", stats, **extra, threads=1))
    torch.set_num_threads(before)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    rows = measure(options.device, options.rounds)
    if options.json:
        machine = head(options.device, "python -m benchmarks.host_time")
        write(options.json, {**machine, "skipped": skipped}, rows)
    ours = {r["extra_info"]["direction"]: r["stats"]["median"] for r in rows if r["extra_info"]["peer"] == OURS}
    print(f"{'direction':18} {'peer':18} {'median, us':>11} {'min, us':>9} {'of kpfused':>11}")
    for found in rows:
        stats, extra = found["stats"], found["extra_info"]
        ratio = stats["median"] / ours[extra["direction"]]
        microseconds = f"{stats['median'] * 1e6:11.1f} {stats['min'] * 1e6:9.1f}"
        print(f"{extra['direction']:18} {extra['peer']:18} {microseconds} {ratio:10.2f}x")


if __name__ == "__main__":
    main()
