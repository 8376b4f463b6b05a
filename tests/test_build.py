# SPDX-License-Identifier: MIT
"""setup.py and what the built module says of itself."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kpfused
from kpfused import _C, info

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("KPFUSED_CUDA", "TORCH_CUDA_ARCH_LIST", "DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(SETUP))


def fake_nvcc(folder: Path, *architectures: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{a}\n" for a in architectures))
    nvcc.chmod(0o755)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    return nvcc


def test_default_architectures_are_those_nvcc_knows(script: dict[str, Any], tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "72", "80", "86", "90")
    flags, listed = script["gencode"](nvcc)
    assert listed == "8.0;8.6;9.0+PTX"
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_an_nvcc_without_a_default_architecture(script: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"knows none of .* set TORCH_CUDA_ARCH_LIST"):
        script["gencode"](fake_nvcc(tmp_path, "70", "72"))


def test_architecture_list_is_honoured(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 12.0+PTX")
    flags, listed = script["gencode"](tmp_path)
    assert listed == "9.0a;12.0+PTX"
    assert flags[0] == "-gencode=arch=compute_90a,code=sm_90a"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9;8.6")
    assert script["gencode"](tmp_path)[0] == [
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_86,code=sm_86",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must list numbers"):
        script["gencode"](tmp_path)


def test_cuda_switch(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = script["find_nvcc"]
    nvcc = fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find() == nvcc
    monkeypatch.setenv("KPFUSED_CUDA", "0")
    assert find() is None
    monkeypatch.setenv("KPFUSED_CUDA", "maybe")
    with pytest.raises(SystemExit, match="KPFUSED_CUDA must be 0, 1 or auto; got 'maybe'"):
        find()
    # No nvcc anywhere: every path that could hold one is empty.
    find.__globals__["Path"] = lambda *parts: tmp_path / "empty/bin/nvcc"
    monkeypatch.setenv("KPFUSED_CUDA", "auto")
    assert find() is None
    monkeypatch.setenv("KPFUSED_CUDA", "1")
    with pytest.raises(SystemExit, match="no nvcc was found"):
        find()


@pytest.mark.parametrize("missing", ["torch", "ninja", "pybind11"])
def test_missing_requirement_is_one_line(missing: str) -> None:
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_path({str(SETUP)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"kpfused: building needs {missing}")


def test_a_checkout_that_is_not_built(tmp_path: Path) -> None:
    """It hides an installed package from whoever stands in it, which the error says."""
    shutil.copytree(SETUP.parent / "kpfused", tmp_path / "kpfused", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "-c", "import kpfused"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=without_path())
    assert result.returncode != 0
    assert f"ImportError: kpfused._C is not built in {tmp_path / 'kpfused'}: run `make build`" in result.stderr


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("baseline", r"\Abaseline\n\Z"),
        ("", r"\A(avx512|avx2|baseline)\n\Z"),  # no wish
        ("AVX2", r"ValueError: KPFUSED_CPU_CAPABILITY must be avx512, avx2 or baseline; got AVX2\n\Z"),
    ],
)
def test_cpu_capability(wish: str, words: str) -> None:
    command = [sys.executable, "-c", "from kpfused import _C; print(_C.build_info()['cpu_capability'])"]
    environment = {**os.environ, "KPFUSED_CPU_CAPABILITY": wish}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert re.search(words, result.stdout + result.stderr)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile a library with")
@pytest.mark.parametrize("there", [True, False])
def test_streams_are_found_in_a_library_that_torch_keeps_to_itself(there: bool, tmp_path: Path) -> None:
    """Torch loads its CUDA library for itself alone, and a linker need not have kept a reference to it."""
    library = tmp_path / "libtorch_cuda.so"
    source = tmp_path / "stream.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }')
    subprocess.run(["g++", "-shared", f"-Wl,-soname,{library.name}", source, "-o", library], check=True)
    load = f"ctypes.CDLL({str(library)!r}, ctypes.RTLD_LOCAL)" if there else "0"
    code = f"import ctypes, torch; kept = {load}; from kpfused import _C; print(_C.build_info()['torch_streams'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(there or torch.version.cuda is not None)


def without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_version_has_one_source() -> None:
    assert _C.build_info()["version"] == kpfused.__version__


def test_symbols_are_for_debugging() -> None:
    """Python's own flags ask for them, which made the module eight times as large."""
    asked = "-g" in _C.build_info()["flags"].split()
    assert (b".debug_info" in Path(_C.__file__).read_bytes()) == asked


@pytest.mark.parametrize("found", [True, False])
def test_info_says_where_torch_has_no_streams(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build = _C.build_info() | {"torch_streams": found}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert ("streams were not found" in info.report()["CUDA of torch"]) != found


def test_info_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    info.main()
    printed = capsys.readouterr().out
    for name in ("kpfused", "torch", "compiler", "flags", "CPU kernels", "CUDA kernels", "CUDA device"):
        assert f"\n{name} " in f"\n{printed}"


@pytest.mark.parametrize("cuda", [True, False])
def test_info_says_which_kernels_are_in(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build = _C.build_info() | {"cuda": cuda, "nvcc": "13.0", "cuda_architectures": "9.0+PTX"}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    expected = "in, nvcc 13.0, architectures 9.0+PTX" if cuda else "this is a CPU package"
    assert expected in info.report()["CUDA kernels"]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump to read machine code with")
def test_element_loops_take_no_vector_apart() -> None:
    """Vectors of 64 bytes once were, element by element, which cost half the speed of AVX-512."""
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    loops: dict[str, int] = {}
    function = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            function = line
        elif re.search(r"sum_columns|lane_sums|lane_moments", function):
            loops[function] = loops.get(function, 0) + bool(re.search(r"\bvalign", line))
    if platform.machine() != "x86_64" or not loops:
        pytest.skip("no loop to be seen: another processor, or a stripped module")
    assert len(loops) > 50
    # One vector takes six, and a loop has several; a single one may move an index.
    assert {name: count for name, count in loops.items() if count > 4} == {}


def test_no_macro_that_older_torch_lacks() -> None:
    """Torch's target version leaves out functions that are too new, not macros: this one came with 2.13."""
    sources = [*SETUP.parent.glob("csrc/torch/*.cpp"), *SETUP.parent.glob("csrc/torch/*.h")]
    assert len(sources) > 5
    assert not [path.name for path in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in path.read_text()]
