"""The learner's view of workers on a cluster: what they were asked, what they have given."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from starling.errors import UserError, WorkerError
from starling.training.ray_worker import Failure


class Request(NamedTuple):
    """What a worker was asked for: to start, where `sequence` is -1, or for a rollout."""

    worker: int
    begun: int
    sequence: int


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
    """

    def __init__(self, index: int):
        self.index = index
        self.begun = self.sequence = self.expected = self.pending = self.losses = 0
        self.handle: Any = None
        self.ready = False
        self.where = "not started"
        self.retry_at = 0.0
        self.faults: Counter[str] = Counter()
        self.early: dict[int, tuple[Request, Any]] = {}


def error_of(worker: Worker, failure: Failure) -> Exception:
    """What ends the run where a worker cannot go on."""
    message = f"worker {worker.index} ({failure.where}) failed: {failure.error}"
    if failure.wrong_input:
        return UserError(message)
    return WorkerError(message, original_traceback=failure.traceback)
