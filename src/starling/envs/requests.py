"""Requests to workers and their answers, whatever a worker is: the caller, a thread, a process.

Each request carries a number, each answer the number of its request, and an answer that nobody
waits for any more is dropped: after an error or a time-out no step can be completed by the
answer to an earlier one.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from starling.envs.buffers import ENVIRONMENT, NO_SEED, STEPS, Buffers
from starling.envs.messages import Description, ShardOptions
from starling.envs.shard import Shard
from starling.errors import StarlingError, StepTimeoutError, WorkerError

_START_LIMIT = 60.0  # seconds to make environments in, where step_timeout is shorter


class Answer(NamedTuple):
    """A worker's answer: `result` is what the shard's method returned, or what it raised."""

    worker: int
    request: int
    result: Any
    failed: bool


def perform(shard: Shard, method: str, args: tuple) -> tuple[Any, bool]:
    """Calls a method of a shard; returns its result, or its error and True."""
    try:
        return getattr(shard, method)(*args), False
    except StarlingError as error:
        return error, True


class Workers:
    """W workers with a shard each.

    A backend implements `start`, `bind`, `_post`, `_poll` and `stop`.

    Attributes:
        rows: Rows of the buffers that belong to each worker.
        awaited: Worker -> number of the request that it has not answered yet.
        ready: Answers that nobody has taken yet, first come first.
        trouble: Why steps are refused until the next reset; empty when all is well.
    """

    cannot_be_stopped = ""  # what a time-out's message adds where a worker goes on regardless

    def __init__(self, rows: list[slice], step_timeout: float | None = None):
        """Starts nothing yet.

        Args:
            rows: Rows of the buffers that belong to each worker.
            step_timeout: Seconds that a worker may take to answer; no limit if None.
        """
        self.rows = rows
        self.awaited: dict[int, int] = {}
        self.ready: deque[Answer] = deque()
        self.trouble = "reset() comes before the first step()"
        self._time_limit = step_timeout
        self._deadlines = [0.0] * len(rows)
        self._requests = 0
        self._buffers: Buffers | None = None
        self._fatal: Callable[[], Exception] | None = None

    # ---- what a backend provides

    def start(self, env_fns: list[list], options: ShardOptions) -> list[Description]:
        """Makes one shard per list of factories, all at the same time, and describes them."""
        raise NotImplementedError

    def allocate(self, size: int) -> Any:
        """A zeroed block of memory that every worker can reach."""
        return bytearray(size)

    def bind(self, buffers: Buffers) -> None:
        """Gives every shard its part of the buffers."""
        self._buffers = buffers

    def pid(self, worker: int) -> int:
        """Process that runs a worker."""
        return os.getpid()

    def _post(self, worker: int, request: int, method: str, args: tuple) -> None:
        """Hands a request to a worker and returns at once."""
        raise NotImplementedError

    def _poll(self, timeout: float | None, every: bool) -> Iterable[Answer]:
        """Answers that have come; waits at most `timeout` seconds for the first.

        With `every` the caller cannot go on before all awaited answers are there, so that it
        does not matter which of them comes first.
        """
        raise NotImplementedError

    def stop(self, overdue: Sequence[int] = ()) -> None:
        """Ends every worker, and returns; those `overdue` get no time to finish."""
        raise NotImplementedError

    # ---- requests

    def check_alive(self) -> None:
        """Raises if workers were lost."""
        if self._fatal is not None:
            raise self._fatal()

    def request(self, workers: Sequence[int], method: str, args: Sequence[tuple] = ()) -> None:
        """Hands a request to each of some workers, with one tuple of arguments each."""
        self._requests += 1
        self._set_deadlines(workers)
        trouble, self.trouble = self.trouble, "the last call was interrupted; call reset()"
        try:
            for k, w in enumerate(workers):
                self.awaited[w] = self._requests
                self._post(w, self._requests, method, args[k] if args else ())
        except BaseException:
            self.awaited.clear()
            self.ready.clear()
            raise
        self.trouble = trouble

    def _set_deadlines(self, workers: Iterable[int]) -> None:
        if self._time_limit is not None:
            deadline = time.monotonic() + self._time_limit
            for w in workers:
                self._deadlines[w] = deadline

    def _descriptions(self) -> list[Description]:
        """Waits for all workers to describe their shards, as answers to request 0."""
        limit = self._time_limit
        if limit is not None:  # imports and constructors take longer than steps
            self._time_limit = max(limit, _START_LIMIT)
        everyone = range(len(self.rows))
        self.awaited = dict.fromkeys(everyone, 0)
        self._set_deadlines(everyone)
        self.gather(len(self.rows))
        answers = sorted(self.ready, key=lambda answer: answer.worker)
        self.ready.clear()
        self._time_limit = limit
        return [answer.result for answer in answers]

    def complete(self, workers: Sequence[int], method: str, args: Sequence[tuple]) -> list[Answer]:
        """Makes a request and waits for all answers; steps that are under way are given up."""
        self.awaited.clear()
        self.ready.clear()
        try:
            self.request(workers, method, args)
            self.gather(len(workers))
            return sorted(self.ready, key=lambda answer: answer.worker)
        finally:
            self.awaited.clear()
            self.ready.clear()

    def gather(self, needed: int) -> None:
        """Waits until `needed` answers are ready.

        Raises:
            WorkerError: An environment failed, a worker died or did not answer in time.
        """
        if self._time_limit is not None:
            self._take(self._poll(0.0, every=False))
            self._check_deadlines()
        while len(self.ready) < needed:
            every = len(self.ready) + len(self.awaited) == needed
            self._take(self._poll(self._time_left(), every))
            self._check_deadlines()

    def _take(self, answers: Iterable[Answer]) -> None:
        failure = None
        for answer in answers:
            if self.awaited.get(answer.worker) != answer.request:
                continue  # to a request that was given up
            del self.awaited[answer.worker]
            if answer.failed:
                failure = failure or answer.result
            else:
                self.ready.append(answer)
        if failure is not None:
            self.awaited.clear()
            self.ready.clear()
            self.trouble = "an environment failed; call reset(), or close()"
            raise failure

    def _time_left(self) -> float | None:
        if self._time_limit is None:
            return None
        return max(0.0, min(self._deadlines[w] for w in self.awaited) - time.monotonic())

    def _check_deadlines(self) -> None:
        if self._time_limit is None:
            return
        now = time.monotonic()
        late = [w for w in self.awaited if self._deadlines[w] <= now]
        if late:
            what = f"did not answer within {self._time_limit:g} s"
            raise self._lost(StepTimeoutError, what, late, self.cannot_be_stopped)

    def _lost(
        self, kind: type[WorkerError], what: str, workers: Sequence[int], advice: str = ""
    ) -> WorkerError:
        """Ends all workers, and returns the error that says why, now and at any later use."""
        w = workers[0]
        index, seed, step = self.rows[w].start, None, 0
        where = f"the worker of environments {index} to {self.rows[w].stop - 1}"
        if self._buffers is not None:
            progress = self._buffers.progress[w]
            step = int(progress[STEPS])
            if w in self.awaited:
                index += int(progress[ENVIRONMENT])
                where = f"environment {index}"
            seed = int(self._buffers.seeds[index])
            seed = None if seed == NO_SEED else seed
        details = {"env_index": index, "pid": self.pid(w), "seed": seed, "step": step}
        message = f"{where} {what} (worker pid {self.pid(w)}, seed {seed}, step {step})"
        self._fatal = lambda: WorkerError(
            f"these environments can no longer be used, make new ones: {message}", **details
        )
        self.awaited.clear()
        self.ready.clear()
        self.stop(workers)
        return kind(message + advice, **details)
