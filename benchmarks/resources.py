# SPDX-License-Identifier: MIT
"""What the compiler made of every CUDA kernel: registers, shared memory, occupancy and machine instructions.

    python -m benchmarks.resources            # of the built module, writes benchmarks/results/resources.md
    python -m benchmarks.resources --arch 80  # another architecture

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
THREADS = {"75": 1024, "80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048, "120": 1536}
SHARED = {"75": 64, "80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "120": 100}

# Instructions an element that 4.3 TB/s leave to 132 multiprocessors of 128 lanes at 1.75 GHz: bytes an element over
# bandwidth, times lanes. Forward reads an element, backward reads and writes it.
BUDGET = {("forward", 4): 29, ("forward", 2): 14, ("backward", 4): 58, ("backward", 2): 29}
# The kernels of moments do twice the arithmetic of means: in half precision they are held to what they take, which is
# more than that bandwidth leaves.
MOMENTS_BUDGET = {("forward", 4): 29, ("forward", 2): 26, ("backward", 4): 58, ("backward", 2): 33}


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

    @property
    def parameters(self) -> list[str]:
        """Template arguments: element type, elements of a load, and of means whether dbeta is wanted."""
        return re.search(r"<(.*)>\(", self.name)[1].replace("kpfused::cuda::", "").split(", ")  # type: ignore[index]

    @property
    def short(self) -> str:
        """Name without namespaces and arguments."""
        return re.sub(r"^void |kpfused::(cuda::)?|\(.*", "", self.name)

    @property
    def streams(self) -> bool:
        """Whether it walks over maps, as many elements at a time as fit; expectations do not, and the others merge."""
        return "rows" in self.name or "channels" in self.name

    @property
    def moments(self) -> bool:
        """Whether it is one of the kernels of moments and masks."""
        return "_moments" in self.name

    @property
    def element_bytes(self) -> int:
        return {"float": 4, "double": 8}.get(self.parameters[0], 2)

    @property
    def vector(self) -> int:
        return int(self.parameters[1])

    @property
    def direction(self) -> str:
        return "backward" if "backward" in self.name else "forward"

    @property
    def items(self) -> int:
        """Loads in flight: items_of of csrc/plan.h."""
        items = 8 if self.vector == 1 else 4 if self.element_bytes == 8 else 16 // self.vector
        return items // 2 if "channels_moments_backward" in self.name else items  # kGradientItems

    @property
    def main_loop(self) -> list[str]:
        """The loop whose steps need no bounds check: the one that loads from maps without a predicate."""
        found = [
            loop for loop in self.loops() if self._loads(loop) == [8 * self.element_bytes * self.vector] * self.items
        ]
        return min(found, key=len, default=[])

    @staticmethod
    def _loads(loop: list[str]) -> list[int]:
        """Widths of all loads but those of bytes, which are of masks."""
        return [bits(text) for text in loop if text.startswith("LDG") and ".U8" not in text]

    @property
    def per_element(self) -> float:
        """Instructions of the main loop, over the elements it takes."""
        return len(self.main_loop) / (self.items * self.vector)

    @property
    def budget(self) -> int | None:
        return (MOMENTS_BUDGET if self.moments else BUDGET).get((self.direction, self.element_bytes))

    @property
    def blocks(self) -> int:
        """Blocks of 256 threads that the registers of one multiprocessor hold."""
        warp = -(-self.registers * 32 // 256) * 256
        return min(REGISTERS // warp // 8, THREADS[self.arch] // 256)

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


def bits(text: str) -> int:
    """How wide a load or a store is."""
    width = re.search(r"\b(?:LDG|STG)\S*?\.(?:U|S)?(8|16|64|128)\b", text)
    return int(width[1]) if width else 32


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


def built_module() -> Path:
    from kpfused import _C

    return Path(_C.__file__)


def table(arch: str) -> str:
    """The Markdown table of one architecture."""
    head = (
        "| kernel | registers | stack, local | blocks of 256 threads | occupancy | instructions an element | budget |"
    )
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for k in kernels(built_module(), arch):
        count = f"{k.per_element:.1f}" if k.streams else ""
        budget = str(k.budget) if k.streams and k.budget else ""
        occupancy = 256 * k.blocks / THREADS[arch]
        lines.append(
            f"| `{k.short}` | {k.registers} | {k.stack}, {k.local} "
            f"| {k.blocks} | {occupancy:.0%} | {count} | {budget} |"
        )
    return "\n".join(lines) + "\n"


PREFACE = """# What the compiler made of the CUDA kernels

Written by `python -m benchmarks.resources`; nvcc {nvcc}, sm_{arch}. Template arguments: element type, elements of one
load, and for means whether the gradient with respect to beta is wanted. Instructions are those of the main loop over
the elements it takes, all of its branches counted. The budget of means is what 4.3 TB/s leave to 132 multiprocessors of
128 lanes at 1.75 GHz: 29 forward in float32 and 14 in half precision, twice that backward. Kernels of moments keep to
it in float32; in half precision they exceed it, and their budget only holds them to what they take. Maps with a mask
take these kernels too, but another loop, the one that also ends a column. Kernels of expectations take single elements
of either layout, and values_gradient's second argument is whether maps share the values; their loops have branches for
all that values may be, and no count. Blocks are counted by registers and threads alone; shared memory is at most 4 KB
for rows and 48 KB for channels, by launch.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90", choices=sorted(THREADS, key=int))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    from kpfused import _C

    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(PREFACE.format(nvcc=_C.build_info()["nvcc"], arch=options.arch) + table(options.arch))
    print(options.output.read_text())


if __name__ == "__main__":
    main()
