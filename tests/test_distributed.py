# SPDX-License-Identifier: MIT
"""Heatmaps sharded over real processes, on one machine: the cases of tests/distributed, once per world.

To start processes is slow, so that each world starts once and runs all cases.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
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

Report: TypeAlias = dict[str, str]  # case: how it failed, or nothing


def run_rank(rank: int, size: int, backend: str, folder: Path) -> None:
    """All cases, up to the first that fails: after it, ranks may be at different collectives."""
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
        except Exception:
            report[name] = f"rank {rank}:\n{traceback.format_exc()}"
        (folder / f"{rank}.json").write_text(json.dumps(report))
        if report[name]:
            return
    torch.distributed.destroy_process_group()


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
        files = [folder / f"{rank}.json" for rank in range(size)]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files]


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
