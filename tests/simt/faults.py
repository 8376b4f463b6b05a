# SPDX-License-Identifier: MIT
"""Faults to plant in copies of the kernels, and the report that each must draw."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simt.build import CSRC


@dataclass(frozen=True)
class Fault:
    """One replacement in one source file. ``old`` must be there exactly ``times`` times: refactoring fails loudly."""

    name: str
    file: str  # below csrc
    old: str
    new: str
    kind: str  # the build that catches it, see build.KINDS
    report: str  # a regular expression
    arguments: tuple[str, ...]  # of the harness: the cases that show it
    flags: tuple[str, ...] = ()
    times: int = 1


@contextmanager
def planted(fault: Fault) -> Iterator[Path]:
    """A copy of csrc with the fault in it."""
    with tempfile.TemporaryDirectory(prefix="kpfused-simt-") as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(CSRC, csrc)
        source = csrc / fault.file
        text = source.read_text()
        found = text.count(fault.old)
        if found != fault.times:
            raise AssertionError(f"{fault.file} has {found} times, not {fault.times}: {fault.old!r}; update faults.py")
        source.write_text(text.replace(fault.old, fault.new))
        yield csrc


FAULTS: tuple[Fault, ...] = ()
