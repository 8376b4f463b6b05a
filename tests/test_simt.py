# SPDX-License-Identifier: MIT
"""The CUDA kernels, run on the CPU: one fiber per CUDA thread, under sanitizers (tests/simt).

Three things are shown: the emulator catches faults (toy.cpp), the project's kernels have none and agree with a
reference in extended precision, and faults planted in copies of those kernels are all reported.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from simt import build
from simt.faults import FAULTS, Fault, planted

pytestmark = pytest.mark.skipif(shutil.which(build.CXX) is None, reason=f"needs a C++ compiler; {build.CXX} is none")

JOBS = os.cpu_count() or 1
KINDS = tuple(build.KINDS)

# What the report of each build says, None where that build cannot catch the fault; toy.cpp has the faults.
MEMORY = "AddressSanitizer: heap-buffer-overflow"
WRONG = "wrong result in order"
TOY_REPORTS = {
    "read_past_end": (MEMORY, "read outside the maps"),
    "read_before_start": (MEMORY, "read outside the maps"),
    "write_past_end": (MEMORY, "written twice"),
    "shared_past_end": (MEMORY, "outside shared memory"),
    "misaligned": ("runtime error: .* misaligned", None),
    "missing_barrier": (WRONG, "uninitialised memory: shared memory"),
    "overwritten_early": (WRONG, "race: writes shared memory"),
    "missing_warp_barrier": (WRONG, "uninitialised memory: shared memory"),
    "shuffle_without_self": ("does not name the calling lane",) * 2,
    "shuffle_from_outside_mask": ("is not in the mask",) * 2,
    "shuffle_after_exit": ("lanes named by the mask do not arrive",) * 2,
    "shuffle_kinds_differ": ("lanes named by the mask do not arrive",) * 2,
    "shuffle_width": ("no power of two",) * 2,
    "barrier_in_branch": ("divergent __syncthreads",) * 2,
    "barriers_differ": ("divergent __syncthreads",) * 2,
    "exit_before_barrier": ("has exited",) * 2,
    "uninitialised_shared": (WRONG, "uninitialised memory: shared memory"),
    "written_twice": (None, "written twice"),
    "never_written": (WRONG, WRONG),
    "wrong_warp_count": (WRONG, WRONG),
}


@pytest.mark.parametrize("kind", KINDS)
def test_emulator_accepts_a_right_kernel(kind: str) -> None:
    passed, output = build.run(build.build_toy(kind), ["none"])
    assert passed, output


@pytest.mark.parametrize(
    ("kind", "fault", "report"),
    [
        (kind, fault, report)
        for fault, reports in TOY_REPORTS.items()
        for kind, report in zip(KINDS, reports, strict=True)
        if report
    ],
)
def test_emulator_catches(kind: str, fault: str, report: str) -> None:
    passed, output = build.run(build.build_toy(kind), [fault])
    assert not passed
    assert re.search(report, output), output


def expected_kernels() -> set[str]:
    """Every kernel that the sources instantiate, as the harness names it."""
    names = set()
    for dtype, vector in (("float", 4), ("double", 2), ("Float16", 8), ("Bfloat16", 8)):
        for v in (1, vector):
            forward, backward = f"forward<{dtype}, {v}>", f"backward<{dtype}, {v}, "
            names |= {f"{kernel} by {forward}" for kernel in ("rows_forward<T, V>", "channels_forward<T, V>")}
            names |= {f"merge_states<State<A>> by {forward}", f"add_grad_beta<A> by {backward}true>"}
            for kernel in ("rows_backward<T, V, kBeta>", "channels_backward<T, V, kBeta>"):
                names |= {f"{kernel} by {backward}{with_beta}>" for with_beta in ("true", "false")}
    # Those of moments and masks; float64 takes single elements only.
    for dtype, rows, channels in (("float", 4, 2), ("double", 1, 1), ("Float16", 8, 2), ("Bfloat16", 8, 2)):
        for kind, widest in (("rows", rows), ("channels", channels)):
            for v in {1, widest}:
                launcher = f"launch_{kind}_moments<{dtype}, {v}>"
                names |= {f"{kind}_moments<T, V> by {launcher}", f"{kind}_moments_backward<T, V> by {launcher}"}
    # Those of expectations take single elements of either layout.
    steps = ("expectation_sums<T>", "expectation_gradient<T>", "values_gradient<T, false>", "values_gradient<T, true>")
    for dtype in ("float", "double", "Float16", "Bfloat16"):
        names |= {f"{kernel} by expectation_step<{dtype}>" for kernel in steps}
    for dtype in ("float", "double"):
        names.add(f"add_parts<A> by launch_add_parts<{dtype}>")
        names |= {f"{kernel} by launch_merge<{dtype}>" for kernel in ("merge_states<Moments<A>>", "add_grad_beta<A>")}
        names |= {f"merge_volumes<{dtype}> by merge_slices", f"slice_gradients<{dtype}> by spread_gradients"}
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_kernels(kind: str) -> None:
    passed, output = build.run(build.build(kind), ["--kernels"], shards=JOBS)
    print(output)
    assert passed, output
    assert len(re.findall(r"^\d+ passed, 0 failed$", output, re.MULTILINE)) == JOBS, output
    assert set(re.findall(r"^kernel (.+)$", output, re.MULTILINE)) == expected_kernels()


def outcome(fault: Fault) -> tuple[bool, str]:
    """Whether the harness passes with the fault in the kernels, and what it prints."""
    with planted(fault) as csrc:
        return build.run(build.build(fault.kind, csrc, fault.sources, jobs=1), [fault.cases])


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Future[tuple[bool, str]]]]:
    """Compiling is most of the work: all planted faults are under way while the first is looked at."""
    with ThreadPoolExecutor(JOBS) as pool:
        yield {fault.name: pool.submit(outcome, fault) for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_reported(fault: Fault, outcomes: dict[str, Future[tuple[bool, str]]]) -> None:
    passed, output = outcomes[fault.name].result()
    assert not passed, f"{fault.name} went unnoticed: {output}"
    assert re.search(fault.report, output), output
