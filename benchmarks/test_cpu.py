# SPDX-License-Identifier: MIT
"""CPU benchmarks beside the peers, in one process: ``pytest benchmarks --benchmark-json=results.json``.

Peers of one case follow each other directly. Times are reported, never asserted: what is asserted is that kpfused
computes the right coordinates and gradient before it is timed. A peer that does not is skipped, and the table says so.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import OURS, Function, Peer, available
from benchmarks.cases import LARGE, SMALL, USUAL, Case, call, error, heatmaps, skipped, upstream

pytest.importorskip("pytest_benchmark")

OTHERS = [(32, 17, 64, 48), (16, 17, 256, 256)]  # where bfloat16 and channels_last are measured too, with 2 threads
DIRECTIONS = ("forward", "forward+backward")
GROUPS: list[tuple[Case, str, int]] = [
    *itertools.product([Case(shape) for shape in (*SMALL, *USUAL, *LARGE)], DIRECTIONS, (1, 2)),
    *itertools.product([Case(shape, dtype="bfloat16") for shape in OTHERS], DIRECTIONS, (2,)),
    *itertools.product([Case(shape, layout="channels_last") for shape in OTHERS], DIRECTIONS, (2,)),
]
PEERS = {peer.name: peer for peer in available("cpu")}
BUDGET = 0.4  # seconds of measurement for each peer of each case, where the fewest rounds allow it
ROUND = 2e-4  # seconds: shorter calls are repeated within a round, so that reading the clock costs nothing


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def _input(case: Case, direction: str) -> Tensor:
    return heatmaps(case, "cpu").requires_grad_(direction != "forward")


def _rounds(function: Callable[[], Any]) -> tuple[int, int]:
    """Rounds, and calls a round, from the quicker of two calls."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    calls = max(1, round(ROUND / min(seconds)))
    fewest = 7 if min(seconds) < 0.1 else 3
    return min(200, max(fewest, int(BUDGET / (min(seconds) * calls)))), calls


@pytest.mark.parametrize(
    ("case", "direction", "threads", "name"),
    [
        pytest.param(
            *group, name, id=f"{group[0].label.replace(',', 'x').replace(' ', '-')}-{group[1]}-{group[2]}-{name}"
        )
        for group, name in itertools.product(GROUPS, PEERS)
    ],
    indirect=["threads"],
)
def test_speed(benchmark: Any, case: Case, direction: str, threads: int, name: str) -> None:
    peer: Peer = PEERS[name]
    assert peer.build is not None
    function: Function = peer.build()
    heatmap = _input(case, direction)
    wrong = error(peer, function, case, heatmap, direction)  # which also warms up, and compiles
    if wrong is not None and name != OURS:
        skipped.append(wrong := f"{case.label}, {direction}, {threads} threads: {wrong}")
        pytest.skip(wrong)
    assert wrong is None, wrong
    thunk = call(function, heatmap, direction, upstream(case, "cpu", function(heatmap).dtype))
    rounds, iterations = _rounds(thunk)
    benchmark.group = f"{case.label} {direction} {threads} threads"
    benchmark.extra_info.update(
        peer=name,
        dtype=case.dtype,
        layout=case.layout,
        case=case.label,
        direction=direction,
        threads=threads,
        device="cpu",
    )
    benchmark.pedantic(thunk, rounds=rounds, iterations=iterations, warmup_rounds=0)
