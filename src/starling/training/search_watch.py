"""Stopping a search, and telling how it goes, while Ray Tune has the main thread."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from starling.reporting.writers import METRICS_FILE
from starling.training.trials import reports

_TELL_EVERY = 10.0  # seconds

_log = logging.getLogger(__name__)


class Watch:
    """Stops a search when asked to, as Ray Tune lets nobody do but by signal, and tells of it.

    Attributes:
        stopped: Whether the search was stopped.
        interrupted: Whether that was by a Ctrl-C that nobody else answers.
    """

    def __init__(
        self,
        folder: Path,
        trials: int,
        stop: Callable[[], bool],
        lost: Callable[[], bool],
        quiet: bool,
    ):
        self.stopped = self.interrupted = False
        self._folder, self._trials, self._quiet = folder, trials, quiet
        self._stop, self._lost = stop, lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="starling-tune", daemon=True)

    def __enter__(self) -> Watch:
        self._handlers = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, signal.SIG_IGN)}
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _interrupt(self, signum: int, frame: object) -> None:
        self.interrupted = True

    def _watch(self) -> None:
        told, line = time.monotonic(), ""
        while not self._over.wait(0.1):
            # Ray Tune listens once the handler is its own.
            listens = signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN
            if listens and (self.interrupted or self._stop()):
                self.stopped = True
                os.kill(os.getpid(), signal.SIGUSR1)
                return
            if self._lost():
                # Ray Tune waits inside Ray, and so does whoever would end the search.
                _log.error(
                    "the Ray cluster does not answer any more, and Ray ends this process within "
                    "minutes: go on with starling tune --resume %s, with the --address of another "
                    "cluster",
                    self._folder,
                )
                return
            if not self._quiet and time.monotonic() - told >= _TELL_EVERY:
                before, line, told = line, _progress(self._folder, self._trials), time.monotonic()
                if line != before:
                    print(line, file=sys.stderr)


def _progress(folder: Path, trials: int) -> str:
    last = {
        file.parent.name: made[-1]
        for file in folder.glob(f"trial_*/{METRICS_FILE}")
        if (made := reports(file))
    }
    line = f"{len(last)} of {trials} trials begun"
    if scores := {name: score for name, (_, score) in last.items() if math.isfinite(score)}:
        best = max(scores, key=lambda name: scores[name])
        line += f", best mean return {scores[best]:.1f} ({best})"
    return line
