"""What every benchmark needs: processes with few threads, repetitions side by side, rows."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from starling.envs.worker_count import usable_cores
from starling.training.run_folder import versions

BENCHMARKS = Path(__file__).resolve().parent
STARLING = Path(sys.executable).with_name("starling")
# Libraries of linear algebra start a thread for each core, which small networks only suffer from.
ONE_THREAD = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB")
}
QUIET_LOAD = 0.5  # that a machine may have, of processes that run

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    """What was measured; rows of the same name replace each other."""
    value: float | bool
    """Starling's figure: the median where there are several. True or False for a check."""
    unit: str = ""
    peer: str = ""
    """What it is compared with, measured in the same run."""
    peer_value: float | None = None
    ratio: float | None = None
    """How many times better than the peer."""
    floor: str = ""
    """What was asked for."""
    met: bool | None = None
    """Whether the floor is met; None where there is none."""
    note: str = ""
    """Spread, and whatever else is needed to judge the figure."""
    command: str = ""
    """What measured it; run.py fills it in, where the row does not know better."""
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    """When and where, as `here` says; run.py fills it in, too."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side")
    parser.add_argument("--quick", action="store_true", help="once and briefly: does it work?")
    return parser


def report(rows: Sequence[Row]) -> None:
    """Prints rows for people, and as JSON in the last line."""
    for row in rows:
        print(f"{row.what}: {shown(row.value, row.unit)}", end="")
        if row.peer_value is not None:
            print(f"; {row.peer}: {shown(row.peer_value, row.unit)}", end="")
        print(f"; {row.ratio:.1f}x" if row.ratio else "", end="")
        print(f"; floor {row.floor}" if row.floor else "", end="")
        print(f" ({row.note})" if row.note else "")
    print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))


def write_page(
    name: str, stored: dict[str, Any], page: Callable[[dict[str, Any]], str], quick: bool
) -> None:
    """Writes a page of its own into docs/, or build/, with what it is made from beside it."""
    out = BENCHMARKS.parent / ("build" if quick else "docs")
    out.mkdir(exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")
    (out / f"{name}.md").write_text(page(stored))
    print(out / f"{name}.md")


def recorded(*tests: str, which: str, **variables: str) -> list[dict[str, Any]]:
    """Runs tests, all of which must pass; what they record (`tests/measured.py`).

    Args:
        tests: As pytest takes them.
        which: Of these, by their marks: "slow", or "slow or not slow".
        variables: Of the environment that they are run in.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "measured")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-m", which, *tests],
            cwd=BENCHMARKS.parent,
            env={**os.environ, **variables, "STARLING_MEASURED": str(file)},
            check=True,
            stdout=sys.stderr,
        )
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def here() -> dict[str, Any]:
    """The day, the machine and the versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _processor(),
        "cores": usable_cores(),
        "versions": {name: version for name, version in versions().items() if version},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {platform.system()}"
    except (OSError, IndexError):
        return f"{platform.machine()}, {platform.system()}"


def shown(value: float | bool, unit: str = "") -> str:
    """A figure with as many digits as it deserves."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    digits = 0 if isinstance(value, int) or abs(value) >= 1000 else 1
    return f"{value:,.{digits}f} {unit}".rstrip()


def spread(values: Sequence[float], unit: str = "") -> str:
    """Lowest and highest of some measurements."""
    if len(values) == 1:
        return "1 run"
    low, high = shown(min(values)), shown(max(values), unit)
    return f"{low} to {high} in {len(values)} runs"


def other_work(load: float) -> str:
    """What a note says of the load that the machine had before measuring; "" if it was quiet."""
    return "; other work ran on the machine meanwhile" if load > QUIET_LOAD else ""


def in_turn(repeats: int, sides: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Measures A B B A A B ..., so that a machine that slows down slows both alike."""
    measured: dict[str, list[T]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            measured[name].append(sides[name]())
            print(f"{repeat + 1}/{repeats} {name}: {measured[name][-1]}", file=sys.stderr)
    return measured


def median(values: Sequence[float]) -> float:
    """The median."""
    return float(statistics.median(values))


def train(*options: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Result of `starling train` in a process of its own, which leaves nothing behind."""
    with tempfile.TemporaryDirectory() as logs:
        command = [STARLING, "train", *options, "--log_dir", logs, "--quiet", "--json"]
        return run_json(command, environment)


def run_json(
    command: Sequence[object], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs a command whose last line of output is a JSON object, and returns that."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **ONE_THREAD, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds(
    command: Sequence[object], until: str, environment: Mapping[str, str] | None = None
) -> tuple[float, dict[str, Any]]:
    """Seconds from the start of a process to a line of output, and the JSON of its last line.

    Args:
        command: What to run.
        until: The line at which the clock stops; "" for the end of the process.
        environment: Variables to set besides.
    """
    start, stopped, last = time.perf_counter(), 0.0, ""
    with subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **ONE_THREAD, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if until and line.strip() == until:
                stopped = time.perf_counter()
            last = line
    stopped = stopped or time.perf_counter()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with exit code {process.returncode}")
    return stopped - start, json.loads(last)
