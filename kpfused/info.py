# SPDX-License-Identifier: MIT
"""``python -m kpfused.info``: versions, architectures, flags and devices, to put into a bug report."""

from __future__ import annotations

import platform

import torch

from kpfused import _C
from kpfused.version import __version__


def report() -> dict[str, str]:
    """What this installation is, line by line."""
    build = _C.build_info()
    cuda = "not built (no nvcc when the package was built, or KPFUSED_CUDA=0): this is a CPU package"
    if build["cuda"]:
        cuda = f"nvcc {build['nvcc']}, architectures {build['cuda_architectures']}"
    of_torch = torch.version.cuda or "none (a CPU build of torch)"
    if torch.version.cuda and not build["torch_streams"]:
        of_torch += ", whose streams were not found: CUDA tensors cannot be used"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "kpfused": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": f"{torch.__version__} (built against {build['torch']}, stable ABI of 2.10)",
        "compiler": build["compiler"],
        "flags": build["flags"],
        "CPU kernels": f"in, using {build['cpu_capability']}, {torch.get_num_threads()} threads",
        "CUDA kernels": f"in, {cuda}" if build["cuda"] else cuda,
        "CUDA of torch": of_torch,
        "CUDA device": device,
    }


def main() -> None:
    lines = report()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
