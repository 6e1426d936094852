"""Checkpoints on a full disk, made to do harm, and half way through a run: rows of faults.py."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import peers
from measuring import BENCHMARKS, run_json

LIBRARIES = {"starling": "Starling", "sb3": "Stable-Baselines3's PPO"}
TITLES = {
    "full disk, training": "the disk is full in the second and third of four saves of a run",
    "full disk, same place": "the disk is full; `save` to the same place as before",
    "crafted": "a file with a pickle that makes a file; `load`",
    "halves": "512 steps against 256, `save`, `load` and 256 more",
}

INTRODUCTION = """\
## Checkpoints

PPO on CartPole-v1, four environments, as it is by default but for the size of rollouts. A limit on
the size of files (16 KB) stands for a disk that is full. Gymnasium has no checkpoints.

- **good**: the run goes on, and what was saved before can be loaded; nothing in a file is run;
  both halves of a run make the weights of a whole one, bit for bit.
- **poor**: the run ends, or the newest file cannot be loaded, but the one before it can; the
  weights differ.
- **bad**: what was saved before is lost; code in a file is run.
"""

Outcome = dict[str, Any]


def run_case(library: str, name: str) -> Outcome:
    """Tries one case in a process of its own, and returns what came of it."""
    python = peers.python(library) if library == "sb3" else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        return run_json([python, BENCHMARKS / "checkpoint_case.py", library, name, folder])


def measure(quick: bool) -> dict[str, dict[str, Outcome]]:
    """Tries every case under each library, or Starling alone."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    for library in ["starling"] if quick else LIBRARIES:
        outcomes[library] = {}
        for name in TITLES:
            outcome = outcomes[library][name] = run_case(library, name)
            print(f"{library}, {name}: {': '.join(judge(name, outcome))}", file=sys.stderr)
    return outcomes


def judge(name: str, outcome: Outcome) -> tuple[str, str]:
    """A verdict (good, poor or bad) and the reasons for it."""
    if name == "crafted":
        if outcome["ran"]:
            return "bad", "the code in it is run"
        tried = f"in each of {outcome['files']} files in turn, every checksum right"
        if not outcome["error"]:
            return "poor", f"loaded, and nothing in it is run ({tried})"
        return "good", f"refused, and nothing in it is run ({tried})"
    if name == "halves":
        return _halves(outcome["difference"], outcome.get("by_default"))
    if outcome["first"]:
        return "bad", f"{_kind(outcome['error'])}; the first one is lost: {outcome['first']}"
    if name == "full disk, same place":
        return "good", f"{_kind(outcome['error'])}; the first one can be loaded"
    if outcome["error"]:
        newest = "; the newest file cannot" if outcome["newest"] else ""
        told = f"{_kind(outcome['error'])} ends training at step {outcome['steps']}"
        return "poor", f"{told}; the first one can be loaded{newest}"
    if outcome["newest"]:
        return "poor", f"training goes on; the newest cannot be loaded: {outcome['newest']}"
    return (
        "good",
        "training goes on; the first one can be loaded meanwhile, and the last in the end",
    )


def _halves(difference: float, by_default: float | None) -> tuple[str, str]:
    told = f"weights differ by up to {difference:.1g}"
    if difference == 0:
        told = "weights are equal bit for bit"
    if by_default is not None:
        told += " with `exact_resume`; by default, where other episodes begin, they "
        told += f"differ by up to {by_default:.1g}" if by_default else "are equal, too"
    return "poor" if difference else "good", told


def _kind(error: str) -> str:
    return error.partition(":")[0] or "no error"


def section(measured: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """Lines of the page: the outcomes of each library, by case."""
    lines = [INTRODUCTION, f"| case | {' | '.join(LIBRARIES[key] for key in measured)} |"]
    lines.append("| --- " * (len(measured) + 1) + "|")
    for name, title in TITLES.items():
        cells = ["**{}**: {}".format(*judge(name, measured[key][name])) for key in measured]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines
