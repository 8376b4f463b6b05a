# SPDX-License-Identifier: MIT
"""The CPU kernels on their own, under AddressSanitizer: every instruction set this machine can run.

The best of them is under UBSan too. Its checks double the time that compiling takes, and nearly all that they look at
is the same source for all; what is left out is what only the others have, such as half precision without hardware.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from simt import build

from kpfused import _C

pytestmark = pytest.mark.skipif(shutil.which(build.CXX) is None, reason=f"needs a C++ compiler; {build.CXX} is none")

CPU = build.CSRC / "cpu"
KERNELS = sorted(CPU.glob("*.cpp"))
CHECKS = build.ROOT / "tests/native"
CAPABILITIES = ["baseline", "avx2", "avx512"]
HERE = CAPABILITIES[: CAPABILITIES.index(_C.build_info()["cpu_capability"]) + 1]
WIDE = "vectors as wide as those of AVX-512"
# Without optimisation: the kernels are templates inlined by force, and optimising them under sanitizers takes minutes.
KERNEL_FLAGS = ["-std=c++17", "-O0", "-g1"]
ADDRESS = ["-fsanitize=address"]
# With it, the checks run in half the time.
CHECK_FLAGS = ["-std=c++17", "-O1", "-g1", *ADDRESS]
LINK = [build.CXX, *build.SANITIZE, "-pthread"]


def compile_kernel(source: Path, *extra: str) -> Path:
    reads = build.headers(build.CSRC, CPU)
    others = [f"_{capability}." for capability in CAPABILITIES if capability != HERE[-1]]
    sanitize = ADDRESS if any(other in source.name for other in others) else build.SANITIZE
    flags = [*KERNEL_FLAGS, *sanitize, *extra]
    return build.cached(".o", [*flags, source, *reads], [build.CXX, *flags, "-c", source])


def compile_check(source: Path) -> Path:
    reads = build.headers(build.CSRC, CPU, build.SIMT / "harness", CHECKS)
    include = [f"-I{folder}" for folder in (build.CSRC, CHECKS.parent)]
    return build.cached(".o", [*CHECK_FLAGS, source, *reads], [build.CXX, *CHECK_FLAGS, *include, "-c", source])


def compile_all(kernels: Sequence[Path], *extra: str, of: str = "") -> list[Path]:
    """Objects of kernels and of the checks; ``extra`` are flags of the kernels whose file has ``of`` in its name."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # What takes longest comes first.
        objects = [pool.submit(compile_kernel, source, *(extra if of in source.name else ())) for source in kernels]
        objects += [pool.submit(compile_check, source) for source in sorted(CHECKS.glob("*.cpp"))]
        return [future.result() for future in objects]


def program(*extra: str, of: str = "") -> Path:
    """The stand-alone checks of kernels compiled with ``extra``, as :func:`compile_all` says."""
    objects = compile_all(KERNELS, *extra, of=of)
    return build.cached("", [path.name for path in objects], [*LINK, *objects])


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
    assert int(counts[1]) > 600_000
    return output


def run_wide() -> str:
    """64-byte vectors, without the instructions of AVX-512."""
    return run(program("-DKPFUSED_CPU_VECTOR_BYTES=64", of="avx2"), "avx2")


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Future[str]]]:
    """Each program runs on one core: all are under way while the first is looked at."""
    binary = program()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {capability: pool.submit(run, binary, capability) for capability in HERE}
        if HERE[-1] == "avx2":
            runs[WIDE] = pool.submit(run_wide)
        runs["overrun"] = pool.submit(run_overrun)
        yield runs


@pytest.mark.parametrize("capability", HERE)
def test_kernels_under_sanitizers(capability: str, outcomes: dict[str, Future[str]]) -> None:
    outcomes[capability].result()


@pytest.mark.skipif(HERE[-1] != "avx2", reason="AVX-512 is here itself, or AVX2 is not")
def test_vectors_as_wide_as_avx512(outcomes: dict[str, Future[str]]) -> None:
    outcomes[WIDE].result()


def run_overrun() -> str:
    """What AddressSanitizer says of one element beyond the end of every map, planted in a copy of the kernels."""
    with tempfile.TemporaryDirectory(prefix="kpfused-native-") as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(build.CSRC, copy)
        path, intact = copy / "cpu/backward_rows.h", "v[j] = load(h + at + j * L)"
        text = path.read_text()
        assert text.count(intact) == 1
        path.write_text(text.replace(intact, intact.replace("j * L", "j * L + 1")))
        source, planted = copy / "cpu/soft_argmax2d_baseline.cpp", Path(folder) / "planted"
        objects = compile_all([kernel for kernel in KERNELS if kernel.name != source.name])
        subprocess.run([*LINK, *KERNEL_FLAGS, *ADDRESS, source, *objects, "-o", planted], check=True)
        environment = {**os.environ, "KPFUSED_CPU_CAPABILITY": "baseline"}
        done = subprocess.run([planted], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode != 0
        return done.stderr


def test_an_overrun_is_caught(outcomes: dict[str, Future[str]]) -> None:
    """The checks must not pass."""
    assert "ERROR: AddressSanitizer" in outcomes["overrun"].result()
