"""How often what has failed is tried again, and after which pauses."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from starling.envs.requests import Workers
from starling.errors import StoppedError, WorkerError

RESTART_WINDOW = 100_000  # environment steps in which max_restarts failures are borne
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before trying again what has just failed
_MOST_DOUBLINGS = 10

_log = logging.getLogger(__name__)


class Restarts:
    """Counts failures, and lets each be followed by another attempt or by the end.

    Args:
        workers: Given up once there were too many.
        limit: Failures that are borne within `RESTART_WINDOW` steps.

    Attributes:
        steps: Environment steps so far.
        stop: Asked in the pauses.
    """

    def __init__(self, workers: Workers, limit: int):
        self.steps = 0
        self.stop: Callable[[], bool] = lambda: False
        self._workers, self._limit = workers, limit
        self._failures: deque[int] = deque()  # the steps at which they were

    def admit(self, errors: Sequence[WorkerError], attempt: int) -> None:
        """Lets an attempt be made, after a pause if it is not the first (0).

        Raises:
            WorkerError: One of `errors`, after too many others.
            StoppedError: `stop` said so in the pause.
        """
        while self._failures and self._failures[0] <= self.steps - RESTART_WINDOW:
            self._failures.popleft()
        for error in errors:
            if len(self._failures) >= self._limit:
                raise self._workers.give_up(
                    error,
                    f"after {self._limit} restarts within {RESTART_WINDOW:,} steps "
                    "(max_restarts), mend the environment or allow more",
                )
            self._failures.append(self.steps)
            _log.warning("%s", first_line(error))
        if attempt:
            pause = _FIRST_PAUSE * 2 ** min(attempt - 1, _MOST_DOUBLINGS)
            self._wait(min(pause, _LONGEST_PAUSE), errors[0])

    def _wait(self, seconds: float, error: WorkerError) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.stop():
                self._workers.trouble = "the last call was given up; call reset()"
                raise StoppedError(f"asked to stop after this: {first_line(error)}")
            time.sleep(min(left, _FIRST_PAUSE))


def first_line(error: BaseException) -> str:
    """An error's message without the traceback that may follow."""
    return str(error).partition("\n")[0]
