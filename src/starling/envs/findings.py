"""What checks of an environment find: one sentence for each kind of fault, and a count."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np

from starling.errors import said

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Attributes:
        level: `error` (training would fail or learn from wrong data), `warning` (something that
            was hardly meant so, or cannot be done with it), or `note`.
        name: A short name that stays the same, such as `observation-shape`.
        message: One sentence: where it was met first, what is wrong, how to fix it.
        about: The key of the observation that it concerns, where there is one.
        count: How many times it was met.
    """

    level: str
    name: str
    message: str
    about: str = ""
    count: int = 1

    def __str__(self) -> str:
        times = f" ({self.count:,} times)" if self.count > 1 else ""
        return f"{self.level:<8} {self.name:<22} {self.message}{times}"


class Findings:
    """Collects findings; those of one kind become one, with a count."""

    def __init__(self, tell: Callable[[Finding], None] = lambda finding: None):
        """`tell` is called with every new one at once, for when the process does not survive."""
        self._found: dict[tuple[str, str, str], Finding] = {}
        self._tell = tell

    def add(self, *findings: Finding) -> None:
        """Adds what was found."""
        for finding in findings:
            key = (finding.level, finding.name, finding.about)
            known = self._found.get(key)
            if known is None:
                self._tell(finding)
                self._found[key] = finding
            else:
                self._found[key] = replace(known, count=known.count + 1)

    def sorted(self) -> list[Finding]:
        """All of them, the gravest first."""
        return sorted(self._found.values(), key=lambda finding: LEVELS.index(finding.level))


@dataclass(frozen=True)
class Report:
    """What a check found, and how far it went.

    Attributes:
        findings: The gravest first.
        steps: Steps that were looked at one by one.
        episodes: Episodes that ended in them.
        seconds: How long all of it took.
        steps_per_second: Of one environment on one core, resets included; 0.0 if none was made.
    """

    findings: list[Finding]
    steps: int = 0
    episodes: int = 0
    seconds: float = 0.0
    steps_per_second: float = 0.0

    def count(self, level: str) -> int:
        """How many findings of a level there are."""
        return sum(finding.level == level for finding in self.findings)


def cause(error: BaseException) -> str:
    """An exception in one line: its type, what it says, and where the user's code raised it."""
    message = " ".join(said(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    place = users_place(reversed(frames))
    return f"{text} (at {place})" if place else text


def users_place(frames: Iterable[tuple[str, int | None]]) -> str:
    """`file:line` of the innermost frame that the user can change, or "".

    Args:
        frames: Files and lines, the innermost first.
    """
    for file, line in frames:
        path = Path(file)
        if path.is_absolute() and not _is_library(path):
            shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path
            return f"{shown}:{line}"
    return ""


_LIBRARIES = [Path(__file__).parents[1], Path(gym.__file__).parent, Path(np.__file__).parent]
_STANDARD_LIBRARY = Path(os.__file__).parent


def _is_library(path: Path) -> bool:
    if any(path.is_relative_to(library) for library in _LIBRARIES):
        return True
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return path.is_relative_to(_STANDARD_LIBRARY) and not installed
