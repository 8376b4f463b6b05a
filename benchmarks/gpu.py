# SPDX-License-Identifier: MIT
"""GPU benchmarks: kpfused beside its peers and beside what the memory gives, in one run.

    python -m benchmarks.gpu --json results.json --seconds 230
    python -m benchmarks.gpu --device cpu --dry-run            # tries the code without a GPU, tiny shapes, no meaning

Three passes, the most wanted first: every case without compiled peers, then torch.compile, then its max-autotune. What
the time does not reach is listed as not measured. Ceilings are measured at every case over the same bytes: a read-only
reduction for forward, a copy for backward, both one after the other for forward+backward.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import host_time, memory
from benchmarks.baselines import OURS, Function, Peer, available
from benchmarks.cases import DTYPES, Case, call, error, head, heatmaps, row, upstream, write
from benchmarks.gpu_timing import Thunk, Timer, sweep_length
from kpfused import ops

BEYOND = 512 << 20  # bytes of a large case: many times any cache
PAIRS = {"forward": 1, "backward": 2, "forward+backward": 3}  # times that the model moves the map
SPLIT_PEERS = (OURS, "triton")  # backward alone: a compiled graph cannot be run backward twice


def beyond_cache(shape: tuple[int, int, int, int], dtype: str, layout: str = "contiguous") -> Case:
    """A shape with as large a batch as makes it exceed ``BEYOND`` bytes."""
    _, keypoints, height, width = shape
    batch = BEYOND // (keypoints * height * width * DTYPES[dtype].itemsize) + 1
    return Case((batch, keypoints, height, width), dtype, layout)


def cases(dry_run: bool) -> tuple[list[Case], list[Case], list[Case]]:
    """Those of the first pass, of torch.compile, and of max-autotune, most wanted first."""
    if dry_run:
        tiny = [Case((2, 3, 7, 9)), Case((2, 3, 8, 8), "bfloat16", "channels_last")]
        return tiny, tiny[:1], []
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
    return contiguous + small + last + others, small[:2] + contiguous + small[2:], small[:2] + contiguous[:3]


class Run:
    """Everything measured so far, and the time left."""

    def __init__(self, device: str, seconds: float, samples: int) -> None:
        self.device = device
        self.timer = Timer(device, samples)
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.ceilings: dict[tuple[str, str, str, str], float] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, case: Case, peer: str, direction: str, mode: str, cache: str, stats: dict[str, Any]) -> None:
        # The map, and a map's coordinates and stats (or its upstream gradient and stats): the least that has to move.
        moved = PAIRS[direction] * case.bytes + case.maps * 24 * (1 + (direction == "forward+backward"))
        if peer in ("read", "copy"):
            moved = PAIRS[direction] * case.bytes
        ceiling = self.ceilings.get((case.label, direction, mode, cache))
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
        name = f"gpu[{case.label}-{direction}-{mode}-{cache}-{peer}]"
        self.rows.append(row(name, f"{case.label} {direction} {mode} {cache}", stats, **extra))

    def sweeps(self, case: Case, thunks: list[Thunk]) -> dict[str, list[Thunk]]:
        """What is timed: cold, and hot for maps that a cache can hold."""
        found = {"cold": thunks}
        if case.bytes <= self.timer.l2_bytes // 2 or self.device == "cpu":
            start = time.perf_counter()
            thunks[0]()
            self.timer.synchronize()
            found["hot"] = [thunks[0]] * sweep_length(time.perf_counter() - start)
        return found

    def time(self, case: Case, name: str, direction: str, thunks: list[Thunk]) -> None:
        """Eager and graph, cold and hot. A peer that cannot be captured keeps its eager rows."""
        for cache, sweep in self.sweeps(case, thunks).items():
            for mode, measure in (("eager", self.timer.eager), ("graph", self.timer.graph)):
                try:
                    self.add(case, name, direction, mode, cache, measure(sweep, cache == "cold"))
                except Exception as failure:
                    self.skipped.append(f"{name} at {case.label}, {direction}, {mode}: {_short(failure)}")
                    self.timer.synchronize()

    def measure_ceilings(self, case: Case, inputs: list[Tensor]) -> None:
        """Rows of the copy and of the quickest of several reductions, and the ceiling of every direction."""
        flat = [heatmap.permute(0, 2, 3, 1) if case.layout == "channels_last" else heatmap for heatmap in inputs]
        flat = [heatmap.flatten() for heatmap in flat]
        if case.bytes % 4 == 0:
            flat = [heatmap.view(torch.float32) for heatmap in flat]  # a reduction of half precision would compute more
        targets = [torch.empty_like(heatmap) for heatmap in flat]
        self.time(case, "copy", "backward", [lambda s=s, t=t: t.copy_(s) for s, t in zip(flat, targets, strict=True)])
        readers: list[Any] = [torch.sum, torch.amax]
        if any(peer.name == "triton" for peer in available(self.device)):
            from benchmarks import triton_kernels

            readers.append(triton_kernels.read)
        start = len(self.rows)
        for reader in readers:
            self.time(case, "read", "forward", [lambda s=s, r=reader: r(s) for s in flat])
        best: dict[tuple[str, str], dict[str, Any]] = {}
        for found in self.rows[start:]:
            key = (found["extra_info"]["mode"], found["extra_info"]["cache"])
            if key not in best or found["stats"]["median"] < best[key]["stats"]["median"]:
                best[key] = found
        self.rows[start:] = list(best.values())
        for found in self.rows:
            extra = found["extra_info"]
            if extra["case"] == case.label and extra["peer"] in ("copy", "read"):
                key3 = (case.label, extra["direction"], extra["mode"], extra["cache"])
                self.ceilings[key3] = found["stats"]["median"]
        for mode, cache in best:
            each = [self.ceilings.get((case.label, direction, mode, cache)) for direction in ("forward", "backward")]
            if each[0] is not None and each[1] is not None:
                self.ceilings[case.label, "forward+backward", mode, cache] = each[0] + each[1]

    def measure_peer(self, case: Case, peer: Peer, inputs: list[Tensor]) -> None:
        """Checked, then timed in every direction. A wrong peer is not timed; wrong results of ours end the run."""
        assert peer.build is not None
        for direction in ("forward", "forward+backward"):
            function = peer.build()
            leaves = inputs if direction == "forward" else [heatmap.detach().requires_grad_() for heatmap in inputs]
            try:
                wrong = error(peer, function, case, leaves[0], direction)
            except Exception as failure:
                wrong = f"{peer.name}: {_short(failure)}"
            if wrong is not None:
                if peer.name == OURS:
                    raise RuntimeError(f"{case.label}, {direction}: {wrong}")
                self.skipped.append(f"{case.label}, {direction}, {wrong}")
                continue
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
            self.skipped.append(f"{case.label} ({names}): out of time")
            return
        start = time.monotonic()
        with self.timer.on_stream():
            inputs = [heatmaps(case, self.device, seed) for seed in range(self.timer.inputs(case.bytes))]
            if ceilings:
                self.measure_ceilings(case, inputs)
            for peer in peers:
                self.measure_peer(case, peer, inputs)
        self.timer.synchronize()
        del inputs
        if self.device == "cuda":
            torch.cuda.empty_cache()
        print(f"{case.label}: {names}: {time.monotonic() - start:.1f} s, {self.left():.0f} s left", flush=True)


def _short(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:160] if str(failure).strip() else ''}"


def short_table(rows: list[dict[str, Any]]) -> str:
    """Times in microseconds of the cold rows, ours and every peer's."""
    names = [n for n in dict.fromkeys(r["extra_info"]["peer"] for r in rows) if n not in (OURS, "copy", "read")]
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
    if options.device == "cuda" and not (torch.cuda.is_available() and ops.has_kernel("cuda")):
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
            write(options.json, {**machine, "skipped": run.skipped}, run.rows)

    first, compiled, tuned = cases(options.dry_run)
    run.rows += host_time.measure(options.device, rounds=9, calls=100)
    run.rows += memory.measure(options.device, memory.DRY_CASES if options.dry_run else memory.CASES, plain)
    save()
    for case in first:
        run.measure(case, plain, needed=8, ceilings=True)
        save()
    for wanted, name, needed in ((compiled, "compiled", 15.0), (tuned, "max-autotune", 30.0)):
        for case in wanted:
            run.measure(case, [peer for peer in peers if peer.name == name], needed, ceilings=False)
            save()
    print(short_table(run.rows))
    if run.skipped:
        print("not measured:", *run.skipped, sep="\n  ")


if __name__ == "__main__":
    main()
