"""The process backend: worker processes step shards and write the results in place.

Observations, rewards, flags and actions lie in anonymous memory that all processes share. A
step costs one short message to each worker and one back; results are used only once the
worker's answer to that very step has arrived. A pipe that closes reports a dead worker.
"""

from __future__ import annotations

import mmap
import os
import pickle
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

from starling.envs.buffers import SEQUENCE, Buffers
from starling.envs.copies import pack_factories
from starling.envs.messages import Description, ShardOptions
from starling.envs.requests import START_LIMIT, Answer, Workers
from starling.envs.sharded import ShardedVectorEnv
from starling.envs.worker import CALL, FAILED, HEADER, STEP, message
from starling.envs.worker_process import (
    WorkerProcess,
    cause_of_death,
    end_of,
    send_signal,
    wait_for,
)
from starling.errors import StepTimeoutError, UserError, WorkerDiedError, WorkerError
from starling.memory import available_memory
from starling.standard_error import occupy_standard_streams

_GRACE = 1.0  # seconds that stopping gives a worker to finish its step and close
_TERM_GRACE = 0.5  # seconds from SIGTERM to SIGKILL
_DYING = 5.0  # seconds from the end of its pipe to that of a worker, should a machine be busy
_LOOK_AROUND = 0.5  # seconds between checks for a worker whose death its pipe does not report
_WORKER_MEMORY = 40 << 20  # bytes that the smallest worker takes
_SPARE_DESCRIPTORS = 16


class ProcessWorkers(Workers):
    """Processes with a shard each."""

    def __init__(self, rows: list[slice], step_timeout: float | None = None):
        """See `Workers`."""
        super().__init__(rows, step_timeout)
        if sys.platform == "win32":
            raise UserError("backend 'process' needs Linux or macOS; use backend 'thread' here")
        self._owner = os.getpid()
        self._crew: list[WorkerProcess] = []
        self._by_answers: dict[int, int] = {}
        self._poller = select.poll()  # for all workers' answers
        self._pollers: list[Any] = []  # for one worker's each
        self._backlog: list[Answer] = []
        self._payloads: list[bytes] = []  # what each worker makes its environments from
        self._described: Description  # of the first environment
        self._sequences: Any = None
        self._memory = self._lifeline = self._lifeline_end = -1

    # ---- starting

    def start(self, env_fns: list[list], options: ShardOptions) -> list[Description]:
        """Starts all processes, then waits for all of them to have made their environments."""
        _check_resources(len(env_fns))
        self._payloads = [
            pack_factories(
                (makers, self.first_env + rows.start, tuple(options)),
                "a worker process",
                "backend='serial'",
            )
            for makers, rows in zip(env_fns, self.rows, strict=True)
        ]
        occupy_standard_streams()
        self._memory = _anonymous_memory()
        self._lifeline, self._lifeline_end = os.pipe()
        for w in range(len(env_fns)):
            self._pollers.append(select.poll())
            self._crew.append(self._spawn(w))
        for w, payload in enumerate(self._payloads):
            self._send(w, message(0, CALL, payload))
        described = self._descriptions()
        self._described = described[0]
        return described

    def _spawn(self, w: int) -> WorkerProcess:
        try:
            worker = WorkerProcess(self._lifeline, self._memory)
        except OSError as error:
            raise UserError(
                f"worker process {w + 1} of {len(self.rows)} could not be started ({error}); "
                "lower num_workers"
            ) from error
        self._by_answers[worker.answers] = w
        self._poller.register(worker.answers, select.POLLIN)
        self._pollers[w].register(worker.answers, select.POLLIN)
        return worker

    def respawn(self, worker: int) -> None:
        """Starts another process in a worker's place, and has it make its environments."""
        if not self._crew[worker].closed:
            self.end(worker)
        self._crew[worker] = self._spawn(worker)
        self.losses.pop(worker, None)
        self._requests += 1
        self.awaited[worker] = self._sequences[worker] = self._requests
        self._set_deadlines([worker], at_least=START_LIMIT)
        self._send(worker, message(self._requests, CALL, self._payloads[worker]))
        described = self._answer_of(worker)
        if described[:2] != self._described[:2]:
            raise UserError(
                f"all environments need the same spaces: those of a new worker have "
                f"{described[:2]}, the first had {self._described[:2]}"
            )
        self.ask(worker, "bind", self._layout(worker))

    def allocate(self, size: int) -> Any:
        """Reserves the shared memory, so that it cannot run out while it is written."""
        size = max(size, mmap.PAGESIZE)
        available = available_memory()
        try:
            if available is not None and size > available:
                raise OSError(f"{available >> 20} MB are available")
            os.ftruncate(self._memory, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._memory, 0, size)
        except OSError as error:
            raise UserError(
                f"the environments' results need {size / 2**20:.0f} MB of shared memory, which "
                f"cannot be had ({error}); lower num_envs"
            ) from error
        return mmap.mmap(self._memory, size)

    def bind(self, buffers: Buffers) -> None:
        """Has every worker map its part of the shared memory."""
        super().bind(buffers)
        self._sequences = buffers.progress[:, SEQUENCE]
        everyone = range(len(self.rows))
        self.complete(everyone, "bind", [self._layout(w) for w in everyone])

    def _layout(self, w: int) -> tuple:
        size = os.fstat(self._memory).st_size
        return size, self.rows[-1].stop, len(self.rows), w, self.rows[w]

    def pid(self, worker: int) -> int:
        """Process id of a worker."""
        return self._crew[worker].process.pid if worker < len(self._crew) else 0

    def memory_of(self, worker: int) -> int:
        """Bytes that a worker's process keeps in memory."""
        return self._crew[worker].memory()

    # ---- messages

    def _post(self, worker: int, request: int, method: str, args: tuple) -> None:
        if method == "step":
            self._send(worker, message(request, STEP))
        else:
            self._send(worker, message(request, CALL, pickle.dumps((method, args))))

    def _send(self, w: int, data: bytes) -> None:
        if w in self.losses:  # it was lost while it had nothing to do
            self._backlog.append(Answer(w, self.awaited[w], self.losses[w], True))
        left = memoryview(data)
        while left and not self._crew[w].closed:
            try:
                left = left[os.write(self._crew[w].requests, left) :]
            except BlockingIOError:
                self._wait_for_room(w)
            except BrokenPipeError:
                self._backlog += self._died(w)

    def _wait_for_room(self, w: int) -> None:
        """Waits until a worker reads on, taking its answers lest it wait for us."""
        worker = self._crew[w]
        poller = select.poll()
        poller.register(worker.requests, select.POLLOUT)
        poller.register(worker.answers, select.POLLIN)
        limited = self._time_limit is not None
        left = self._deadlines[w] - time.monotonic() if limited else _LOOK_AROUND
        events = dict(poller.poll(_milliseconds(min(left, _LOOK_AROUND))))
        if worker.answers in events:
            self._backlog += self._receive(w)
        elif not events and left <= 0:
            what = f"did not take its orders within {self._allowed[w]:g} s"
            self._backlog += self._lost(StepTimeoutError, what, [w])
        elif not events:
            self._backlog += self._look_around()

    def _poll(self, timeout: float | None, every: bool) -> Iterable[Answer]:
        if self._backlog:
            answers, self._backlog = self._backlog, []
            return answers
        # Where all are needed, wait for one after the other: each answer to a sleeping parent
        # wakes it, and would take a core from the workers that are still at it.
        poller = self._pollers[next(iter(self.awaited))] if every else self._poller
        deadline = None if timeout is None else time.monotonic() + timeout
        wait = _LOOK_AROUND if timeout is None else min(timeout, _LOOK_AROUND)
        while not (events := poller.poll(_milliseconds(wait))):
            if answers := self._look_around():
                return answers
            if deadline is not None:
                wait = min(deadline - time.monotonic(), _LOOK_AROUND)
                if wait <= 0:
                    return []
        return [answer for fd, _ in events for answer in self._receive(self._by_answers[fd])]

    def _look_around(self) -> list[Answer]:
        """What there is from workers whose end their pipes have not reported."""
        for w, worker in enumerate(self._crew):
            if worker.closed or end_of(worker.process, 0.0) is None:
                continue
            if self._pollers[w].poll(0):  # it has answered before it ended, or closed its pipe
                return self._receive(w)
            return self._died(w)
        return []

    def _receive(self, w: int) -> list[Answer]:
        """Reads what has come from a worker, and returns the answers that are complete."""
        worker = self._crew[w]
        data = os.read(worker.answers, 65536)
        if not data:
            return self._died(w)
        inbox, answers = worker.inbox, []
        inbox += data
        while len(inbox) >= HEADER.size:
            request, kind, size = HEADER.unpack_from(inbox)
            end = HEADER.size + size
            if len(inbox) < end:
                break
            data = inbox[HEADER.size : end]
            del inbox[:end]
            answers.append(self._read(w, request, kind, data))
            torn = self._sequences is not None and self._sequences[w] != request
            if torn and self.awaited.get(w) == request:
                return self._lost(WorkerDiedError, "answered without having finished", [w])
        return answers

    def _read(self, w: int, request: int, kind: int, data: bytearray) -> Answer:
        try:
            return Answer(w, request, pickle.loads(data) if data else None, kind == FAILED)
        except Exception as error:  # the worker could read it, but here it is another matter
            pid = self.pid(w)
            failure = WorkerError(
                f"{self.envs_of(w)} (worker pid {pid}) sent what cannot be read here "
                f"({type(error).__name__}: {error}); give plain values in infos",
                pid=pid,
            )
            return Answer(w, request, failure, True)

    def _died(self, w: int) -> list[Answer]:
        code = end_of(self._crew[w].process, _DYING)
        return self._lost(WorkerDiedError, cause_of_death(code), [w])

    # ---- stopping

    def end(self, worker: int) -> None:
        """Ends one process; an idle one may close its environments first."""
        ending = self._crew[worker]
        if ending.closed:
            return
        del self._by_answers[ending.answers]
        self._poller.unregister(ending.answers)
        self._pollers[worker].unregister(ending.answers)
        ending.close()
        if worker not in self.awaited:
            wait_for([ending.process], _GRACE)
        send_signal(ending.process, signal.SIGTERM)
        wait_for([ending.process], _TERM_GRACE)
        send_signal(ending.process, signal.SIGKILL)
        wait_for([ending.process], _GRACE)

    def stop(self, overdue: Sequence[int] = ()) -> None:
        """Ends every worker, if need be by force, and gives everything back."""
        if os.getpid() != self._owner:
            return  # a forked copy of the parent: the workers are not its own
        crew = list(self._crew)
        try:
            for worker in crew:
                worker.close()  # before any signal: a worker heeds none as long as it is needed
            for w in overdue:
                send_signal(self._crew[w].process, signal.SIGTERM)
            wait_for([worker.process for worker in crew], _GRACE if not overdue else _TERM_GRACE)
            for worker in crew:
                send_signal(worker.process, signal.SIGTERM)
            wait_for([worker.process for worker in crew], _TERM_GRACE)
        finally:
            for worker in crew:
                worker.close()
                send_signal(worker.process, signal.SIGKILL)
            wait_for([worker.process for worker in crew], _GRACE)
            for descriptor in (self._lifeline, self._lifeline_end, self._memory):
                if descriptor >= 0:
                    os.close(descriptor)
            self._lifeline = self._lifeline_end = self._memory = -1
            self._buffers = self._sequences = None
            self.losses.clear()  # their tracebacks hold on to the memory


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else max(0.0, seconds) * 1000


def _anonymous_memory() -> int:
    """A descriptor of memory without a name, which goes when the last process lets go of it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("starling-envs")
    descriptor, path = tempfile.mkstemp(prefix="starling-envs-")
    os.unlink(path)
    return descriptor


def _check_resources(workers: int) -> None:
    """Refuses what would fail half way, with the numbers."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = len(os.listdir("/dev/fd"))
    needed = 2 * workers + _SPARE_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and used + needed > limit:
        raise UserError(
            f"{workers} worker processes need {needed} file descriptors; {used} of the {limit} "
            "allowed are in use: raise the limit (ulimit -n), or lower num_workers"
        )
    available = available_memory()
    if available is not None and workers * _WORKER_MEMORY > available:
        raise UserError(
            f"{workers} worker processes need at least {workers * _WORKER_MEMORY >> 20} MB of "
            f"memory; {available >> 20} MB are available: lower num_workers"
        )


class ProcessVectorEnv(ShardedVectorEnv):
    """Steps shards of environments in worker processes, which share memory with the caller.

    The fastest choice for environments written in Python. Factories travel to the workers by
    cloudpickle, so lambdas and functions of a script's own will do, and no
    `if __name__ == "__main__"` is needed. Workers run in a process group of their own, leave Ctrl-C
    and SIGTERM to their parent, keep their maths libraries to one thread, and end with it.

    A worker that dies, or exceeds `step_timeout`, is replaced or dropped if `safety` says so.
    Otherwise it makes the whole vector environment unusable: the error names the environment, and
    every later call repeats it.
    """

    backend = "process"
    _workers_class = ProcessWorkers
