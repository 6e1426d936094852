"""Requests to workers and their answers, whatever a worker is: the caller, a thread, a process.

Each request carries a number, each answer the number of its request, and an answer that nobody
waits for any more is dropped: after an error or a time-out no step can be completed by the
answer to an earlier one.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from starling.envs.buffers import ENVIRONMENT, NO_SEED, STEPS, Buffers
from starling.envs.messages import Description, ShardOptions
from starling.envs.shard import Shard
from starling.errors import (
    StarlingError,
    StepTimeoutError,
    WorkerDiedError,
    WorkerError,
    said,
    traceback_of,
)

# Seconds to make environments in, where step_timeout is shorter: imports take longer than steps.
START_LIMIT = 60.0
_WARN_AFTER = 30.0  # seconds without an answer, where step_timeout allows more

_log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A worker's answer: `result` is what the shard's method returned, or what it raised."""

    worker: int
    request: int
    result: Any
    failed: bool


def perform(
    shard: Shard, method: str, args: tuple, interruptible: bool = False
) -> tuple[Any, bool]:
    """Calls a method of a shard; returns its result, or its error and True.

    Whatever is raised is an answer, as somebody waits for one; where the caller itself is at
    work, and `interruptible`, Ctrl-C is its own.
    """
    try:
        return getattr(shard, method)(*args), False
    except BaseException as error:
        if interruptible and isinstance(error, KeyboardInterrupt):
            raise
        return as_answer(f"failed in {method}()", error), True


def as_answer(what: str, error: BaseException) -> StarlingError:
    """The error that a worker answers with when it meets one."""
    if isinstance(error, StarlingError):
        return error
    trace = traceback_of(error)
    return WorkerError(
        f"the worker in process {os.getpid()} {what}: {type(error).__name__}: {said(error)}"
        f"\n\nThe worker's own traceback:\n{trace}",
        pid=os.getpid(),
        original_traceback=trace,
    )


class Workers:
    """W workers with a shard each.

    A backend implements `start`, `bind`, `_post`, `_poll` and `stop`.

    Attributes:
        rows: Rows of the buffers that belong to each worker.
        awaited: Worker -> number of the request that it has not answered yet.
        ready: Answers that nobody has taken yet, first come first.
        trouble: Why steps are refused until the next reset; empty when all is well.
        losses: What became of each worker that is lost and not replaced.
        survives: Whether the loss of a worker is an answer like others, with what happened as
            its result, rather than the end of them all.
        first_env: Index in the run of the environment in row 0, for messages.
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
        self.losses: dict[int, WorkerError] = {}
        self.survives = False
        self.first_env = 0
        self._time_limit = step_timeout
        self._deadlines, self._allowed = [0.0] * len(rows), [0.0] * len(rows)
        self._looks = [0.0] * len(rows)  # when to warn of a worker, then its deadline
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

    def where(self, row: int) -> dict[str, int | None]:
        """What messages tell of the environment in a row: its worker's pid, its seed, its step."""
        w = next(w for w, rows in enumerate(self.rows) if rows.start <= row < rows.stop)
        seed, step = NO_SEED, 0
        if self._buffers is not None:
            seed, step = int(self._buffers.seeds[row]), int(self._buffers.progress[w][STEPS])
        return {"pid": self.pid(w), "seed": None if seed == NO_SEED else seed, "step": step}

    def memory_of(self, worker: int) -> int:
        """Bytes that a worker's own process keeps in memory; 0 where it has none."""
        return 0

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

    def end(self, worker: int) -> None:
        """Ends one worker at once; the others go on. Where it can be survived, that is."""
        raise NotImplementedError

    def respawn(self, worker: int) -> None:
        """Puts a new worker, with environments made anew, in the place of one that ended."""
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

    def _set_deadlines(self, workers: Iterable[int], at_least: float = 0.0) -> None:
        if self._time_limit is not None:
            seconds = max(self._time_limit, at_least)
            now = time.monotonic()
            deadline, look = now + seconds, now + min(seconds, _WARN_AFTER)
            for w in workers:
                self._deadlines[w], self._allowed[w], self._looks[w] = deadline, seconds, look

    def _descriptions(self) -> list[Description]:
        """Waits for all workers to describe their shards, as answers to request 0."""
        everyone = range(len(self.rows))
        self.awaited = dict.fromkeys(everyone, 0)
        self._set_deadlines(everyone, at_least=START_LIMIT)
        self.gather(len(self.rows))
        answers = sorted(self.ready, key=lambda answer: answer.worker)
        self.ready.clear()
        return [answer.result for answer in answers]

    def complete(self, workers: Sequence[int], method: str, args: Sequence[tuple]) -> list[Answer]:
        """Makes a request and waits for all answers; steps that are under way are given up.

        Failures are answers to `reset` and `state`, and losses to `restore`, where they can be
        survived.

        Raises:
            WorkerError: Something else failed.
        """
        self.awaited.clear()
        self.ready.clear()
        try:
            self.request(workers, method, args)
            self.gather(len(workers))
            answers = sorted(self.ready, key=lambda answer: answer.worker)
            for answer in answers:
                lost = method == "restore" and answer.worker in self.losses
                if answer.failed and not lost and method not in ("reset", "state"):
                    raise self.give_up(answer.result)
            return answers
        finally:
            self.awaited.clear()
            self.ready.clear()

    def ask(self, worker: int, method: str, args: tuple) -> Any:
        """Has one worker do something, whatever the others are doing, and returns its result.

        Raises:
            WorkerError: It failed, or was lost.
        """
        self.request([worker], method, [args])
        return self._answer_of(worker)

    def _answer_of(self, worker: int) -> Any:
        number = self.awaited[worker]
        while True:
            # Time is up for those only who have not answered by then.
            for look in (lambda: self._poll(self._time_left(), every=False), self._overdue):
                answers = list(look())
                self._take(a for a in answers if (a.worker, a.request) != (worker, number))
                for answer in answers:
                    if (answer.worker, answer.request) == (worker, number):
                        self.awaited.pop(worker, None)
                        if answer.failed:
                            raise answer.result
                        return answer.result

    def gather(self, needed: int) -> None:
        """Waits until `needed` answers are ready.

        Raises:
            WorkerError: An environment failed, a worker died or did not answer in time.
        """
        if self._time_limit is not None:
            self._take(self._poll(0.0, every=False))
            self._take(self._overdue())
        while len(self.ready) < needed:
            every = len(self.ready) + len(self.awaited) == needed
            self._take(self._poll(self._time_left(), every))
            self._take(self._overdue())

    def _take(self, answers: Iterable[Answer]) -> None:
        failure = None
        for answer in answers:
            if self.awaited.get(answer.worker) != answer.request:
                continue  # to a request that was given up
            del self.awaited[answer.worker]
            loss = isinstance(answer.result, WorkerDiedError | StepTimeoutError)
            if answer.failed and not (loss and self.survives):
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
        return max(0.0, min(self._looks[w] for w in self.awaited) - time.monotonic())

    def _overdue(self) -> Iterable[Answer]:
        """Warns of workers that take long, and loses those whose time is up."""
        if self._time_limit is None:
            return ()
        now = time.monotonic()
        if all(self._looks[w] > now for w in self.awaited):
            return ()
        answers = list(self._poll(0.0, every=False))  # there may be some that nobody looked at
        done = {answer.worker for answer in answers}
        slow = [w for w in self.awaited if self._looks[w] <= now and w not in done]
        late = [w for w in slow if self._deadlines[w] <= now]
        self._warn_of(w for w in slow if w not in late)
        if not late:
            return answers
        what = f"did not answer within {self._allowed[late[0]]:g} s"
        return [*answers, *self._lost(StepTimeoutError, what, late, self.cannot_be_stopped)]

    def _warn_of(self, workers: Iterable[int]) -> None:
        for w in workers:
            self._looks[w] = self._deadlines[w]
            what = f"has not answered for {_WARN_AFTER:g} s, of {self._allowed[w]:g} s allowed"
            _log.warning("%s", self._loss(WorkerError, what, w, ""))

    def _lost(
        self, kind: type[WorkerError], what: str, workers: Sequence[int], advice: str = ""
    ) -> list[Answer]:
        """Ends the workers named, and answers for them, if that is to be survived.

        Raises:
            WorkerError: It is not: all workers are ended, and any later use says why.
        """
        errors = [self._loss(kind, what, w, advice) for w in workers]
        if self.survives and not advice:
            answers = [
                Answer(w, self.awaited.get(w, self._requests), error, True)
                for w, error in zip(workers, errors, strict=True)
            ]
            for w, error in zip(workers, errors, strict=True):
                self.end(w)
                self.losses[w] = error
            return answers
        raise self.give_up(errors[0], overdue=workers)

    def give_up(
        self, error: WorkerError, why: str = "", overdue: Sequence[int] = ()
    ) -> WorkerError:
        """Ends all workers; returns the error to raise, which any later use repeats."""
        message = f"given up {why}: {error}" if why else str(error)
        known = ("env_index", "pid", "seed", "step", "original_traceback")
        details = {name: getattr(error, name) for name in known}
        self._fatal = lambda: WorkerError(
            f"these environments can no longer be used, make new ones: {message}", **details
        )
        self.awaited.clear()
        self.ready.clear()
        self.stop(overdue)
        return type(error)(message, **details)

    def _loss(self, kind: type[WorkerError], what: str, w: int, advice: str) -> WorkerError:
        """The error that names what a worker that is lost was doing."""
        row, who = self.rows[w].start, self.envs_of(w)
        if self._buffers is not None and w in self.awaited:
            row += int(self._buffers.progress[w][ENVIRONMENT])
            who = f"environment {self.first_env + row}"
        facts: dict[str, Any] = self.where(row)
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        return kind(
            f"{who} {what} (worker {told}){advice}", env_index=self.first_env + row, **facts
        )

    def envs_of(self, worker: int) -> str:
        """A worker in words, by the environments that it has."""
        rows, first = self.rows[worker], self.first_env
        return f"the worker of environments {first + rows.start} to {first + rows.stop - 1}"
