"""Measures everything and writes docs/benchmarks.md, with docs/benchmarks.json beside it.

`make bench` calls it; `make bench ARGS="--only update stepping"` measures a part anew and keeps the
other rows, each with the day and machine that it was measured on. Learning takes hours: its rows
come from benchmarks/results/, which learning.py fills.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import BENCHMARKS, Row, here, run_json, shown

ROOT = BENCHMARKS.parent
SECTIONS = {
    "end_to_end": "Training",
    "on_device": "Training on the device",
    "distributed": "Training on a Ray cluster",
    "elastic": "Workers, nodes and environments that fail",
    "dqn": "Training from a replay",
    "async_ppo": "Training while collecting",
    "async_dqn": "Filling a replay while learning",
    "replay": "Replay",
    "which_ppo": "Collecting while learning, or in turns",
    "lag": "Old rollouts",
    "update": "The update",
    "looking": "Who looks at the steps of a blocking run",
    "convolution": "Convolution",
    "stepping": "Stepping environments",
    "time_to_solve": "Time to solve",
    "learning": "Learning",
    "tuning": "Searching for settings",
    "guards": "Guards",
    "exactness": "Exactness",
}
# These have pages of their own, since theirs are no rows of figures.
PAGES = ("faults", "scaling", "storms")
Rows = dict[str, list[Row]]


def measure(name: str, quick: bool) -> list[Row]:
    """Runs one benchmark in a process of its own."""
    print(f"== {name}", file=sys.stderr, flush=True)
    words = [f"benchmarks/{name}.py"] + ["--quick"] * quick
    found = run_json([sys.executable, BENCHMARKS / f"{name}.py", *words[1:]])
    defaults = {"command": f"python {' '.join(words)}", "measured": here()}
    return [Row(**{**row, **_missing(row, defaults)}) for row in found["rows"]]


def _missing(row: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if not row.get(name)}


def load(path: Path) -> Rows:
    """The rows of earlier measurements, by benchmark."""
    if not path.exists():
        return {}
    return {
        name: [Row(**row) for row in rows] for name, rows in json.loads(path.read_text()).items()
    }


def save(path: Path, rows: Rows) -> None:
    """Writes rows so that `load` reads them."""
    content = {name: [vars(row) for row in found] for name, found in rows.items()}
    path.write_text(json.dumps(content, indent=1) + "\n")


def page(rows: Rows) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by `make bench` from docs/benchmarks.json. -->",
        "",
        "Every row is measured by a command of this repository, in its folder `benchmarks/`; "
        "`make bench` runs them all. Other libraries run in environments of their own, with the "
        "same settings, in turn with Starling on the same machine. Figures are medians; compare "
        "ratios, not figures from different machines.",
    ]
    places: list[dict[str, Any]] = []
    for name, title in SECTIONS.items():
        if not rows.get(name):
            continue
        lines += ["", f"## {title}", ""]
        lines += ["| what | Starling | beside it | ratio | floor | met | measured |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in rows[name]:
            if row.measured not in places:
                places.append(row.measured)
            lines.append(_table_line(row, places.index(row.measured) + 1))
        notes = [f"- {row.what}: {row.note}." for row in rows[name] if row.note]
        commands = sorted({row.command for row in rows[name]})
        lines += ["", *notes, "", "Measured by:", "", "```text", *commands, "```"]
    if not places:
        return "\n".join([*lines, "", "Nothing has been measured yet."]) + "\n"
    lines += ["", "## Where and when", ""]
    lines += [f"{i}. {_place(place)}" for i, place in enumerate(places, 1)]
    return "\n".join(lines) + "\n"


def _table_line(row: Row, place: int) -> str:
    beside = f"{shown(row.peer_value, row.unit)} ({row.peer})" if row.peer_value is not None else ""
    cells = [
        row.what,
        shown(row.value, row.unit),
        beside,
        f"{row.ratio:.1f}x" if row.ratio is not None else "",
        row.floor,
        "" if row.met is None else "yes" if row.met else "no",
        f"({place})",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _place(place: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    return f"{place['date']}, {place['cores']} cores, {place['machine']}: {versions}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, *PAGES], help="measure these anew")
    parser.add_argument(
        "--quick", action="store_true", help="briefly, to see that it works; writes to build/"
    )
    options = parser.parse_args(argv)
    out = ROOT / ("build" if options.quick else "docs")
    out.mkdir(exist_ok=True)
    stored, table = out / "benchmarks.json", out / "benchmarks.md"
    rows = load(stored)
    for name in options.only or [*SECTIONS, *PAGES]:
        if name in PAGES:
            words = [sys.executable, BENCHMARKS / f"{name}.py", *["--quick"] * options.quick]
            subprocess.run(words, check=True)
            continue
        rows[name] = measure(name, options.quick)
        save(stored, rows)  # what was measured is kept if the next one fails
        table.write_text(page(rows))
    print(table)


if __name__ == "__main__":
    main()
