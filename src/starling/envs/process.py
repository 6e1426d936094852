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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from starling.envs.buffers import SEQUENCE, Buffers, available_memory
from starling.envs.messages import Description, ShardOptions
from starling.envs.requests import Answer, Workers
from starling.envs.sharded import ShardedVectorEnv
from starling.envs.worker import CALL, FAILED, HEADER, STEP, message
from starling.errors import StepTimeoutError, UserError, WorkerDiedError

# The parent's sys.path comes as arguments, so that a worker finds whatever the parent found.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[7:]; "
    "from starling.envs.worker import main; main(sys.argv[1:7])"
)
_ONE_THREAD = {
    f"{library}_NUM_THREADS": "1"
    for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
}
_GRACE = 1.0  # seconds that stopping gives a worker to finish its step and close
_TERM_GRACE = 0.5  # seconds from SIGTERM to SIGKILL
_LOOK_AROUND = 0.5  # seconds between checks for a worker whose death its pipe does not report
_WORKER_MEMORY = 40 << 20  # bytes that the smallest worker takes
_SPARE_DESCRIPTORS = 16


class _Worker:
    """A worker process, and this side's ends of its pipes."""

    def __init__(self, lifeline: int, memory: int):
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        os.set_blocking(self.requests, False)
        self.inbox = bytearray()
        safe_thread = threading.current_thread() is threading.main_thread()
        arguments = [requests, answers, lifeline, memory, os.getpid(), int(safe_thread)]
        path = [entry or os.getcwd() for entry in sys.path]
        try:
            self.process = subprocess.Popen(
                # -P: nothing in the current directory is imported before sys.path is set
                [sys.executable, "-P", "-X", "faulthandler", "-c", _PROGRAM]
                + [str(argument) for argument in (*arguments, *path)],
                pass_fds=(requests, answers, lifeline, memory),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
                process_group=0,  # Ctrl-C and a batch system's warning are the parent's business
            )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(requests)
            os.close(answers)

    def close(self) -> None:
        """Closes the pipes, at which an idle worker closes its environments and ends."""
        for descriptor in (self.requests, self.answers):
            if descriptor >= 0:
                os.close(descriptor)
        self.requests = self.answers = -1


class ProcessWorkers(Workers):
    """Processes with a shard each."""

    def __init__(self, rows: list[slice], step_timeout: float | None = None):
        """See `Workers`."""
        super().__init__(rows, step_timeout)
        if sys.platform == "win32":
            raise UserError("backend 'process' needs Linux or macOS; use backend 'thread' here")
        self._owner = os.getpid()
        self._crew: list[_Worker] = []
        self._by_answers: dict[int, int] = {}
        self._poller = select.poll()  # for all workers' answers
        self._pollers: list[Any] = []  # for one worker's each
        self._backlog: list[Answer] = []
        self._sequences: Any = None
        self._memory = self._lifeline = -1

    # ---- starting

    def start(self, env_fns: list[list], options: ShardOptions) -> list[Description]:
        """Starts all processes, then waits for all of them to have made their environments."""
        _check_resources(len(env_fns))
        payloads = [
            _pickled_factories((makers, rows.start, tuple(options)))
            for makers, rows in zip(env_fns, self.rows, strict=True)
        ]
        self._memory = _anonymous_memory()
        lifeline, self._lifeline = os.pipe()
        try:
            for w in range(len(env_fns)):
                worker = _Worker(lifeline, self._memory)
                self._crew.append(worker)
                self._by_answers[worker.answers] = w
                self._poller.register(worker.answers, select.POLLIN)
                self._pollers.append(select.poll())
                self._pollers[w].register(worker.answers, select.POLLIN)
        except OSError as error:
            raise UserError(
                f"worker process {len(self._crew) + 1} of {len(env_fns)} could not be started "
                f"({error}); lower num_workers"
            ) from error
        finally:
            os.close(lifeline)
        for w, payload in enumerate(payloads):
            self._send(w, message(0, CALL, payload))
        return self._descriptions()

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
        layout = (os.fstat(self._memory).st_size, self.rows[-1].stop, len(self.rows))
        self.complete(everyone, "bind", [(*layout, w, self.rows[w]) for w in everyone])
        os.close(self._memory)
        self._memory = -1

    def pid(self, worker: int) -> int:
        """Process id of a worker."""
        return self._crew[worker].process.pid if worker < len(self._crew) else 0

    # ---- messages

    def _post(self, worker: int, request: int, method: str, args: tuple) -> None:
        if method == "step":
            self._send(worker, message(request, STEP))
        else:
            self._send(worker, message(request, CALL, pickle.dumps((method, args))))

    def _send(self, w: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._crew[w].requests, left) :]
            except BlockingIOError:
                self._wait_for_room(w)
            except BrokenPipeError:
                raise self._died(w) from None

    def _wait_for_room(self, w: int) -> None:
        """Waits until a worker reads on, taking its answers lest it wait for us."""
        worker = self._crew[w]
        poller = select.poll()
        poller.register(worker.requests, select.POLLOUT)
        poller.register(worker.answers, select.POLLIN)
        events = poller.poll(_milliseconds(self._time_left()))
        if not events:
            what = f"did not take its orders within {self._time_limit} s"
            raise self._lost(StepTimeoutError, what, [w])
        if worker.answers in dict(events):
            self._backlog += self._receive(w)

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
            for w, worker in enumerate(self._crew):
                if worker.process.poll() is None:
                    continue
                if self._pollers[w].poll(0):  # it has answered before it ended, or closed its pipe
                    return self._receive(w)
                raise self._died(w)
            if deadline is not None:
                wait = min(deadline - time.monotonic(), _LOOK_AROUND)
                if wait <= 0:
                    return []
        return [answer for fd, _ in events for answer in self._receive(self._by_answers[fd])]

    def _receive(self, w: int) -> list[Answer]:
        """Reads what has come from a worker, and returns the answers that are complete."""
        worker = self._crew[w]
        data = os.read(worker.answers, 65536)
        if not data:
            raise self._died(w)
        inbox, answers = worker.inbox, []
        inbox += data
        while len(inbox) >= HEADER.size:
            request, kind, size = HEADER.unpack_from(inbox)
            end = HEADER.size + size
            if len(inbox) < end:
                break
            result = pickle.loads(inbox[HEADER.size : end]) if size else None
            del inbox[:end]
            answers.append(Answer(w, request, result, kind == FAILED))
            torn = self._sequences is not None and self._sequences[w] != request
            if torn and self.awaited.get(w) == request:
                raise self._lost(WorkerDiedError, "answered without having finished", [w])
        return answers

    def _died(self, w: int) -> WorkerDiedError:
        try:
            code = self._crew[w].process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            code = None
        error = self._lost(WorkerDiedError, _cause_of_death(code), [w])
        assert isinstance(error, WorkerDiedError)
        return error

    # ---- stopping

    def stop(self, overdue: Sequence[int] = ()) -> None:
        """Ends every worker, if need be by force, and gives everything back."""
        if os.getpid() != self._owner:
            return  # a forked copy of the parent: the workers are not its own
        crew = list(self._crew)
        try:
            for w in overdue:
                _signal(self._crew[w].process, signal.SIGTERM)
            for worker in crew:
                worker.close()
            _wait([worker.process for worker in crew], _GRACE if not overdue else _TERM_GRACE)
            for worker in crew:
                _signal(worker.process, signal.SIGTERM)
            _wait([worker.process for worker in crew], _TERM_GRACE)
        finally:
            for worker in crew:
                worker.close()
                _signal(worker.process, signal.SIGKILL)
            _wait([worker.process for worker in crew], _GRACE)
            for descriptor in (self._lifeline, self._memory):
                if descriptor >= 0:
                    os.close(descriptor)
            self._lifeline = self._memory = -1
            self._buffers = self._sequences = None


def _signal(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)


def _wait(processes: Iterable[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else max(0.0, seconds) * 1000


def _cause_of_death(code: int | None) -> str:
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"ended its process with exit code {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    guess = ", perhaps out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code}{name}{guess}"


def _pickled_factories(work: tuple) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(work)
    except Exception as error:
        raise UserError(
            f"the environment factory cannot be sent to a worker process ({error}); let it make "
            "what it needs inside itself, or use backend='serial'"
        ) from error


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
    `if __name__ == "__main__"` is needed. Workers run in a process group of their own, ignore
    Ctrl-C, keep their maths libraries to one thread, and end with their parent.

    A worker that dies, or exceeds `step_timeout`, makes the whole vector environment unusable:
    the error names the environment, and every later call repeats it.
    """

    backend = "process"
    _workers_class = ProcessWorkers
