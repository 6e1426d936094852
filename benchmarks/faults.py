"""Environments and checkpoints that fail, and what comes of it: Starling beside two others.

Each fault happens in a process of its own, to environment 1 of 3, in its third step unless it says
otherwise. Checkpoints come after those; see checkpoint_faults.py. Writes docs/faults_compared.md,
with docs/faults_compared.json beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint_faults
import leftovers
import peers
from fault_case import TIMEOUTS
from fault_envs import LATE, MESSAGE
from leftovers import LEFT_AFTER
from measuring import BENCHMARKS, ONE_THREAD, here, write_page

# Seconds that each part of a case may take before it counts as hanging. Starting is not what is
# measured here: Stable-Baselines3's workers import PyTorch while they are first reset.
LIMITS = {"": 60, "make": 60, "reset": 60, "step": 10, "later step": 10, "close": 5, "end": 5}
NOTICED_WITHIN = 1.0  # seconds from a fault, or from the end of a step's time limit, to the error

Outcome = dict[str, Any]


class Column(NamedTuple):
    """A library, and how it is set."""

    title: str
    library: str
    options: Mapping[str, Any] = {}
    timeouts: bool = True
    """Whether a step can be given a limit."""


class Fault(NamedTuple):
    """What goes wrong."""

    title: str
    cause: str = ""
    """Regular expression of what a message has that names the cause."""
    harmless: bool = False
    """There is nothing to report: right data is all that is asked."""
    restarts: bool = False
    """Concerns environments that are restarted, if asked for."""
    signal: int = 0
    """What the parent is sent while healthy environments are stepped."""


COLUMNS = {
    "starling": Column("Starling", "starling"),
    "restart": Column(
        'Starling, `on_env_error="restart"`', "starling", {"on_env_error": "restart"}
    ),
    "sb3": Column("Stable-Baselines3's SubprocVecEnv", "sb3", timeouts=False),
    "gymnasium": Column("Gymnasium's AsyncVectorEnv", "gymnasium"),
}
FAULTS = {
    "raise in step": Fault("`step` raises", MESSAGE, restarts=True),
    "raise in reset": Fault("the first `reset` raises", MESSAGE, restarts=True),
    "raise in constructor": Fault("the constructor raises", MESSAGE),
    "exit": Fault("`os._exit(7)` in the worker", r"exit code 7", restarts=True),
    "kill": Fault("`kill -9` of the worker", r"SIGKILL|signal 9", restarts=True),
    "hang": Fault(
        f"`step` hangs; limit {TIMEOUTS['hang']:g} s", r"within|timed out", restarts=True
    ),
    "late": Fault(
        f"`step` takes {LATE:g} s, limit {TIMEOUTS['late']:g} s; the step after that",
        r"within|timed out",
        restarts=True,
    ),
    "NaN observation": Fault("observes NaN", r"(?i)\bnan\b|finite"),
    "infinite reward": Fault("is paid infinity", r"(?i)\binf|finite"),
    "too large": Fault(
        "observes 1e300, float32 declared", r"1e\+?300|float32|overflow", restarts=True
    ),
    "wrong shape": Fault("observes 3 numbers, 2 declared", r"shape", restarts=True),
    "float64": Fault("observes float64, float32 declared", r"float64", harmless=True),
    "reused array": Fault("one array for all observations; the episode ends", harmless=True),
    "killed parent": Fault("`kill -9` of the parent", signal=signal.SIGKILL),
    "Ctrl-C": Fault("Ctrl-C, for the whole group", "KeyboardInterrupt", signal=signal.SIGINT),
}


# ---- running


def run_case(column: Column, name: str) -> Outcome:
    """Has a fault happen in a process of its own, and returns what came of it."""
    fault = FAULTS[name]
    python = peers.python(column.library) if column.library == "sb3" else Path(sys.executable)
    shared = leftovers.shared()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        command = [python, BENCHMARKS / "fault_case.py", column.library]
        command += ["slow" if fault.signal else name, folder]
        command += ["--options", json.dumps(dict(column.options))]
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                env={**os.environ, **ONE_THREAD, "STARLING_FAULT": made},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            hung = _watch(process, folder, fault.signal)
            process.kill()
            process.wait()
            left = leftovers.left(made)
        finally:
            process.kill()
            for pid in leftovers.processes(made):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        told = _told(folder)
        log = (folder / "log").read_text(errors="replace")
    if not hung and told.get("seconds", 0.0) is None:
        raise RuntimeError(f"{column.title}, {name}, failed before the fault: {told}\n{log}")
    told |= {"hung": hung, "left": left, "shared": leftovers.forgotten(shared)}
    told |= _named(fault, told.get("message", ""), log)
    told["tracebacks"] = log.count("Traceback (most recent call last)")
    told["message"] = told.get("message", "").split("\n")[0][:200]
    return told


def _watch(process: subprocess.Popen, folder: Path, number: int) -> str:
    """Waits for a process to end; returns the stage in which it took too long, or ""."""
    stage, since = "", time.monotonic()
    while process.poll() is None:
        now, reached = time.monotonic(), _told(folder).get("stage", "")
        if reached != stage:
            stage, since = reached, now
        elif now - since > LIMITS[stage]:
            return stage
        elif number and stage == "step" and now - since > 0.5:
            (folder / "happened").write_text(str(now))
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            number, since = 0, now
        time.sleep(0.02)
    return ""


def _told(folder: Path) -> Outcome:
    told: Outcome = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "told").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # not written to the end yet
                told |= json.loads(line)
    return told


def _named(fault: Fault, message: str, log: str) -> Outcome:
    """Where the environment and the cause are named: in the "message", in the "log", or ""."""
    patterns = {"environment": r"environments? 1\b|Worker-1\b", "cause": fault.cause or "(?!)"}
    return {
        what: "message" if re.search(pattern, message) else "log" * bool(re.search(pattern, log))
        for what, pattern in patterns.items()
    }


# ---- judging

Reason = tuple[str, str]  # a verdict, and what it rests on


def judge(column: Column, name: str, outcome: Outcome) -> Reason:
    """A verdict (good, poor or bad; "-" for what cannot be tried) and the reasons for it."""
    if name == "late" and not column.timeouts:
        return "-", "no limit can be set"
    fault = FAULTS[name]
    due = TIMEOUTS.get(name, 0.0) + NOTICED_WITHIN
    reasons = [*_noticed(fault, outcome, due), *_afterwards(outcome), *_left_over(fault, outcome)]
    verdicts = [verdict for verdict, _ in reasons]
    worst = next((verdict for verdict in ("bad", "poor") if verdict in verdicts), "good")
    return worst, "; ".join(phrase for _, phrase in reasons)


def _noticed(fault: Fault, outcome: Outcome, due: float) -> list[Reason]:
    if outcome["hung"] in ("make", "reset", "step"):
        return [("bad", f"hangs in {outcome['hung']}")]
    if fault.signal == signal.SIGKILL:
        return []
    if outcome.get("flaw"):
        return [("bad", f"unnoticed: {outcome['flaw']}")]
    seen, late = "goes on with right data", False
    if outcome.get("error"):
        late = outcome["seconds"] > due
        seen = f"{outcome['error']} after {outcome['seconds']:.1f} s" + ", late" * late
    elif fault.harmless:
        return [
            ("good", "right data" + ", no warning" * bool(fault.cause and not outcome["cause"]))
        ]
    if fault.signal:
        return [("poor" if late else "good", seen)]
    named = outcome["environment"] and outcome["cause"]
    return [("good" if named and not late else "poor", f"{seen}, {_naming(outcome)}")]


def _naming(outcome: Outcome) -> str:
    """Who says which environment it is, and what the cause."""
    said = []
    for place, speaker in (("message", "message names"), ("log", "log names"), ("", "no word of")):
        whats = [what for what in ("environment", "cause") if outcome[what] == place]
        if whats:
            said.append(f"{speaker} {(' and ' if place else ' or ').join(whats)}")
    return ", ".join(said)


def _afterwards(outcome: Outcome) -> list[Reason]:
    """Whether later steps are right, and `close()` works."""
    reasons = []
    if outcome["hung"] == "later step":
        reasons.append(("bad", "then hangs"))
    elif outcome.get("later"):
        reasons.append(("bad", f"then {outcome['later']}"))
    elif outcome.get("refused"):
        reasons.append(("good", f"then refuses to step ({outcome['refused']})"))
    if outcome["hung"] == "close":
        reasons.append(("bad", "`close()` hangs"))
    elif outcome.get("close_error"):
        reasons.append(("bad", f"`close()` raises {outcome['close_error']}"))
    elif outcome.get("closed"):
        reasons.append(("good", "`close()` works"))
    return reasons


def _left_over(fault: Fault, outcome: Outcome) -> list[Reason]:
    """Whether the parent ends, and ends alone."""
    killed = fault.signal == signal.SIGKILL
    reasons = []
    if outcome["hung"] == "end":
        reasons.append(("bad", "then the parent does not end"))
    elif not outcome["hung"] and outcome.get("stage") != "end" and not killed:
        reasons.append(("bad", "the parent died"))
    if fault.signal == signal.SIGINT and outcome["tracebacks"]:
        reasons.append(("poor", f"tracebacks printed: {outcome['tracebacks']}"))
    for what, count in (("processes", outcome["left"]), ("files in /dev/shm", outcome["shared"])):
        if count:
            reasons.append(("bad", f"{what} left: {count}"))
    return reasons or [("good", "nothing left")] * killed


# ---- the page

INTRODUCTION = f"""\
# Faults compared

<!-- Written by `make bench ARGS="--only faults"` from docs/faults_compared.json. -->

What comes of an environment that fails, under Starling's process backend and two others, each with
a process for each environment and all else as it is by default. Of three environments, number 1 has
the fault, once, in its third step unless another place is named. The parent catches what is raised,
calls `close()` and ends. Steps have no time limit but in the rows that name one. Each case runs in
a process of its own, which is killed where it hangs: when a step takes {LIMITS["step"]} s, or
`close()` {LIMITS["close"]} s.

- **good**: the error's message, or what is printed (the log), names the environment and the cause;
  right data, where stepping goes on. `close()` returns, and no process is left {LEFT_AFTER:g} s
  after the end of the parent.
- **poor**: neither names the environment or the cause; the error is late, more than
  {NOTICED_WITHIN:g} s after the fault or the end of the time limit; or tracebacks are printed at
  Ctrl-C.
- **bad**: something hangs, wrong data goes unnoticed, `close()` raises, or processes are left.
- **-**: cannot be tried.

Seconds are counted from the fault to the error.
"""


def page(stored: dict[str, Any]) -> str:
    """The table as a page of the documentation."""
    columns = [key for key in COLUMNS if key in stored["outcomes"]]
    rows = {
        fault.title: [_cell(stored, key, name) for key in columns] for name, fault in FAULTS.items()
    }
    rows["in all"] = [_total(cells) for cells in zip(*rows.values(), strict=True)]
    lines = [INTRODUCTION, f"| fault | {' | '.join(COLUMNS[key].title for key in columns)} |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()]
    lines += ["", _place(stored["measured"]), ""]
    lines += checkpoint_faults.section(stored["checkpoints"]["outcomes"])
    return "\n".join([*lines, "", _place(stored["checkpoints"]["measured"])]) + "\n"


def _place(measured: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    place = f"{measured['date']}, {measured['cores']} cores, {measured['machine']}"
    return f"Measured on {place}: {versions}."


def _cell(stored: dict[str, Any], key: str, name: str) -> str:
    outcome = stored["outcomes"][key].get(name)
    if outcome is None:
        return "as on the left"
    verdict, reasons = judge(COLUMNS[key], name, outcome)
    return f"**{verdict}**: {reasons}"


def _total(cells: Sequence[str]) -> str:
    counts = {
        word: sum(cell.startswith(f"**{word}**") for cell in cells)
        for word in ("good", "poor", "bad")
    }
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _run_column(key: str) -> dict[str, Outcome]:
    column, outcomes = COLUMNS[key], {}
    for name, fault in FAULTS.items():
        if key != "restart" or fault.restarts:
            outcomes[name] = run_case(column, name)
            verdict = ": ".join(judge(column, name, outcomes[name]))
            print(f"{column.title}, {name}: {verdict}", file=sys.stderr, flush=True)
    return outcomes


def _run_environments(quick: bool) -> dict[str, Any]:
    columns = [key for key, column in COLUMNS.items() if column.library == "starling" or not quick]
    return {key: _run_column(key) for key in columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Starling alone, to see that it works; writes to build/",
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="these alone, anew; of environments, what was measured stays",
    )
    options = parser.parse_args()
    measured = here()
    measured["versions"]["stable_baselines3"] = peers.SB3
    if options.checkpoints:
        stored = json.loads((BENCHMARKS.parent / "docs" / "faults_compared.json").read_text())
    else:
        stored = {"measured": measured, "outcomes": _run_environments(options.quick)}
    outcomes = checkpoint_faults.measure(options.quick)
    stored["checkpoints"] = {"measured": measured, "outcomes": outcomes}
    write_page("faults_compared", stored, page, options.quick)


if __name__ == "__main__":
    main()
