# SPDX-License-Identifier: MIT
"""The launch plan of the CUDA kernels: a table, and what holds for every entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpfused import _C

SIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
DTYPES = st.sampled_from(sorted(SIZE))


@pytest.mark.parametrize(
    ("height", "width", "dtype", "channels", "regime", "vector", "parts"),
    [
        # tiny maps: lanes of a warp
        (1, 1, "float32", 0, "team", 1, 1),
        (3, 3, "float32", 0, "team", 1, 1),
        (5, 5, "bfloat16", 0, "team", 1, 1),
        (7, 9, "float32", 0, "team", 1, 1),
        (10, 12, "float32", 0, "team", 4, 1),
        # usual maps: a block
        (64, 48, "float32", 0, "block", 4, 1),
        (64, 64, "bfloat16", 0, "block", 8, 1),
        (96, 72, "float64", 0, "block", 2, 1),
        (47, 53, "float32", 0, "block", 1, 1),
        # large maps: still a block and one launch
        (256, 256, "float32", 0, "block", 4, 1),
        (512, 256, "float32", 0, "block", 4, 1),
        # one row more, and the map is split
        (513, 256, "float32", 0, "split", 4, 9),
        (4096, 4096, "float32", 0, "split", 4, 1024),
        (2048, 2048, "bfloat16", 0, "split", 8, 128),
        (1, 1 << 20, "float32", 0, "split", 4, 256),
        (1 << 20, 1, "float32", 0, "split", 1, 64),
        # channels_last: an image, tiles of many channels, parts of a large one
        (10, 12, "float32", 17, "channels", 1, 1),
        (10, 12, "float32", 512, "channels", 4, 1),
        (64, 48, "float32", 17, "channels_split", 1, 4),
        (256, 256, "bfloat16", 16, "channels_split", 8, 32),
        # signals: one row, and parts of a long one
        (1, 384, "float32", 17, "channels", 1, 1),
        (1, 1440, "float32", 17, "channels", 1, 1),
        (1, 1446, "float32", 17, "channels_split", 1, 2),
        (1, 100000, "float32", 17, "channels_split", 1, 104),
        (3, 2200, "float32", 16, "channels_split", 4, 3),
    ],
)
def test_table(height: int, width: int, dtype: str, channels: int, regime: str, vector: int, parts: int) -> None:
    plan = _C.launch_plan(height, width, dtype, channels)
    assert (plan["regime"], plan["vector"], plan["parts"]) == (regime, vector, parts)


@pytest.mark.parametrize(
    ("height", "width", "dtype", "channels", "regime", "vector", "items", "parts"),
    [
        # rows: as for means, but float64 one element at a time
        (7, 9, "float32", 0, "team", 1, 8, 1),
        (64, 64, "bfloat16", 0, "block", 8, 2, 1),
        (256, 256, "float32", 0, "block", 4, 4, 1),
        (513, 256, "float32", 0, "split", 4, 4, 9),
        (96, 72, "float64", 0, "block", 1, 8, 1),
        # channels: two to a thread, where means take 16 bytes
        (10, 12, "float32", 17, "channels", 1, 8, 1),
        (10, 12, "float32", 512, "channels", 2, 8, 1),
        (256, 256, "bfloat16", 16, "channels_split", 2, 8, 32),
    ],
)
def test_table_of_moments(
    height: int, width: int, dtype: str, channels: int, regime: str, vector: int, items: int, parts: int
) -> None:
    plan = _C.launch_plan(height, width, dtype, channels, moments=True)
    assert (plan["regime"], plan["vector"], plan["items"], plan["parts"]) == (regime, vector, items, parts)


# Of two axes, one may be longer than 32 bits count.
EXTENTS = st.one_of(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.integers(1, 3000), st.integers(2**31, 2**33)),
    st.tuples(st.integers(2**31, 2**33), st.integers(1, 3000)),
)


@given(
    extents=EXTENTS,
    dtype=DTYPES,
    channels=st.one_of(st.just(0), st.integers(1, 3000)),
    aligned=st.booleans(),
    moments=st.booleans(),
)
def test_every_plan_covers_the_map_within_the_limits(
    extents: tuple[int, int], dtype: str, channels: int, aligned: bool, moments: bool
) -> None:
    height, width = extents
    plan = _C.launch_plan(height, width, dtype, channels, aligned, moments)
    accumulator = max(4, SIZE[dtype])
    # The launch: whole warps, registers for 256 threads, 48 KB of shared memory for one state a thread and channel.
    assert plan["threads"] % 32 == 0
    assert 32 <= plan["threads"] <= 256
    assert plan["tx"] * plan["ty"] * plan["groups"] <= plan["team"]
    assert plan["threads"] % plan["team"] == 0
    if channels:
        assert plan["threads"] * plan["vector"] * (10 if moments else 4) * accumulator <= 48 << 10
        assert plan["tiles"] * plan["groups"] * plan["vector"] >= channels
        assert channels % plan["vector"] == 0
    else:
        assert width % plan["vector"] == 0
        assert plan["columns_per_part"] % plan["vector"] == 0
    if plan["team"] <= 32:
        assert plan["team"] & (plan["team"] - 1) == 0
    # 16 bytes, with moments two channels, or one element; never a vector where memory is not aligned.
    assert plan["vector"] in (1, 2 if moments and channels else 16 // SIZE[dtype])
    assert aligned or plan["vector"] == 1
    rows = -(-height // plan["rows_per_part"])
    assert plan["parts"] == rows * -(-width // plan["columns_per_part"])
    # Within a part, kernels count in 32 bits.
    assert plan["rows_per_part"] + plan["threads"] < 2**31
    assert plan["columns_per_part"] + plan["threads"] * plan["vector"] < 2**31


@given(height=st.integers(1, 600), width=st.integers(1, 600), dtype=DTYPES)
def test_small_maps_are_not_split_and_large_ones_are(height: int, width: int, dtype: str) -> None:
    plan = _C.launch_plan(height, width, dtype)
    assert (plan["parts"] > 1) == (height * width * SIZE[dtype] > 512 << 10)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        _C.launch_plan(4, 4, "int8")
    with pytest.raises(ValueError, match="at least 1"):
        _C.launch_plan(0, 4, "float32")
