# SPDX-License-Identifier: MIT
"""GPU benchmarks: kpfused beside its peers and beside what the memory gives, in one run.

    python -m benchmarks.gpu --json results.json --seconds 230
    python -m benchmarks.gpu --device cpu --dry-run            # tries the code without a GPU, tiny shapes, no meaning

Three passes, the most wanted first: every case without compiled peers, then torch.compile, then its max-autotune. What
the time does not reach, and what fails, is listed as not measured; the traceback is printed, and all else is measured.
Ceilings are measured at every case over the same bytes: the quickest of several reductions for forward, of several
copies for backward, both one after the other for forward+backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import host_time, memory
from benchmarks.baselines import OURS, Function, Peer, available
from benchmarks.cases import DTYPES, Case, call, error, head, heatmaps, not_measured, row, skipped, upstream, write
from benchmarks.gpu_timing import HOT_CALLS, Thunk, Timer
from kpfused import kernels

BEYOND = 512 << 20  # bytes of a large case: many times any cache
PAIRS = {"forward": 1, "backward": 2, "forward+backward": 3}  # times that the model moves the map
READS = ("torch.sum", "torch.amax", "triton_kernels.read")
COPIES = ("copy_", "torch.neg", "triton_kernels.copy")
SPLIT_PEERS = (OURS, "triton")  # backward alone: a compiled graph cannot be run backward twice


def beyond_cache(shape: tuple[int, int, int, int], dtype: str, layout: str = "contiguous") -> Case:
    """A shape with as large a batch as makes it exceed ``BEYOND`` bytes."""
    _, keypoints, height, width = shape
    batch = BEYOND // (keypoints * height * width * DTYPES[dtype].itemsize) + 1
    return Case((batch, keypoints, height, width), dtype, layout)


# Cases of one turn: for the peers that need no compiler, for torch.compile, and for max-autotune.
Turn = tuple[list[Case], list[Case], list[Case]]


def turns(dry_run: bool) -> list[Turn]:
    """The most wanted first: time may run out anywhere, and a table is to have something of every peer."""
    if dry_run:
        tiny = [Case((2, 3, 7, 9)), Case((2, 3, 8, 8), "bfloat16", "channels_last")]
        return [(tiny, tiny[:1], [])]
    large = [(64, 133, 96, 72), (16, 17, 256, 256)]
    both = ("float32", "bfloat16")
    contiguous = [beyond_cache(shape, dtype) for dtype in both for shape in (*large, (1, 1, 4096, 4096))]
    # With one channel, channels_last is contiguous: huge maps take four.
    last = [beyond_cache(shape, dtype, "channels_last") for dtype in both for shape in (*large, (2, 4, 2048, 2048))]
    small = [Case(shape, dtype) for dtype in both for shape in ((32, 17, 64, 48), (64, 32, 7, 9))]
    others = [
        *(Case(shape) for shape in ((64, 17, 64, 64), (64, 133, 96, 72), (16, 17, 256, 256), (1, 1, 4096, 4096))),
        *(Case(shape) for shape in ((64, 512, 10, 12), (16, 32, 3, 3), (1, 2000, 5, 5), (2, 4, 2048, 2048))),
        *(Case(shape) for shape in ((64, 17, 47, 53), (64, 17, 64, 48), (8, 51, 256, 256), (1, 80, 80, 80))),
        Case((32, 17, 64, 48), layout="channels_last"),
        Case((64, 512, 10, 12), "bfloat16", "channels_last"),
    ]
    return [
        (contiguous + small, [*small[:2], *contiguous[:2]], contiguous[:1]),
        (last + others, [last[0], *contiguous[2:], *small[2:]], [*small[:2], contiguous[1], last[0], contiguous[2]]),
    ]


class Run:
    """Everything measured so far, and the time left."""

    def __init__(self, device: str, seconds: float, samples: int) -> None:
        self.device = device
        self.timer = Timer(device, samples)
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []  # of ours alone
        self.ceilings: dict[tuple[str, str, str, str], float] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def attempt(self, what: str, peer: str) -> Iterator[None]:
        """What fails is noted and shown in full, and the run goes on, unless the device itself is lost."""
        try:
            yield
        except Exception as failure:
            note = not_measured(f"{peer} {what}", failure)
            if peer == OURS:
                self.failures.append(note)
            self.timer.synchronize()

    def add(self, case: Case, peer: str, direction: str, mode: str, cache: str, stats: dict[str, Any]) -> None:
        moved = PAIRS[direction] * case.bytes
        if peer not in READS + COPIES:
            # A map's coordinates and stats, or its upstream gradient and stats: the least that has to move beside it.
            moved += case.maps * 24 * (1 + (direction == "forward+backward"))
        ceiling = self.ceilings.get((case.label, direction, mode, cache))
        if cache == "hot" and direction != "forward":
            ceiling = None  # a copy writes the same target again and again, a gradient is new memory in every call
        extra = {
            "kind": "speed",
            "peer": peer,
            "case": case.label,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "layout": case.layout,
            "direction": direction,
            "mode": mode,
            "cache": cache,
            "device": self.device,
            "model_bytes": moved,
            "gigabytes_per_second": moved / stats["median"] / 1e9,
            "share_of_ceiling": ceiling / stats["median"] if ceiling else None,
        }
        group = f"{case.label} {direction} {mode} {cache}"
        self.rows.append(row(f"gpu[{group}-{peer}]", group, stats, **extra))

    def time(self, case: Case, name: str, direction: str, thunks: list[Thunk]) -> None:
        """Eager and graph, cold, and hot for maps that a cache can hold. What cannot be captured keeps eager rows."""
        sweeps = {"cold": thunks}
        if case.bytes <= self.timer.l2_bytes // 2:
            sweeps["hot"] = thunks[:1] * HOT_CALLS
        self.timer.spin_up()
        for cache, sweep in sweeps.items():
            for mode, measure in (("eager", self.timer.eager), ("graph", self.timer.graph)):
                with self.attempt(f"at {case.label}, {direction}, {mode}, {cache}", name):
                    self.add(case, name, direction, mode, cache, measure(sweep, cache == "cold"))

    def measure_ceilings(self, case: Case, inputs: list[Tensor]) -> None:
        """Rows of the quickest reading and copying over the bytes of a case, and the ceiling of every direction."""
        flat = [heatmap.permute(0, 2, 3, 1) if case.layout == "channels_last" else heatmap for heatmap in inputs]
        flat = [heatmap.flatten() for heatmap in flat]
        if case.bytes % 4 == 0:
            flat = [heatmap.view(torch.float32) for heatmap in flat]  # a reduction of half precision would compute more
        pairs = [(source, torch.empty_like(source)) for source in flat]
        readers: list[Callable[[Tensor], Any]] = [torch.sum, torch.amax]
        copiers: list[Callable[[Tensor, Tensor], Any]] = [lambda s, t: t.copy_(s), lambda s, t: torch.neg(s, out=t)]
        if any(peer.name == "triton" for peer in available(self.device)):
            from benchmarks import triton_kernels

            readers.append(triton_kernels.read)
            copiers.append(triton_kernels.copy)
        reading: dict[str, list[Thunk]] = {
            name: [partial(f, s) for s in flat] for name, f in zip(READS, readers, strict=False)
        }
        copying: dict[str, list[Thunk]] = {
            name: [partial(f, s, t) for s, t in pairs] for name, f in zip(COPIES, copiers, strict=False)
        }
        self.quickest(case, "read", "forward", reading)
        self.quickest(case, "copy", "backward", copying)
        if case.bytes > 2 * self.timer.l2_bytes:  # else backward may find in the cache what forward has read
            for mode in ("eager", "graph"):
                each = [
                    self.ceilings.get((case.label, direction, mode, "cold")) for direction in ("forward", "backward")
                ]
                if each[0] is not None and each[1] is not None:
                    self.ceilings[case.label, "forward+backward", mode, "cold"] = each[0] + each[1]

    def quickest(self, case: Case, name: str, direction: str, ways: dict[str, list[Thunk]]) -> None:
        """The ceiling of one direction, by mode and cache, as a row of its own; ``copy_`` has rows beside it."""
        start = len(self.rows)
        for way, thunks in ways.items():
            self.time(case, way, direction, thunks)
        found = self.rows[start:]
        self.rows[start:] = [each for each in found if each["extra_info"]["peer"] == "copy_"]
        best: dict[str, dict[str, Any]] = {}
        for each in found:
            if each["group"] not in best or each["stats"]["median"] < best[each["group"]]["stats"]["median"]:
                best[each["group"]] = each
        for group, each in best.items():
            extra = each["extra_info"]
            self.ceilings[case.label, direction, extra["mode"], extra["cache"]] = each["stats"]["median"]
            extra = {**extra, "peer": name, "way": extra["peer"]}
            self.rows.append(row(f"gpu[{group}-{name}]", group, each["stats"], **extra))

    def measure_peer(self, case: Case, peer: Peer, inputs: list[Tensor]) -> None:
        """Checked, then timed in every direction. What is wrong is not timed."""
        assert peer.build is not None
        for direction in ("forward", "forward+backward"):
            with self.attempt(f"at {case.label}, {direction}", peer.name):
                function = peer.build()
                leaves = inputs if direction == "forward" else [heatmap.detach().requires_grad_() for heatmap in inputs]
                wrong = error(peer, function, case, leaves[0], direction)
                if wrong is not None:
                    raise ArithmeticError(wrong)
                result = function(leaves[0])
                gradient = upstream(case, self.device, result.dtype)
                self.time(case, peer.name, direction, [call(function, leaf, direction, gradient) for leaf in leaves])
                if direction == "forward+backward" and peer.name in SPLIT_PEERS:
                    self.time(case, peer.name, "backward", self._backward(function, leaves, gradient))

    @staticmethod
    def _backward(function: Function, leaves: list[Tensor], gradient: Tensor) -> list[Thunk]:
        def thunk(result: Tensor, leaf: Tensor) -> Thunk:
            return lambda: torch.autograd.grad(result, leaf, gradient, retain_graph=True)

        return [thunk(function(leaf), leaf) for leaf in leaves]

    def measure(self, case: Case, peers: list[Peer], needed: float, ceilings: bool) -> None:
        """One case, unless too little time is left."""
        names = ", ".join(peer.name for peer in peers)
        if self.left() < needed:
            skipped.append(f"{case.label} ({names}): out of time")
            return
        start = time.monotonic()
        with self.attempt(f"at {case.label}", "inputs and ceilings"), self.timer.on_stream():
            inputs = [heatmaps(case, self.device, seed) for seed in range(self.timer.inputs(case.bytes))]
            if ceilings:
                self.measure_ceilings(case, inputs)
            for peer in peers:
                self.measure_peer(case, peer, inputs)
            del inputs
        self.timer.synchronize()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        print(f"{case.label}: {names}: {time.monotonic() - start:.1f} s, {self.left():.0f} s left", flush=True)

    def measure_hosts_and_memory(self, peers: list[Peer], dry_run: bool) -> None:
        with self.attempt("of a tiny map, host time", OURS):  # what fails of the others is noted there
            self.rows += host_time.measure(self.device, rounds=9, calls=100)
        for case in memory.DRY_CASES if dry_run else memory.CASES:
            for peer in peers:
                with self.attempt(f"at {case.label}, memory", peer.name):
                    self.rows += memory.measure(self.device, [case], [peer])

    def best_rates(self) -> dict[str, float]:
        """Of reading and copying: gigabytes per second at the case where they were quickest, cache cold."""
        rates: dict[str, float] = {}
        for found in self.rows:
            extra = found["extra_info"]
            if extra["kind"] == "speed" and extra["cache"] == "cold" and extra["peer"] in ("read", "copy", "copy_"):
                label = f"{extra['peer']}, the best of all cases"
                rates[label] = max(rates.get(label, 0.0), extra["gigabytes_per_second"])
        return rates


def short_table(rows: list[dict[str, Any]]) -> str:
    """Times in microseconds of the cold rows, ours and every peer's."""
    peers = dict.fromkeys(r["extra_info"]["peer"] for r in rows)
    names = [n for n in peers if n not in (OURS, "copy", "copy_", "read")]
    lines = [
        f"{'case, cache cold':38} {'direction':17} {'mode':5} {OURS:>9} {'ceiling':>8} "
        + " ".join(f"{n:>12}" for n in names)
    ]
    table: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for found in rows:
        extra = found["extra_info"]
        if extra["kind"] == "speed" and extra["cache"] == "cold":
            table.setdefault((extra["case"], extra["direction"], extra["mode"]), {})[extra["peer"]] = found
    for (case, direction, mode), found in table.items():
        if OURS not in found:
            continue
        share = found[OURS]["extra_info"]["share_of_ceiling"]
        times = [f"{found[n]['stats']['median'] * 1e6:12.1f}" if n in found else f"{'-':>12}" for n in names]
        ours = f"{found[OURS]['stats']['median'] * 1e6:9.1f} {f'{share:.0%}' if share else '-':>8}"
        lines.append(f"{case:38} {direction:17} {mode:5} {ours} {' '.join(times)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=230, help="begin nothing that would end after this")
    parser.add_argument("--samples", type=int, default=9)
    options = parser.parse_args()
    if options.device == "cuda" and not (torch.cuda.is_available() and kernels.has_kernel("cuda")):
        raise SystemExit("needs a CUDA device and a kpfused built with CUDA kernels")
    if options.device == "cpu":
        torch.set_num_threads(1)
    run = Run(options.device, options.seconds, options.samples)
    machine = head(options.device, "make gpu" if options.device == "cuda" else "a dry run")
    del machine["load"]
    peers = available(options.device)
    # The composition is that of marginals; on a GPU only the package itself would add anything.
    plain = [p for p in peers if p.name in (OURS, "eager", "marginals", "kornia", "triton")]
    plain += [p for p in peers if p.name == "dsntnn" and "composition" not in p.note]

    def save() -> None:
        if options.json:
            found = {**machine, "ceilings_gigabytes_per_second": run.best_rates(), "skipped": skipped}
            write(options.json, found, run.rows)

    compiled, tuned = ([peer for peer in peers if peer.name == name] for name in ("compiled", "max-autotune"))
    try:
        run.measure_hosts_and_memory(plain, options.dry_run)
        save()
        for turn in turns(options.dry_run):
            for wanted, timed, needed in zip(turn, (plain, compiled, tuned), (8.0, 15.0, 30.0), strict=True):
                for case in wanted:
                    run.measure(case, timed, needed, ceilings=timed is plain)
                    save()
    finally:
        save()
        print(machine.get("gpu", machine["processor"]), short_table(run.rows), sep="\n")
        if skipped:
            print("not measured:", *skipped, sep="\n  ")
    if run.failures:
        raise SystemExit("\n  ".join([f"{OURS} failed:", *run.failures]))


if __name__ == "__main__":
    main()
