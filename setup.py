# SPDX-License-Identifier: MIT
"""Builds kpfused._C. Metadata is in pyproject.toml.

Environment: KPFUSED_CUDA=0|1|auto, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1, CUDA_HOME. Nothing is downloaded and no
GPU is looked for: CUDA kernels are compiled wherever nvcc is found.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import ninja  # noqa: F401
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(f"kpfused: building needs {error.name}; run: pip install torch==2.13.0 ninja pybind11 setuptools numpy")

ROOT = Path(__file__).parent
VERSION = re.search(r'"(.+)"', (ROOT / "kpfused/version.py").read_text())[1]
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def find_nvcc():
    """Path of nvcc, or None where CUDA is switched off or not installed."""
    wish = os.environ.get("KPFUSED_CUDA", "auto").lower()
    if wish not in ("0", "1", "auto"):
        sys.exit(f"kpfused: KPFUSED_CUDA must be 0, 1 or auto; got {wish!r}")
    if wish == "0":
        return None
    on_path = Path(shutil.which("nvcc") or "/nowhere/bin/nvcc").resolve().parents[1]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path, "/usr/local/cuda"]
    nvcc = next((Path(h, "bin/nvcc") for h in homes if h and Path(h, "include/cuda_runtime.h").exists()), None)
    if nvcc is None and wish == "1":
        sys.exit("kpfused: KPFUSED_CUDA=1 but no nvcc was found; put it on PATH or set CUDA_HOME")
    return nvcc


def gencode(nvcc):
    """nvcc flags for TORCH_CUDA_ARCH_LIST, or for the default architectures this nvcc knows plus PTX of the newest."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        listed = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
        listed = listed or sys.exit(f"kpfused: {nvcc} knows none of {ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST")
        listed[-1] += "+PTX"
    flags, first = [], {}
    for arch in listed:
        number = arch.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d{2,3}[af]?", number):
            sys.exit(f"kpfused: TORCH_CUDA_ARCH_LIST must list numbers such as 9.0 or 9.0+PTX; got {arch!r}")
        # From the intermediate code of the generation's first, which saves a sixth of nvcc's time. Not so 9.0a.
        virtual = min(number, first.setdefault(number[:-1], number)) if number.isdigit() else number
        flags += [f"-gencode=arch=compute_{virtual},code=sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] * arch.endswith("+PTX")
    return flags, ";".join(listed)


def extension():
    nvcc, cuda, architectures, release = find_nvcc(), [], "", ""
    cxx = ["-std=c++17", "-fvisibility=hidden", "-Wall", *(["-O0", "-g"] if DEBUG else ["-O3", "-g0"])]
    sources = ["csrc/module.cpp", *ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/torch/*.cpp")]
    # Ahead of torch's own directory: the pybind11 that torch 2.11 bundles is an error beside a target version.
    options = {"include_dirs": [pybind11.get_include()], "extra_link_args": ["-Wl,--exclude-libs,ALL"]}
    if nvcc:
        cpp_extension.CUDA_HOME = str(nvcc.parents[1])  # a CPU build of torch does not look for it
        gencode_flags, architectures = gencode(nvcc)
        release = re.search(r"release (\S+),", subprocess.check_output([nvcc, "--version"], text=True))[1]
        # -ftz: weights below 2^-126 count as zero, and exp2 is then one hardware instruction. Not --use_fast_math.
        cuda = ["-std=c++17", "-ftz=true", *(["-O0", "-g", "-G"] if DEBUG else ["-O3"]), *gencode_flags]
        sources += ROOT.glob("csrc/cuda/*.cu")
        # The runtime is linked statically, so that the module also loads where no CUDA is installed.
        options |= {"libraries": ["cudart_static", "dl", "rt"], "library_dirs": [str(nvcc.parents[1] / "lib64")]}
    macros = {
        "TORCH_TARGET_VERSION": "0x020a000000000000",  # the stable ABI of torch 2.10
        "KPFUSED_CUDA": str(int(nvcc is not None)),
        "KPFUSED_VERSION": f'"{VERSION}"',
        "KPFUSED_TORCH": f'"{torch.__version__}"',
        "KPFUSED_NVCC": f'"{release}"',
        "KPFUSED_ARCHITECTURES": f'"{architectures}"',
        "KPFUSED_FLAGS": f'"{" ".join([*cxx, *cuda[:3]])}"',
    }
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    return cpp_extension.CppExtension(
        "kpfused._C",
        sorted(str(Path(source).relative_to(ROOT) if Path(source).is_absolute() else source) for source in sources),
        extra_compile_args={"cxx": cxx + defines, "nvcc": cuda + defines},
        **options,
    )


if __name__ == "__main__":
    setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
