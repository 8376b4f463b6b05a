# SPDX-License-Identifier: MIT
"""Builds and runs the harness: the project's kernels on the CPU, one fiber per CUDA thread.

    python tests/simt/build.py asan   [arguments of the harness]    AddressSanitizer and UBSan
    python tests/simt/build.py access [arguments of the harness]    every access followed: races, stray reads (access.h)

Objects are kept in build/simt under a hash of everything that goes into them, so nothing is compiled twice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests/simt"
CSRC = ROOT / "csrc"
CACHE = ROOT / "build/simt"
CXX = os.environ.get("CXX", "g++")
KEEP_DAYS = 7

COMMON = ["-std=c++17", "-Wall", "-Wextra", "-DKPFUSED_SIMT"]
# Frame pointers and -g1 give reports that name lines; more would only slow the compiler down.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# maybe-uninitialized: of values that the same condition sets and uses: at -O1 the compiler does not see that.
KERNEL_WARNINGS = ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-maybe-uninitialized"]
KERNEL = ["-O1", "-g1", "-fno-omit-frame-pointer", *KERNEL_WARNINGS]
KINDS = {
    "asan": {"host": ["-O2", "-DKPFUSED_SIMT_ASAN"], "kernel": SANITIZE, "link": SANITIZE},
    # No run time of ThreadSanitizer is linked: access.cpp defines what the instrumented kernels call.
    "access": {"host": ["-O2", "-DKPFUSED_SIMT_ACCESS"], "kernel": ["-fsanitize=thread"], "link": []},
}
HEADERS = {".h", ".cuh"}
EMULATOR = (SIMT / "simt.cpp", SIMT / "access.cpp")


class BuildError(RuntimeError):
    """A compiler's complaint."""


@functools.cache
def compiler_version() -> str:
    return subprocess.run([CXX, "--version"], check=True, capture_output=True, text=True).stdout


def run_compiler(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def cached(suffix: str, ingredients: Iterable[str | Path], make: Sequence[str | Path]) -> Path:
    """The file that the command ``make`` writes, with the file's name appended to it, unless it is there already.

    ``ingredients`` are all that decides on its contents: text, and files.
    """
    key = hashlib.sha256(compiler_version().encode())
    for item in ingredients:
        key.update(item.read_bytes() if isinstance(item, Path) else item.encode())
        key.update(b"\0")
    path = CACHE / f"{key.hexdigest()[:24]}{suffix}"
    if path.exists():
        path.touch()
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    # Two builds at once may both write it; each moves a whole file into place.
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.{time.monotonic_ns()}{suffix}")
    try:
        run_compiler([*make, "-o", unfinished])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def headers(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in HEADERS)


def compile_object(source: Path, flags: Sequence[str], include: Sequence[Path], reads: Sequence[Path]) -> Path:
    command = [CXX, *COMMON, *flags, *(f"-I{folder}" for folder in include), "-x", "c++", "-c", source]
    return cached(".o", [*COMMON, *flags, source, *reads], command)


def build(kind: str, csrc: Path = CSRC, only: Sequence[str] | None = None, jobs: int | None = None) -> Path:
    """The harness around the kernels in ``csrc``; or around the sources ``only`` of it and the project's own others."""
    flags = KINDS[kind]
    host = [*EMULATOR, *sorted((SIMT / "harness").glob("*.cpp"))]
    public = ["params.h", "layout.h", "units.h", "cuda/soft_argmax2d.h", "cuda/expectation2d.h", "cuda/volumes.h"]
    host_reads = [*headers(SIMT, SIMT / "harness"), *(CSRC / name for name in public)]
    kernels = sorted(path for path in (CSRC / "cuda").iterdir() if path.suffix in {".cu", ".cpp"})

    def host_object(source: Path) -> Path:
        if source.name == "places.cpp":  # calls functions of the kernels
            reads = [*host_reads, *headers(CSRC, CSRC / "cuda")]
            return compile_object(source, [*flags["host"], *KERNEL_WARNINGS], [SIMT, CSRC], reads)
        return compile_object(source, flags["host"], [SIMT, CSRC], host_reads)

    def kernel_object(source: Path) -> Path:
        folder = csrc if only is None or source.name in only else CSRC
        reads = headers(SIMT, folder, folder / "cuda")
        return compile_object(folder / "cuda" / source.name, [*KERNEL, *flags["kernel"]], [SIMT, folder], reads)

    # The linker keeps the first of several copies of an inline function: those of ``csrc`` come first.
    kernels.sort(key=lambda source: only is not None and source.name not in only)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        futures = [pool.submit(kernel_object, source) for source in kernels]
        futures += [pool.submit(host_object, source) for source in host]
        objects = [future.result() for future in futures]
    prune()
    return cached("", [*flags["link"], *(path.name for path in objects)], [CXX, *flags["link"], *objects])


def build_toy(kind: str) -> Path:
    """The emulator around toy.cpp instead of the project's kernels."""
    flags, reads = KINDS[kind], headers(SIMT)
    objects = [compile_object(source, flags["host"], [SIMT], reads) for source in EMULATOR]
    objects.append(compile_object(SIMT / "toy.cpp", [*KERNEL, *flags["kernel"], *flags["host"][1:]], [SIMT], reads))
    return cached("", [*flags["link"], *(path.name for path in objects)], [CXX, *flags["link"], *objects])


def run(binary: Path, arguments: Sequence[str] = (), shards: int = 1) -> tuple[bool, str]:
    """Whether all shards of the harness succeed, and what they print."""
    commands = [[binary, *arguments, *(["--shard", f"{k}/{shards}"] if shards > 1 else [])] for k in range(shards)]
    with ThreadPoolExecutor(shards) as pool:
        done = list(pool.map(lambda c: subprocess.run(c, capture_output=True, text=True, env=environment()), commands))
    return all(d.returncode == 0 for d in done), "".join(d.stdout + d.stderr for d in done)


def prune() -> None:
    """Forgets what has not been used for a week."""
    oldest = time.time() - KEEP_DAYS * 86400
    for path in CACHE.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def environment() -> dict[str, str]:
    """For running the harness. Leaks are of no interest, and looking for them needs rights a container may lack."""
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options}


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in KINDS:
        print(__doc__, file=sys.stderr)
        return 2
    return subprocess.run([build(arguments[0]), *arguments[1:]], env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
