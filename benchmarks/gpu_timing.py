# SPDX-License-Identifier: MIT
"""Timing on a GPU: events around a sweep of calls, queued one by one or replayed as a CUDA graph, cache cold or hot.

A sweep calls a function once on each of several inputs (cold) or several times on one (hot). A result is kept until the
same input comes again, so that every gradient of a sweep is written to memory of its own. Calls that are queued one by
one are swept again until that takes a few milliseconds. Before a cold sweep the second-level cache is filled with other
data, by reading: written lines would have to be cleaned during the measurement. And the device is kept busy until the
first event is queued, and for a graph the graph too: how long an idle device takes to begin is nobody's time.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Thunk = Callable[[], Any]

HOT_CALLS = 16  # of a hot sweep; the same for everyone, whatever a call takes
EAGER_SECONDS = 2e-3  # at least, for calls queued one by one: what comes before the first is small beside it
EAGER_SLEEP = 40_000  # cycles, some 25 microseconds: the device is awake, and the host hardly ahead of it
GRAPH_SLEEP = 1_000_000  # cycles, some 600 microseconds: the host has launched the graph by then
SPIN_SECONDS = 0.02


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

    def spin_up(self) -> None:
        """Clocks fall while the host compiles or checks: work until they are up again."""
        end = time.perf_counter() + SPIN_SECONDS
        while self.cuda and time.perf_counter() < end:
            self.scratch.sum()
            self.synchronize()

    def eager(self, thunks: Sequence[Thunk], cold: bool) -> dict[str, Any]:
        self._run(thunks)
        start = time.perf_counter()
        self._run(thunks)
        sweeps = max(1, math.ceil(EAGER_SECONDS / (time.perf_counter() - start))) if self.cuda else 1
        kept: list[Any] = [None] * len(thunks)

        def sweep() -> None:
            for _ in range(sweeps):
                for index, thunk in enumerate(thunks):
                    kept[index] = thunk()

        return self._measure(sweep, sweeps * len(thunks), cold, EAGER_SLEEP)

    def graph(self, thunks: Sequence[Thunk], cold: bool) -> dict[str, Any]:
        if not self.cuda:
            return self.eager(thunks, cold)
        self._run(thunks[:2])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            kept = [thunk() for thunk in thunks]
        stats = self._measure(graph.replay, len(thunks), cold, GRAPH_SLEEP)
        del kept
        graph.reset()
        return stats

    def _run(self, thunks: Sequence[Thunk]) -> None:
        for thunk in thunks:
            thunk()
        self.synchronize()

    def _measure(self, sweep: Thunk, calls: int, cold: bool, cycles: int) -> dict[str, Any]:
        gc.disable()  # and no collection here: it takes longer than what is measured
        try:
            seconds = [self._sample(sweep, cold, cycles) / calls for _ in range(self.samples + 2)][2:]
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

    def _sample(self, sweep: Thunk, cold: bool, cycles: int) -> float:
        """Seconds of one sweep; the device works for ``cycles`` while the host queues the first event."""
        if not self.cuda:
            start = time.perf_counter()
            sweep()
            return time.perf_counter() - start
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        if cold:
            self.scratch.sum()
        torch.cuda._sleep(cycles)
        first.record()
        sweep()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3
