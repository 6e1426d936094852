"""How far a run has come, on standard error, and where its time goes."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO

PARTS = ("collect", "update", "wait", "report")
# Where one program does both, collecting and updating cannot be told apart.
FUSED_PARTS = ("fused", "report")

_BAR_INTERVAL = 0.2  # seconds between two drawings of the bar
_LINE_INTERVAL = 5.0  # seconds between two plain lines
_SPEED_WINDOW = 30.0  # seconds that steps/s and the time left are judged by


class TimeSplit:
    """Splits the time of a loop into collecting, updating, waiting and reporting."""

    def __init__(self, parts: Sequence[str] = PARTS):
        self._seconds: dict[str, float] = dict.fromkeys(parts, 0.0)
        self._part = "report"
        self._since = time.monotonic()

    def enter(self, part: str) -> None:
        """Book the time from now on to one of the parts, until another is entered."""
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def shares(self) -> dict[str, float]:
        """Return the shares since the last call by metric name, ``perf/collect_share`` and so on.

        They add up to 1.
        """
        self.enter(self._part)
        total = sum(self._seconds.values())
        if total == 0:  # the clock has not ticked yet
            return {f"perf/{part}_share": float(part == self._part) for part in self._seconds}
        shares = {f"perf/{part}_share": spent / total for part, spent in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return shares


class Progress:
    """A progress bar on a terminal, a plain line every few seconds elsewhere.

    It may be told of every iteration: it draws at its own pace. Where it cannot write it falls
    silent; standard output is left alone.
    """

    def __init__(
        self,
        total_steps: int,
        initial_step: int = 0,
        title: str = "",
        quiet: bool = False,
        stream: TextIO | None = None,
    ):
        """Show the beginning.

        Args:
            total_steps: Environment steps at which the run is done.
            initial_step: Environment steps already made, by the run that is resumed.
            title: What is trained, in a few words.
            quiet: Show nothing at all.
            stream: Where to write, standard error if None.
        """
        self._total = total_steps
        self._title = title
        self._stream = stream or sys.stderr
        self._step = initial_step
        self._shown_step = initial_step
        self._return_mean: float | None = None
        self._shares: Mapping[str, float] = {}
        # (time, step) as shown, for the speed; at the bar's pace 150 of them fill the window
        self._samples = deque([(time.monotonic(), initial_step)], maxlen=150)
        self._live: Any = None
        if not quiet and self._stream.isatty():
            self._live = _start_bar(self._stream)
        self._interval = _BAR_INTERVAL if self._live else _LINE_INTERVAL
        self._next = math.inf if quiet else time.monotonic() + self._interval
        if self._live:
            self._show()

    def update(
        self,
        step: int,
        return_mean: float | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Take note of where the run is; cheap enough for every iteration.

        Args:
            step: Environment steps made so far.
            return_mean: Mean return of the last episodes, None if there is none yet.
            shares: What ``TimeSplit.shares`` returned, None if there is nothing new.
        """
        self._step = step
        self._return_mean = return_mean
        if shares is not None:
            self._shares = shares
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._interval
            self._sample(now)
            self._show()

    def message(self, text: str) -> None:
        """Write a line of text, above the bar if there is one; nothing when quiet."""
        if self._next == math.inf:
            return
        with self._silent_on_failure():
            if self._live:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Show the final state and leave the terminal as it was. Idempotent."""
        if self._next == math.inf:
            return
        if self._live or self._step != self._shown_step:
            self._sample(time.monotonic())
            self._show()
        self._next = math.inf
        if self._live:
            with self._silent_on_failure():
                self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sample(self, now: float) -> None:
        self._samples.append((now, self._step))
        while len(self._samples) > 2 and self._samples[0][0] < now - _SPEED_WINDOW:
            self._samples.popleft()

    def _show(self) -> None:
        self._shown_step = self._step
        with self._silent_on_failure():
            if self._live:
                self._live.update(self._bar(), refresh=True)
            else:
                parts = [self._title, self._done(), *self._details(), self._split()]
                print(" | ".join(filter(None, parts)), file=self._stream, flush=True)

    @contextlib.contextmanager
    def _silent_on_failure(self):
        try:
            yield
        except (OSError, ValueError):  # the terminal is gone, the stream is closed
            self._next = math.inf

    def _done(self) -> str:
        share = min(1.0, self._step / self._total) if self._total else 1.0
        # Rounded down, so that 100 % is the end.
        return f"{math.floor(share * 100)} % | {self._step:,} / {self._total:,} steps"

    def _details(self) -> list[str]:
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        details = []
        if end > start and last > first:
            speed = (last - first) / (end - start)
            left = max(0, self._total - self._step) / speed
            details += [f"{speed:,.0f} steps/s", f"{_clock(left)} left"]
        if self._return_mean is not None:
            details.append(f"return {self._return_mean:,.1f}")
        return details

    def _split(self) -> str:
        if not self._shares:
            return ""
        return " ".join(
            f"{name.removeprefix('perf/').removesuffix('_share')} {share:.0%}"
            for name, share in self._shares.items()
        )

    def _bar(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, self._total), completed=self._step, width=20)
        head.add_row(
            Text(self._title, "bold", no_wrap=True),
            bar,
            Text(self._done().replace(" | ", "  "), no_wrap=True),
        )
        lines = (" · ".join(self._details()) or "starting", self._split())
        return Group(
            head, *(Text(line, "dim", no_wrap=True, overflow="ellipsis") for line in lines if line)
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _start_bar(stream: TextIO) -> Any:
    """Return rich's live display, or None for a terminal that cannot move its cursor."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream)
    if console.is_dumb_terminal or not console.is_terminal:
        return None
    live = Live(
        console=console,
        auto_refresh=False,  # no thread of its own: nothing competes with training
        # What others print goes above the bar, unless it is on its way to a file or a pipe.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=stream is sys.stderr,
    )
    live.start()
    console.show_cursor(True)  # a process that is killed leaves no terminal without a cursor
    return live
