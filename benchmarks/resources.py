# SPDX-License-Identifier: MIT
"""What the compiler made of every CUDA kernel: registers, shared memory, occupancy and machine instructions.

    python benchmarks/resources.py            # of the built module, writes benchmarks/results/resources.md
    python benchmarks/resources.py --arch 80  # another architecture

Needs no GPU: it reads the machine code inside ``kpfused._C`` with cuobjdump (from a CUDA toolkit, or from the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/resources.md"

# Per multiprocessor: 65536 registers, given out in units of 256 a warp; threads; shared memory in bytes.
REGISTERS = 65536
THREADS = {"80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048, "120": 1536}
SHARED = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "120": 100}

# Instructions an element that 4.3 TB/s leave to 132 multiprocessors of 128 lanes at 1.75 GHz: bytes an element over
# bandwidth, times lanes. Forward reads an element, backward reads and writes it.
BUDGET = {("forward", 4): 29, ("forward", 2): 14, ("backward", 4): 58, ("backward", 2): 29}


@dataclass
class Kernel:
    """One kernel of one architecture."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0
    instructions: list[tuple[int, str]] = field(default_factory=list)

    def loops(self) -> list[list[str]]:
        """The instructions of every innermost loop, found by its backward branch."""
        found = []
        addresses = [address for address, _ in self.instructions]
        for address, text in self.instructions:
            target = re.search(r"\bBRA(?:\.\S+)?\s+(?:U?P\d+,\s*)?(0x[0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                found.append((int(target[1], 16), address))
        inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
        return [
            [text for at, text in self.instructions[addresses.index(start) : addresses.index(end) + 1]]
            for start, end in inner
            if start in addresses
        ]


def cuobjdump() -> str | None:
    """Path of cuobjdump, or None."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/cuobjdump"
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/cuobjdump"
    return next((str(p) for p in (packaged, home) if p.exists()), shutil.which("cuobjdump"))


def demangle(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return text.splitlines()


@functools.cache
def kernels(module: Path, arch: str) -> list[Kernel]:
    """Every kernel of one architecture in a built module, sorted by name."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump not found; install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ.get('PATH', '')}"}

    def dump(option: str) -> str:
        command = [tool, option, "-arch", f"sm_{arch}", str(module)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    found: dict[str, Kernel] = {}
    usage = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    for name, *numbers in usage.findall(dump("-res-usage")):
        found[name] = Kernel(name, arch, *map(int, numbers))
    current: Kernel | None = None
    for line in dump("-sass").splitlines():
        if function := re.search(r"Function : (\S+)", line):
            current = found[function[1]]
        elif current and (code := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            current.instructions.append((int(code[1], 16), code[2].strip()))
    for kernel, name in zip(found.values(), demangle(list(found)), strict=True):
        kernel.name = name
    return sorted(found.values(), key=lambda k: k.name)
