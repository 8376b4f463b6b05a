# SPDX-License-Identifier: MIT
"""Heatmaps sharded over real processes, on one machine: the cases of tests/distributed, once per world.

To start processes is slow, so that each world starts once and runs all cases.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)
if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
    pytest.skip("DTensor of torch before 2.13 lacks rules that all cases together need", allow_module_level=True)

from tests.distributed import World, cases_of

WORLDS = [("gloo", 2), ("gloo", 4), ("nccl", 2)]
SECONDS = 180  # for one world, on a busy machine
COLLECTIVE = timedelta(seconds=30)  # how long a rank waits for one that has failed
TORCH = str(Path(torch.__file__).parent)
LAST_WORDS = 4000  # characters of what a rank printed before it crashed

Report: TypeAlias = dict[str, str]  # case: how it failed, or nothing


def run_rank(rank: int, size: int, backend: str, folder: Path) -> None:
    """All cases, up to the first that fails: after it, ranks may be at different collectives."""
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    device = "cuda" if backend == "nccl" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=COLLECTIVE
    )
    world, report = World(rank, size, device), Report()
    for name, case in cases_of(size).items():
        torch.manual_seed(0)
        try:
            case(world)
            torch.distributed.barrier()
            report[name] = ""
        except Exception as error:
            report[name] = f"rank {rank} at {datetime.now():%T.%f}:\n{told(error)}"
        (folder / f"{rank}.json").write_text(json.dumps(report))
        if report[name]:
            return
    torch.distributed.destroy_process_group()


def told(error: Exception) -> str:
    """Where, without torch's own frames, which would hide the rank that failed first behind those that it left."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(TORCH)]
    return "".join(traceback.format_list(frames) + traceback.format_exception_only(error))


def report_of(rank: int, size: int, folder: Path, code: int | None) -> Report:
    """With the case that a rank crashed in, of which it tells nothing, and the others only that it has gone."""
    file, log = folder / f"{rank}.json", folder / f"{rank}.log"
    report: Report = json.loads(file.read_text()) if file.exists() else {}
    left = [case for case in cases_of(size) if case not in report]
    if code and left:
        words = log.read_text(errors="replace")[-LAST_WORDS:] if log.exists() else ""
        report[left[0]] = f"rank {rank}: exit code {code}\n{words}"
    return report


@functools.cache
def run_world(backend: str, size: int) -> list[Report]:
    """One report a rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn = torch.multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=run_rank, args=(rank, size, backend, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        end = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()  # nothing, where it has ended
            process.join()
        return [report_of(rank, size, folder, process.exitcode) for rank, process in enumerate(processes)]


@pytest.mark.parametrize(
    ("backend", "size", "case"), [(*world, case) for world in WORLDS for case in cases_of(world[1])]
)
def test_sharded(backend: str, size: int, case: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    outcomes = [report.get(case, f"rank {rank}: not reached") for rank, report in enumerate(run_world(backend, size))]
    assert not any(outcomes), "\n".join(filter(None, outcomes))


PLAIN = """
import sys, torch, kpfused
class Subclass(torch.Tensor): pass
kpfused.soft_argmax2d(torch.ones(3, 3).as_subclass(Subclass))
sys.exit("torch.distributed.tensor" in sys.modules)
"""


def test_dtensor_is_not_loaded_without_one() -> None:
    """It takes about as long to import as the rest, and there are builds of torch without it."""
    assert subprocess.run([sys.executable, "-c", PLAIN], cwd=Path(__file__).parents[1], check=False).returncode == 0
