# SPDX-License-Identifier: MIT
"""The CPU kernels on their own, under AddressSanitizer and UBSan: every instruction set this machine can run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from simt import build

from kpfused import _C

pytestmark = pytest.mark.skipif(shutil.which(build.CXX) is None, reason=f"needs a C++ compiler; {build.CXX} is none")

CPU = build.CSRC / "cpu"
MAIN = build.ROOT / "tests/native/cpu_kernels.cpp"
# Without optimisation: the kernels are templates inlined by force, and optimising them under sanitizers takes minutes.
FLAGS = ["-std=c++17", "-O0", "-g1", *build.SANITIZE]


def compile_object(source: Path, *extra: str) -> Path:
    reads = build.headers(build.CSRC, CPU)
    return build.cached(".o", [*FLAGS, *extra, source, *reads], [build.CXX, *FLAGS, *extra, "-c", source])


def program(*extra: str, of: str = "") -> Path:
    """The stand-alone checks; ``extra`` are flags of the kernels whose file has ``of`` in its name."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted(CPU.glob("*.cpp"))
        kernels = pool.map(lambda s: compile_object(s, *(extra if of in s.name else ())), sources)
        objects: Sequence[Path] = [compile_object(MAIN), *kernels]
    return build.cached("", [path.name for path in objects], [build.CXX, *FLAGS, *objects, "-pthread"])


def run(binary: Path, capability: str) -> str:
    """Output of a run without a failure and without a word from the sanitizers."""
    environment = {**os.environ, "KPFUSED_CPU_CAPABILITY": capability}
    done = subprocess.run([binary], capture_output=True, text=True, env=environment, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "runtime error" not in output
    assert "Sanitizer" not in output
    counts = re.search(rf"^{capability}: (\d+) passed, 0 failed$", output, re.M)
    assert counts, output
    assert int(counts[1]) > 1000
    return output


CAPABILITIES = ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize("capability", CAPABILITIES[: CAPABILITIES.index(_C.build_info()["cpu_capability"]) + 1])
def test_kernels_under_sanitizers(capability: str) -> None:
    run(program(), capability)


@pytest.mark.skipif(_C.build_info()["cpu_capability"] == "baseline", reason="needs AVX2")
def test_vectors_as_wide_as_avx512() -> None:
    """The arithmetic of 64-byte vectors, on instructions that more machines have."""
    run(program("-DKPFUSED_CPU_VECTOR_BYTES=64", of="avx2"), "avx2")


def test_an_overrun_is_caught(tmp_path: Path) -> None:
    """One element beyond the end of every map, planted in a copy of the kernels: the checks must not pass."""
    copy = tmp_path / "csrc"
    shutil.copytree(build.CSRC, copy)
    path, intact = copy / "cpu/backward_rows.h", "v[j] = load(h + at + j * L)"
    text = path.read_text()
    assert text.count(intact) == 1
    path.write_text(text.replace(intact, intact.replace("j * L", "j * L + 1")))
    flags = [*FLAGS, "-pthread"]
    objects = [
        compile_object(MAIN),
        *(compile_object(s) for s in sorted(CPU.glob("*.cpp")) if "baseline" not in s.name),
    ]
    planted = tmp_path / "planted"
    source = copy / "cpu/soft_argmax2d_baseline.cpp"
    subprocess.run([build.CXX, *flags, source, *objects, "-o", planted], check=True)
    environment = {**os.environ, "KPFUSED_CPU_CAPABILITY": "baseline"}
    done = subprocess.run([planted], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
