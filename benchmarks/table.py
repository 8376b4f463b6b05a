# SPDX-License-Identifier: MIT
"""Markdown tables from the JSON of the benchmarks.

    python benchmarks/table.py results.json > table.md
    python benchmarks/table.py results.json --readme README.md

The second replaces what stands between ``<!-- benchmark:cpu -->`` and ``<!-- /benchmark:cpu -->`` (or ``cuda``), so
that no figure is written by hand. Several files are put under one another. A peer's column is its time over kpfused's:
below 1 kpfused loses, and that is set in bold.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

OURS = "kpfused"
DASH = "–"  # noqa: RUF001

Row = dict[str, Any]


def number(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """A peer's time over ours; losses in bold."""
    if value is None:
        return DASH
    shown = f"{number(value)}×"  # noqa: RUF001
    return f"**{shown}**" if value < 1 else shown


def multiple(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}×"  # noqa: RUF001


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe(machine: dict[str, Any]) -> str:
    """One line: device, versions, commit, date, and the command that measured."""
    if "gpu" in machine:
        where = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, triton {machine['triton']}"
    else:
        where = f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_kernels']} kernels"
    versions = f"kpfused {machine['kpfused']} ({machine['commit']}), torch {machine['torch']}"
    load = f"; load average {machine['load']} at the end" if machine.get("load") is not None else ""
    return f"{where}; {versions}, Python {machine['python']}; {machine['date']}; `{machine['command']}`{load}."


def peer_notes(machine: dict[str, Any]) -> str:
    notes = [f"`{name}`: {note}" for name, note in machine["peers"].items() if name != OURS]
    return "Peers: " + "; ".join(notes) + "."


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["extra_info"]["case"], {})[row["extra_info"]["peer"]] = row
    return found


def speed_table(rows: list[Row], statistic: str, gpu: bool) -> str:
    """One row a case: our time, the fastest peer, and every peer as a ratio."""
    names = list(dict.fromkeys(row["extra_info"]["peer"] for row in rows))
    others = [name for name in names if name not in (OURS, "copy", "copy_", "read")]
    header = ["B,K,H,W", f"{OURS}, µs", *(["GB/s", "of the ceiling"] if gpu else []), "fastest peer", *others]
    lines = []
    for case, found in by_case(rows).items():
        if OURS not in found:
            continue
        ours = found[OURS]["stats"][statistic]
        ratios = {name: found[name]["stats"][statistic] / ours for name in others if name in found}
        fastest = min(ratios, key=lambda name: ratios[name], default=None)
        line = [case, number(ours * 1e6)]
        if gpu:
            extra = found[OURS]["extra_info"]
            share = extra.get("share_of_ceiling")
            line += [number(extra["gigabytes_per_second"]), DASH if share is None else f"{share:.0%}"]
        line.append(DASH if fastest is None else f"{ratio(ratios[fastest])} ({fastest})")
        lines.append(line + [ratio(ratios.get(name)) for name in others])
    return markdown(header, lines)


def speed(rows: list[Row], statistic: str) -> list[str]:
    """A table for every combination of direction, threads and way of running."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        extra = row["extra_info"]
        title = extra["direction"].capitalize()
        if extra["device"] == "cpu" and "mode" not in extra:
            title += f", {extra['threads']} thread" + "s" * (extra["threads"] > 1)
        else:
            title += f", {extra['mode']}, cache {extra['cache']}"
        parts.setdefault(title, []).append(row)
    return [
        f"**{title}** ({statistic})\n\n{speed_table(found, statistic, 'mode' in found[0]['extra_info'])}"
        for title, found in parts.items()
    ]


def memory(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["extra_info"]["peer"] for row in rows))
    lines = []
    for case, found in by_case(rows).items():
        shares = [found[n]["stats"]["share_of_input"] if n in found else None for n in names]
        lines.append([case, *(DASH if s is None else f"{s:.2%}" for s in shares)])
    title = "**Peak memory of forward+backward beyond input, gradient and coordinates**, as a share of the input"
    return f"{title}\n\n{markdown(['B,K,H,W', *names], lines)}"


def host(rows: list[Row], statistic: str) -> str:
    names = list(dict.fromkeys(row["extra_info"]["peer"] for row in rows))
    lines = []
    for direction in dict.fromkeys(row["extra_info"]["direction"] for row in rows):
        found = {
            r["extra_info"]["peer"]: r["stats"][statistic] for r in rows if r["extra_info"]["direction"] == direction
        }
        if OURS not in found:
            continue
        line = [direction, number(found[OURS] * 1e6)]
        lines.append(line + [ratio(found[n] / found[OURS]) if n in found else DASH for n in names if n != OURS])
    case = rows[0]["extra_info"]["case"]
    title = (
        f"**Host time of a call** on {case} ({statistic}); peers, and other ways to give the same kernels to autograd,"
        " bare of checks, as multiples of kpfused's"
    )
    return f"{title}\n\n{markdown(['', f'{OURS}, µs', *(n for n in names if n != OURS)], lines)}"


def beyond(rows: list[Row]) -> list[str]:
    """What is asked of kpfused beyond the mean: its cost over the plain call's, then peers' over ours, then memory."""
    tables = []
    for cost, title, figures in (
        (True, "Cost beside the same call without it", ["of the time without", "to read the mask, each way"]),
        (False, "Beside compositions of the same results", ["composition"]),
    ):
        lines = []
        for row in rows:
            extra, stats = row["extra_info"], row["stats"]
            if extra.get("cost") is not cost:
                continue
            shown = [multiple(stats["ratio"]), multiple(stats.get("reading"))] if cost else [ratio(stats["ratio"])]
            lines.append([extra["question"], extra["case"], number(stats["median"] * 1e6), *shown])
        tables.append(f"**{title}, 1 thread** (median)\n\n{markdown(['', 'shape', f'{OURS}, µs', *figures], lines)}")
    lines = [
        [row["extra_info"]["question"], row["extra_info"]["case"], f"{row['stats']['share_of_input']:.2%}"]
        for row in rows
        if "share_of_input" in row["stats"]
    ]
    return [*tables, markdown(["", "shape", "of the input"], lines)]


def ceilings(machine: dict[str, Any]) -> list[str]:
    lines = [[name, number(value)] for name, value in machine.get("ceilings_gigabytes_per_second", {}).items()]
    return [f"**Ceilings measured in the same run**\n\n{markdown(['', 'GB/s'], lines)}"] if lines else []


def skipped(machine: dict[str, Any]) -> list[str]:
    lines = machine.get("skipped", [])
    return ["Not measured: " + "; ".join(lines) + "."] if lines else []


def render(document: dict[str, Any], statistic: str, only: re.Pattern[str], notes: bool) -> str:
    """All tables of one file; ``notes``: with what the peers are."""
    machine = document["machine_info"]
    kinds: dict[str, list[Row]] = {}
    for row in document["benchmarks"]:
        kinds.setdefault(row["extra_info"].get("kind", "speed"), []).append(row)
    blocks = [describe(machine), *([peer_notes(machine)] if notes else []), *ceilings(machine)]
    blocks += [table for table in speed(kinds.get("speed", []), statistic) if only.search(table.split("\n")[0])]
    if "memory" in kinds:
        blocks.append(memory(kinds["memory"]))
    if "host" in kinds:
        blocks.append(host(kinds["host"], statistic))
    blocks += beyond(kinds["beyond"]) if "beyond" in kinds else []
    blocks += skipped(machine)
    return "\n\n".join(blocks)


def replace_block(path: Path, device: str, text: str) -> None:
    """Put ``text`` between the two marks of a device; a file without them is an error."""
    start, end = f"<!-- benchmark:{device} -->", f"<!-- /benchmark:{device} -->"
    before = path.read_text(encoding="utf-8")
    if before.count(start) != 1 or before.count(end) != 1:
        sys.exit(f"{path}: expected {start} and {end} once each")
    first, rest = before.split(start)
    path.write_text(f"{first}{start}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, help="replace the block of the first file's device there")
    parser.add_argument("--statistic", default="median", choices=["median", "min", "mean"])
    parser.add_argument("--only", default="", help="regular expression on the titles of speed tables")
    options = parser.parse_args()
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    only = re.compile(options.only, re.IGNORECASE)
    shown: list[dict[str, str]] = []
    texts = []
    for document in documents:
        found = document["machine_info"]["peers"]
        texts.append(render(document, options.statistic, only, notes=found not in shown))
        shown.append(found)
    text = "\n\n".join(texts)
    if options.readme is None:
        print(text)
        return
    device = "cuda" if "gpu" in documents[0]["machine_info"] else "cpu"
    replace_block(options.readme, device, text)


if __name__ == "__main__":
    main()
