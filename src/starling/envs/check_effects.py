"""What an environment does to the process that it runs in, besides being stepped."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from starling.envs.findings import Finding, Findings

_LEAST_GROWTH = 4.0  # MB, below which growth is what allocators do
_PARTS = 3  # of a run, each of which a leak makes larger
_LEAST_SAMPLES = 8

# ---- the whole time


@contextlib.contextmanager
def watched(findings: Findings) -> Iterator[None]:
    """Finds out what is printed or set meanwhile, and puts it back as it was."""
    folder, handlers, generators = os.getcwd(), _handlers(), _generators()
    printed: list[str] = []
    try:
        with _captured_output(printed):
            yield
        findings.add(*_changes(folder, handlers, printed))
    finally:
        os.chdir(folder)
        _restore(handlers)
        np.random.set_state(generators["np.random"])  # noqa: NPY002
        random.setstate(generators["random"])


def _changes(
    folder: str, handlers: dict[signal.Signals, Any], printed: list[str]
) -> Iterator[Finding]:
    if printed:
        message = (
            f"it prints to standard output: {printed[0]!r}; a command's results go there: use "
            "logging, or sys.stderr"
        )
        yield Finding("warning", "prints", message)
    if (now := _current_folder()) != folder:
        message = (
            f"it changes the working directory to {now}, so relative paths, such as log_dir, "
            "lead elsewhere; use absolute paths instead"
        )
        yield Finding("warning", "changes-directory", message)
    changed = [number for number, handler in _handlers().items() if handler != handlers[number]]
    if changed:
        names = ", ".join(number.name for number in changed)
        message = (
            f"it sets a handler for {names}; leave signals to the program, or Ctrl-C will not "
            "save and stop a run"
        )
        yield Finding("warning", "signal-handler", message)


@contextlib.contextmanager
def _captured_output(lines: list[str]) -> Iterator[None]:
    """Collects the lines that are printed meanwhile, by Python or by anything else."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        sys.stdout.flush()
        descriptor = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            with contextlib.redirect_stdout(file):
                yield
        finally:
            os.dup2(descriptor, 1)
            os.close(descriptor)
            file.flush()
            file.seek(0)
            lines += [line.rstrip("\n") for line in file if line.strip()]


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "one that is gone"


def _handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in signal.Signals}


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # another thread than the main one cannot set any, so nothing has changed there
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


# ---- global random generators


def seed_generators(seed: int) -> None:
    """Seeds the random generators that belong to the whole process."""
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def generator_states() -> dict[str, Any]:
    """The states of these generators by name, comparable with `==`."""
    kind, keys, *rest = _generators()["np.random"]
    return {"np.random": (kind, keys.tobytes(), *rest), "random": random.getstate()}


def _generators() -> dict[str, Any]:
    return {"np.random": np.random.get_state(), "random": random.getstate()}  # noqa: NPY002


# ---- what stays behind


def holdings() -> dict[str, int]:
    """How many threads, child processes and open files there are, as far as can be told."""
    counts = {"threads": threading.active_count()}
    if sys.platform == "linux":
        counts["child processes"] = _children()
        counts["open files"] = len(os.listdir("/proc/self/fd"))
    return counts


def _children() -> int:
    parents = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                fields = (entry / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()
                parents.append(int(fields[1]))
    return parents.count(os.getpid())


def check_holdings(before: dict[str, int], after: dict[str, int], times: int) -> Iterator[Finding]:
    """Looks at what is held after an environment was made and closed some times."""
    for what, count in after.items():
        grown = count - before[what]
        if grown >= times:
            message = (
                f"{grown / times:g} {what} stay behind each time that an environment is made and "
                "closed; end them in close()"
            )
            yield Finding("warning", "leftovers", message, what)


def check_memory(samples: Sequence[tuple[int, float]]) -> Iterator[Finding]:
    """Looks whether memory grows all the time, from (step, megabytes) at regular steps."""
    samples = samples[len(samples) // 4 :]  # what is needed once has been taken by then
    if len(samples) < _LEAST_SAMPLES:
        return
    marks = [samples[(len(samples) - 1) * part // _PARTS] for part in range(_PARTS + 1)]
    growth = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(marks)]
    steps = marks[-1][0] - marks[0][0]
    if sum(growth) >= _LEAST_GROWTH and min(growth) >= _LEAST_GROWTH / _PARTS / 2:
        message = (
            f"memory grows by {sum(growth) * 1000 / steps:,.0f} MB in 1,000 steps; let go of what "
            "is kept from step to step"
        )
        yield Finding("warning", "memory-grows", message)
