"""The learner's view of workers on a cluster: what they were asked and gave, who was lost."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from starling.errors import UserError, WorkerDiedError, WorkerError
from starling.training.ray_cluster import ActorLostError
from starling.training.ray_worker import Failure, Warned

_TELL_AFTER = 30.0  # seconds of a worker's rollout, or ten times as long as it ever took

_MOST_IN_VAIN = 6  # beginnings of a worker in a row, of which none came to a rollout
_TOGETHER = 10.0  # seconds within which workers of a node are lost with it

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
        gave: Whether it has given a rollout, since it was made.
        losses: In a row, since it last gave anything.
        node: Ray's name of its node.
        retry_at: When it is replaced, if it was lost.
        heard: When it last gave anything.
        longest: Seconds that a rollout took, at most.
        silent: Whether its silence was told of.
    """

    def __init__(self, index: int):
        self.index = index
        self.begun = self.sequence = self.expected = self.pending = self.losses = 0
        self.handle: Any = None
        self.ready = self.gave = False
        self.where, self.node = "not started", ""
        self.retry_at = self.heard = self.longest = 0.0
        self.silent = False
        self.faults: Counter[str] = Counter()
        self.early: dict[int, tuple[Request, Any]] = {}


class Losses:
    """Workers that were lost so far, and whether the run bears it.

    Args:
        restarts: How many may be lost that had given something.

    Attributes:
        counts: Workers that were lost, where those of a node that is lost count as one, and
            apart from them those that had given nothing yet, by the names that they are logged by.
    """

    def __init__(self, restarts: int):
        self._restarts = restarts
        self.counts = Counter[str]()
        self._nodes: dict[str, float] = {}  # when each was lost

    def take(self, worker: Worker, workers: Iterable[Worker], error: WorkerError) -> None:
        """Takes note of one.

        Args:
            worker: That was lost.
            workers: All that there are.
            error: What says so.

        Raises:
            WorkerDiedError: The run cannot go on.
        """
        worker.losses += 1
        _log.warning("worker %d (%s) was lost: %s", worker.index, worker.where, error)
        if not worker.gave:
            self.counts["worker_starts_failed"] += 1
            in_vain = worker.losses >= min(_MOST_IN_VAIN, self._restarts + 1)
            if in_vain and not any(other.gave for other in workers):
                raise WorkerDiedError(
                    f"worker {worker.index} was lost {worker.losses} times in a row before it gave "
                    f"a rollout, and no other worker gives any; the last time: {error}; what it "
                    "printed is on its node, in /tmp/ray/session_latest/logs"
                )
        elif not self._went_with_its_node(worker, error):
            self.counts["workers_lost"] += 1
            if (lost := self.counts["workers_lost"]) > self._restarts:
                raise WorkerDiedError(
                    f"{lost} workers were lost, and worker_restarts is {self._restarts}; the last "
                    f"was worker {worker.index} ({worker.where}): {error}"
                )

    def _went_with_its_node(self, worker: Worker, error: WorkerError) -> bool:
        """Whether the worker's node has been counted."""
        if not (isinstance(error, ActorLostError) and error.of_node):
            return False
        now = time.monotonic()
        if now - self._nodes.get(worker.node, -math.inf) < _TOGETHER:
            return True
        self._nodes[worker.node] = now
        return False


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
