# SPDX-License-Identifier: MIT
"""Peak memory of forward+backward beyond input, gradient and coordinates, as a share of the input.

    python -m benchmarks.memory                   # CPU: a table, and JSON with --json PATH
    python -m benchmarks.memory --device cuda

On CPU every allocation and release that torch's allocator reports is summed up; memory that a kernel takes past that
allocator shows in a second figure, the rise of the process's peak resident size. On CUDA it is the allocator's peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import OURS, Peer, available
from benchmarks.cases import Case, head, heatmaps, row, write

CASES = [Case((32, 17, 64, 48)), Case((32, 17, 64, 48), layout="channels_last"), Case((16, 17, 256, 256))]
DRY_CASES = [Case((2, 17, 16, 12))]


def peak_bytes_beyond(function: Callable[[Tensor], Tensor], heatmap: Tensor) -> int:
    """Bytes that forward+backward of ``function`` need at their peak, beyond input, its gradient and the output.

    The upstream gradient counts as input. A first call, unmeasured, leaves out what is set up once.
    """
    leaf = heatmap.detach().requires_grad_()
    result = function(leaf)
    gradient = torch.ones_like(result)
    torch.autograd.grad(result, leaf, gradient)
    del result
    gc.collect()

    def step() -> int:
        output = function(leaf)
        (grad,) = torch.autograd.grad(output, leaf, gradient)
        return output.untyped_storage().nbytes() + grad.untyped_storage().nbytes()

    peak, kept = _cuda_peak(step) if heatmap.is_cuda else _cpu_peak(step)
    return max(0, peak - kept)


def _cuda_peak(step: Callable[[], int]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    return torch.cuda.max_memory_allocated() - before, kept


def _cpu_peak(step: Callable[[], int]) -> tuple[int, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        trace = json.loads(Path(file.name).read_text(errors="replace"))
    changes = sorted(
        (event["ts"], index, int(event["args"]["Bytes"]))
        for index, event in enumerate(trace["traceEvents"])
        if event.get("name") == "[memory]"
    )
    if not changes:
        raise RuntimeError("the profiler reported no allocations")
    live = peak = 0
    for _, _, size in changes:
        live += size
        peak = max(peak, live)
    return peak, kept


def resident_bytes_beyond(function: Callable[[Tensor], Tensor], heatmap: Tensor) -> int | None:
    """The same by the process's peak resident size, or None where the system does not tell. Good to a megabyte or so.

    For maps beyond 32 MB, which the C library takes from the system and gives back at once. Whatever is set up at a
    first call counts here, so one map is run before.
    """
    leaf = heatmap.detach().requires_grad_()
    small = heatmap[:1].detach().requires_grad_()
    torch.autograd.grad(function(small).sum(), small)
    output_bytes, gradient = 0, torch.ones(*heatmap.shape[:2], 2)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _status("VmRSS")
        output = function(leaf)
        (grad,) = torch.autograd.grad(output, leaf, gradient.to(output.dtype))
        output_bytes = output.untyped_storage().nbytes() + grad.untyped_storage().nbytes()
        return max(0, _status("VmHWM") - before - output_bytes)
    except OSError:
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(device: str, cases: list[Case], peers: list[Peer] | None = None) -> list[dict[str, Any]]:
    """Rows of every peer at every case."""
    rows = []
    for case in cases:
        heatmap = heatmaps(case, device)
        for peer in peers if peers is not None else available(device):
            assert peer.build is not None
            function = peer.build()
            beyond = peak_bytes_beyond(function, heatmap)
            extra = {"peer": peer.name, "case": case.label, "device": device, "input_bytes": case.bytes}
            resident = None
            if device == "cpu" and case.bytes > 32 << 20 and not peer.compiles:
                resident = resident_bytes_beyond(function, heatmap)
            stats = {"bytes_beyond": beyond, "share_of_input": beyond / case.bytes, "resident_bytes_beyond": resident}
            rows.append(row(f"memory[{case.label}-{peer.name}]", "memory", stats, kind="memory", **extra))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="one tiny case")
    parser.add_argument("--only", help="one peer, by name")
    options = parser.parse_args()
    peers = [peer for peer in available(options.device) if options.only in (None, peer.name)]
    rows = measure(options.device, DRY_CASES if options.dry_run else CASES, peers)
    if options.json:
        write(options.json, head(options.device, "python -m benchmarks.memory"), rows)
    print(f"{'case':32} {'peer':14} {'beyond, bytes':>14} {'share of input':>15} {'by resident size':>17}")
    for found in rows:
        stats, extra = found["stats"], found["extra_info"]
        resident = stats["resident_bytes_beyond"]
        shown = "" if resident is None else f"{resident / extra['input_bytes']:.2%}"
        mark = " <-" if extra["peer"] == OURS else ""
        share = f"{stats['share_of_input']:.3%}"
        print(f"{extra['case']:32} {extra['peer']:14} {stats['bytes_beyond']:14,} {share:>15} {shown:>17}{mark}")


if __name__ == "__main__":
    main()
