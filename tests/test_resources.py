# SPDX-License-Identifier: MIT
"""The machine code of the CUDA kernels, read from the built module: registers, memory, and the element loops."""

from __future__ import annotations

import re

import pytest

from benchmarks import resources
from benchmarks.resources import Kernel, bits
from kpfused import _C

ARCHITECTURES = [a.replace(".", "").removesuffix("+PTX") for a in _C.build_info()["cuda_architectures"].split(";") if a]

pytestmark = [
    pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA kernels"),
    pytest.mark.skipif(resources.cuobjdump() is None, reason="no cuobjdump to read machine code with"),
]


def all_kernels(arch: str) -> list[Kernel]:
    return resources.kernels(resources.built_module(), arch)


def streaming(arch: str) -> list[Kernel]:
    return [k for k in all_kernels(arch) if k.streams]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_is_in(arch: str) -> None:
    """Four types, whole vectors and single elements, forward, backward with and without dbeta, rows and channels."""
    means = [k for k in streaming(arch) if not k.moments]
    assert len(means) == 4 * 2 * 3 * 2
    # Moments: float64 takes single elements alone, and dbeta is always summed.
    assert len(streaming(arch)) - len(means) == (3 * 2 + 1) * 2 * 2
    # Expectations, four kernels a type: E, and the gradients of the map and of values, shared and not.
    expectations = [k for k in all_kernels(arch) if re.match("expectation_|values_gradient", k.short)]
    assert len(expectations) == 4 * 4
    # And the merges, for both accumulators: states of means, of moments, dbeta, and parts of expectations; and of
    # slices, in both directions.
    assert len(all_kernels(arch)) == len(streaming(arch)) + len(expectations) + 2 * 6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_no_local_memory(arch: str) -> None:
    for kernel in all_kernels(arch):
        assert (kernel.stack, kernel.local) == (0, 0), kernel.short
        assert not any(re.search(r"\b(LDL|STL)\b", text) for _, text in kernel.instructions), kernel.short


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_block_fits(arch: str) -> None:
    for kernel in all_kernels(arch):
        assert kernel.blocks >= 1, kernel.short


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_main_loops(arch: str) -> None:
    """Loads of 16 bytes before the first use, exp2 in hardware, no division, no call."""
    for kernel in streaming(arch):
        loop = kernel.main_loop
        assert loop, kernel.short
        loads = [text for text in loop if text.startswith("LDG")]
        stores = [text for text in loop if text.startswith("STG")]
        assert len(stores) == (kernel.items if kernel.direction == "backward" else 0), kernel.short
        assert all(bits(text) == 8 * kernel.element_bytes * kernel.vector for text in loads + stores), kernel.short
        # Channels of moments are loaded two at a time, whole sectors by neighbouring threads.
        narrow = kernel.moments and "channels" in kernel.name
        assert kernel.vector in (1, 2 if narrow else 16 // kernel.element_bytes), kernel.short
        if kernel.element_bytes < 8:  # float64's exp2 is the math library's and has conversions of its own
            elements = kernel.items * kernel.vector
            assert sum("MUFU.EX2" in text for text in loop) >= elements, kernel.short
            first = next(i for i, text in enumerate(loop) if "MUFU" in text)
            assert all("LDG" not in text for text in loop[first:]), kernel.short
            # Before the jump back may stand the way out, which sm_8x may write as a call without return.
            assert not any(re.search(r"MUFU.RCP|F2I|\bCALL\b", text) for text in loop[:-2]), kernel.short
            assert "CALL" not in loop[-2] or re.match(r"@!?P\d CALL\.REL\.NOINC", loop[-2]), kernel.short


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a == "90"])
def test_instruction_budget(arch: str) -> None:
    """What an H200's bandwidth leaves; float64 is bound by arithmetic and has none."""
    for kernel in streaming(arch):
        if kernel.budget is not None:
            assert 4 < kernel.per_element <= kernel.budget, f"{kernel.short}: {kernel.per_element:.1f}"


def test_committed_table_is_of_these_kernels() -> None:
    """By name, so any architecture that was built will do."""
    committed = resources.RESULT.read_text()
    assert set(re.findall(r"^\| `(.*?)`", committed, re.M)) == {k.short for k in all_kernels(ARCHITECTURES[0])}
