# SPDX-License-Identifier: MIT
"""What the JSON of pytest-benchmark carries: the head of ``cases.head``, and summaries without every single timing."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import cases

_DROPPED = ("data", "outliers", "ld15iqr", "hd15iqr", "iqr_outliers", "stddev_outliers", "total", "ops", "q1", "q3")


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for row in output_json["benchmarks"]:
        row["stats"] = {name: value for name, value in row["stats"].items() if name not in _DROPPED}
        for name in ("options", "params", "param", "fullname"):
            row.pop(name, None)
    output_json["machine_info"] = {**cases.head("cpu", "make bench"), "skipped": cases.skipped}
    # The commit is in the head; names of people and branches are nobody's business here.
    output_json["commit_info"] = {"id": output_json["machine_info"]["commit"]}
