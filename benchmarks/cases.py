# SPDX-License-Identifier: MIT
"""What the benchmarks run: cases, inputs, directions, the check against the reference, and the head of a file."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Function, Peer, peers
from kpfused import __version__, reference

ROOT = Path(__file__).parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

skipped: list[str] = []  # what was not timed and why, for the head of a file

# Shapes that keypoint networks produce, (B, K, H, W).
SMALL = [(16, 32, 3, 3), (1, 2000, 5, 5), (64, 32, 7, 9), (64, 512, 10, 12), (1, 80, 80, 80)]
USUAL = [(32, 17, 64, 48), (64, 17, 64, 48), (64, 17, 64, 64)]
LARGE = [(64, 133, 96, 72), (16, 17, 256, 256), (8, 51, 256, 256), (1, 1, 4096, 4096)]

# A peer is wrong beyond this share of the longer side; half precision alone costs the peers most of the second.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One input: shape (B, K, H, W), dtype by name, and memory layout."""

    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    layout: str = "contiguous"

    @property
    def label(self) -> str:
        text = ",".join(map(str, self.shape))
        text += "" if self.dtype == "float32" else f" {self.dtype}"
        return text + ("" if self.layout == "contiguous" else f" {self.layout}")

    @property
    def maps(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def elements(self) -> int:
        return self.maps * self.shape[2] * self.shape[3]

    @property
    def bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize


def heatmaps(case: Case, device: str, seed: int = 0) -> Tensor:
    """Random maps; never zeros, which hide faults and can run faster than data does."""
    generator = torch.Generator(device).manual_seed(seed)
    maps = torch.randn(case.shape, generator=generator, device=device).to(DTYPES[case.dtype])
    return maps.contiguous(memory_format=torch.channels_last) if case.layout == "channels_last" else maps


def upstream(case: Case, device: str, dtype: torch.dtype) -> Tensor:
    """The gradient that arrives at the coordinates; x and y differ."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn((*case.shape[:2], 2), generator=generator, device=device).to(dtype)


def call(function: Function, heatmap: Tensor, direction: str, gradient: Tensor | None = None) -> Callable[[], Any]:
    """The thunk that is timed. ``heatmap`` needs a gradient for ``forward+backward`` and must not for ``forward``."""
    if direction == "forward":
        return functools.partial(function, heatmap)
    return lambda: torch.autograd.grad(function(heatmap), heatmap, gradient)


def error(peer: Peer, function: Function, case: Case, heatmap: Tensor, direction: str) -> str | None:
    """What is wrong with a peer on an input, or None. Compares the first and the last batch item with float64."""
    ends = sorted({0, case.shape[0] - 1})
    expected, expected_gradient = _reference(case, heatmap.device.type)
    tolerance = TOLERANCE[heatmap.dtype] * max(case.shape[2:])
    if direction == "forward":
        result = function(heatmap.detach())
    else:
        leaf = heatmap.detach().requires_grad_()
        result = function(leaf)
        gradient = torch.autograd.grad(result, leaf, upstream(case, heatmap.device.type, result.dtype))[0]
        largest = expected_gradient.abs().max().item() or 1.0  # zero for maps of one pixel
        off = (gradient[ends].double() - expected_gradient).abs().max().item() / largest
        # Peers in half precision round P and every product; a wrong gradient is off by about 1.
        if not off < (0.2 if heatmap.dtype.itemsize == 2 else 1e-2):
            return f"{peer.name}: gradient off by {off:.2g} of the largest"
    if tuple(result.shape) != (*case.shape[:2], 2):
        return f"{peer.name}: shape {tuple(result.shape)}"
    off = (result[ends].double() - expected).abs().max().item()
    return None if off < tolerance else f"{peer.name}: {off:.2g} pixels off"


@functools.lru_cache(maxsize=2)
def _reference(case: Case, device: str) -> tuple[Tensor, Tensor]:
    ends = sorted({0, case.shape[0] - 1})
    maps = heatmaps(case, device)[ends].double().requires_grad_()
    result = reference.soft_argmax2d(maps)
    gradient = torch.autograd.grad(result, maps, upstream(case, device, torch.float64)[ends])[0]
    return result.detach(), gradient


def not_measured(what: str, failure: Exception) -> str:
    """Shows a failure in full, and notes it for the head of a file, in the one line that is returned.

    That is the first of its message, or the last where a Triton kernel is quoted before it.
    """
    traceback.print_exception(failure)
    lines = str(failure).strip().splitlines() or [""]
    line = lines[-1] if re.match(r"at \d+:\d+:", lines[0]) else lines[0]
    skipped.append(f"{what}: {type(failure).__name__}: {line.strip()[:160]}")
    return skipped[-1]


def source_digest() -> str:
    """A digest of what is measured, for checkouts that carry no version control."""
    digest = hashlib.sha256()
    for pattern in ("csrc/**/*", "kpfused/**/*.py", "benchmarks/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _command(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit, with a plus where files differ from it."""
    found = os.environ.get("KPFUSED_COMMIT") or _command("git", "rev-parse", "--short=12", "HEAD")
    return (found or "unknown") + ("+" if _command("git", "status", "--porcelain", "csrc", "kpfused") else "")


def _processor() -> str:
    lines = _command("lscpu").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name:")]
    return names[0] if names else platform.processor() or platform.machine()


def head(device: str, command: str) -> dict[str, Any]:
    """Device, versions, date and commit: what a figure needs beside it."""
    from kpfused import _C

    build = _C.build_info()
    found: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "sources": source_digest(),
        "kpfused": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "cpu_kernels": build.get("cpu_capability", ""),
        "peers": {peer.name: peer.note for peer in peers(device)},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": driver or "unknown",
            "cuda": torch.version.cuda,
            "nvcc": build.get("nvcc", ""),
            "architectures": build.get("cuda_architectures", ""),
            "triton": _installed("triton"),
        }
    return found


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def row(name: str, group: str, stats: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """A result in the form that pytest-benchmark writes, which ``table.py`` reads."""
    return {"name": name, "group": group, "stats": stats, "extra_info": extra}


def write(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine_info": machine, "commit_info": {"id": machine["commit"]}, "benchmarks": rows}
    path.write_text(json.dumps({**found, "datetime": machine["date"], "version": "kpfused-1"}, indent=1) + "\n")
