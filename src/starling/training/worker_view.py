"""The learner's view of workers on a cluster: what they were asked, what they have given."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from starling.errors import UserError, WorkerError
from starling.training.ray_worker import Failure, Warned

_TELL_AFTER = 30.0  # seconds of a worker's rollout, or ten times as long as it ever took

_log = logging.getLogger(__name__)


class Request(NamedTuple):
    """What a worker was asked for: to start, where `sequence` is -1, or for a rollout."""

    worker: int
    begun: int
    sequence: int


class Asked(NamedTuple):
    """What comes of a request.

    Attributes:
        answers: Ray's promises, of which the first is the answer itself.
        first: The first of them, as a future.
        at: When it was asked.
    """

    answers: list[Any]
    first: Any
    at: float


class Worker:
    """The learner's view of a worker.

    Attributes:
        begun: How often its episodes were begun anew.
        sequence: Number of the next rollout that it is asked for.
        expected: Number of the next one that it gives.
        pending: Rollouts that it has been asked for.
        early: Answers that came before the one that is expected, by their number.
        ready: Whether it has started.
        losses: In a row, since it last gave anything.
        retry_at: When it is replaced, if it was lost.
        heard: When it last gave anything.
        longest: Seconds that a rollout took, at most.
        silent: Whether its silence was told of.
    """

    def __init__(self, index: int):
        self.index = index
        self.begun = self.sequence = self.expected = self.pending = self.losses = 0
        self.handle: Any = None
        self.ready = False
        self.where = "not started"
        self.retry_at = self.heard = self.longest = 0.0
        self.silent = False
        self.faults: Counter[str] = Counter()
        self.early: dict[int, tuple[Request, Any]] = {}


def error_of(worker: Worker, failure: Failure) -> Exception:
    """What ends the run where a worker cannot go on."""
    message = f"worker {worker.index} ({failure.where}) failed: {failure.error}"
    if failure.wrong_input:
        return UserError(message)
    return WorkerError(message, original_traceback=failure.traceback)


def tell_of_silence(workers: list[Worker], requests: Mapping[Request, Asked]) -> None:
    """Warns, once, of a worker that is at one rollout for much longer than any took."""
    now = time.monotonic()
    under_way: dict[int, float] = {}
    for request, asked in requests.items():
        if request.sequence >= 0 and not asked.first.done():
            under_way.setdefault(request.worker, asked.at)  # the oldest comes first
    for index, asked_at in under_way.items():
        worker = workers[index]
        seconds = now - max(asked_at, worker.heard)
        if seconds > max(_TELL_AFTER, 10 * worker.longest) and not worker.silent:
            worker.silent = True
            _log.warning(
                "worker %d (%s) has been at one rollout for %.0f s: if an environment hangs, "
                "step_timeout ends it in worker processes only (backend process)",
                *(index, worker.where, seconds),
            )


def tell_warnings(worker: Worker, warnings: Iterable[Warned]) -> None:
    """Logs here what was warned of in a worker."""
    for level, name, message in warnings:
        where = (worker.index, worker.where)
        logging.getLogger(name).log(level, "in worker %d (%s): %s", *where, message)
