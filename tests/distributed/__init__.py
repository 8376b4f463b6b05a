# SPDX-License-Identifier: MIT
"""What every rank of tests/test_distributed.py runs: the ops on sharded heatmaps beside the whole map on one rank.

All ranks draw the same numbers, so each can compute the single-process result itself.
"""

from __future__ import annotations

from tests.distributed import coordinates, expectations, moments, pixels, programs
from tests.distributed.world import Case, World

__all__ = ["World", "cases_of"]

CASES = [*coordinates.CASES, *moments.CASES, *expectations.CASES, *pixels.CASES, *programs.CASES]


def cases_of(size: int) -> dict[str, Case]:
    """By name. To compile takes long, and longer with more processes than cores."""
    return {case.__name__: case for case in CASES if case is not programs.compiled or size == 2}
