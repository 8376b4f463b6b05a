# SPDX-License-Identifier: MIT
"""Timing on a GPU: events around a sweep of calls, queued one by one or replayed as a CUDA graph, cache cold or hot.

A sweep calls a function once on each of several inputs (cold) or several times on one (hot). Results of a sweep are
kept to its end, so that every gradient is written to memory of its own. Before a cold sweep the second-level cache is
filled with other data, by reading: written lines would have to be cleaned during the measurement.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Thunk = Callable[[], Any]


class Timer:
    """Times sweeps on one stream. On a CPU, with the host clock and no graphs: only to try the code."""

    def __init__(self, device: str, samples: int = 9) -> None:
        self.cuda = device == "cuda"
        self.samples = samples
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 1 << 16
        self.scratch = torch.ones(self.l2_bytes, device=device)  # float32, so four times the cache
        self.stream = torch.cuda.Stream() if self.cuda else None

    def on_stream(self) -> AbstractContextManager[Any]:
        """All work, warm-up and capture included, goes to one stream: autograd runs backward on that of forward."""
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def inputs(self, size: int) -> int:
        """How many inputs of ``size`` bytes a cold sweep rotates over: beyond twice the cache, as far as sensible."""
        return max(2, min(32, -(-2 * self.l2_bytes // size) + 1))

    def eager(self, thunks: Sequence[Thunk], cold: bool) -> dict[str, Any]:
        self._run(thunks)

        def sweep() -> Any:
            return [thunk() for thunk in thunks]

        return self._measure(sweep, len(thunks), cold)

    def graph(self, thunks: Sequence[Thunk], cold: bool) -> dict[str, Any]:
        if not self.cuda:
            return self.eager(thunks, cold)
        self._run(thunks[:2])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            kept = [thunk() for thunk in thunks]
        stats = self._measure(graph.replay, len(thunks), cold)
        del kept
        graph.reset()
        return stats

    def _run(self, thunks: Sequence[Thunk]) -> None:
        for thunk in thunks:
            thunk()
        self.synchronize()

    def _measure(self, sweep: Thunk, calls: int, cold: bool) -> dict[str, Any]:
        gc.disable()  # and no collection here: it takes longer than what is measured
        try:
            seconds = [self._sample(sweep, cold) / calls for _ in range(self.samples + 2)][2:]
        finally:
            gc.enable()
        low, median, high = statistics.quantiles(seconds, n=4)
        spread = {"iqr": high - low, "min": min(seconds), "max": max(seconds)}
        return {
            "median": median,
            **spread,
            "mean": statistics.fmean(seconds),
            "rounds": len(seconds),
            "iterations": calls,
        }

    def _sample(self, sweep: Thunk, cold: bool) -> float:
        if cold:
            self.scratch.sum()
        self.synchronize()
        if not self.cuda:
            start = time.perf_counter()
            sweep()
            return time.perf_counter() - start
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        kept = sweep()
        last.record()
        last.synchronize()
        del kept
        return first.elapsed_time(last) * 1e-3


def sweep_length(seconds: float, most: int = 32) -> int:
    """Calls of a hot sweep: enough to make events precise, few where a call is long."""
    return max(2, min(most, round(3e-4 / max(seconds, 1e-7))))
