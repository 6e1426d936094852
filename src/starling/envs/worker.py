"""The program that a worker process of the process backend runs.

It imports no more than it needs to step environments: no JAX, and nothing of the parent's.
Requests come through one pipe and answers go through another, each message a header and, at
times, a pickle; what is large lies in memory that both processes share.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import pickle
import select
import signal
import struct
import sys
import threading
import time
import warnings
from typing import Any

from starling.envs.buffers import SEQUENCE, make_buffers
from starling.envs.messages import Description, Infos, ShardOptions, pickled
from starling.envs.requests import as_answer, perform
from starling.envs.shard import Shard
from starling.envs.spaces import leaves
from starling.envs.worker_process import SIGNALS
from starling.errors import WorkerError
from starling.standard_error import StandardError

HEADER = struct.Struct("<qii")  # number of the request, kind, length of the pickle that follows
STEP, CALL = 0, 1  # kinds of request
DONE, FAILED = 0, 1  # kinds of answer

_ORPHAN_GRACE = 1.0  # seconds to close the environments in, once the parent is gone
_PR_SET_PDEATHSIG, _F_SETSIG = 1, 10  # of Linux


def message(request: int, kind: int, payload: bytes = b"") -> bytes:
    """A message as it goes through a pipe."""
    return HEADER.pack(request, kind, len(payload)) + payload


def main(arguments: list[str]) -> None:
    """Serves requests until the parent closes the pipe or is gone.

    Args:
        arguments: Descriptors of requests, answers, lifeline and memory; the parent's process
            id; 1 if the thread that started this process lives as long as its process.
    """
    requests, answers, lifeline, memory, parent, safe_thread = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _outlive_sigterm_of_others(requests)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    sys.stdout, sys.stderr = _Labelled(), _Labelled()  # two: an environment may close one
    _end_with_parent(lifeline, parent, bool(safe_thread))
    _keep_from_copies(requests, answers)
    shard, pid = None, os.getpid()
    try:
        with contextlib.suppress(BrokenPipeError, EOFError):
            shard = _start(requests, answers)
            if shard is not None:
                _serve(shard, requests, answers, memory)
    finally:
        if os.getpid() != pid:
            told = "an environment has forked this process, and came back in the copy, too: it ends"
            print(told, file=sys.stderr, flush=True)
            os._exit(0)  # the environments, and whatever is to be done at exit, are the original's
        if shard is not None:
            shard.close()


class _Labelled(StandardError):
    """Standard error, each of whose lines begins with the worker that says it."""

    def __init__(self):
        super().__init__()
        self._label, self._at_line_start = f"[worker pid {os.getpid()}] ", True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            super().write(self._label + line if self._at_line_start else line)
            self._at_line_start = line.endswith("\n")
        return len(text)


def _outlive_sigterm_of_others(requests: int) -> None:
    """Has SIGTERM end this process only once the parent has closed its pipe.

    Batch systems send it to all processes of a run at once: the run is about to stop then, and
    needs its workers to do so.
    """
    pipe, sigterm = select.poll(), [signal.SIGTERM]
    pipe.register(requests, 0)  # that its other end is closed is reported in any case

    def end_unless_needed(signum: int, frame: object) -> None:
        if pipe.poll(0):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def heed_it_again() -> None:
        if signal.getsignal(signal.SIGTERM) is end_unless_needed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm)

    signal.signal(signal.SIGTERM, end_unless_needed)
    # What an environment forks heeds it; a signal that comes before Python runs there has to wait.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, sigterm),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm),
        after_in_child=heed_it_again,
    )


def _keep_from_copies(requests: int, answers: int) -> None:
    """Lets none that an environment forks read requests or answer them."""
    nothing = os.open(os.devnull, os.O_RDWR)

    def disconnect() -> None:
        os.dup2(nothing, requests)
        os.dup2(nothing, answers)

    os.register_at_fork(after_in_child=disconnect)


def _end_with_parent(lifeline: int, parent: int, safe_thread: bool) -> None:
    """Ends this process with its parent, however that ends and whatever this one is doing."""

    def watch() -> None:
        os.read(lifeline, 1)  # returns when the last descriptor of the other end is closed
        time.sleep(_ORPHAN_GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform != "linux":
        return
    # Signals of the kernel's own reach even a step that holds the interpreter lock.
    if safe_thread:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:  # that one would come as soon as the *thread* ends that started this process
        _signal_at_the_end_of(lifeline)
    if os.getppid() != parent:
        os._exit(1)


def _signal_at_the_end_of(lifeline: int) -> None:
    """Has this process killed when the last descriptor of the pipe's other end is closed."""
    with contextlib.suppress(OSError):  # without it, the watching thread has to do
        # Opened anew: whom a descriptor signals is shared by all copies of it.
        own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)


def _start(requests: int, answers: int) -> Shard | None:
    """Makes the environments and describes them, or reports why that failed."""
    request, _, size = HEADER.unpack(_read(requests, HEADER.size))
    try:
        env_fns, first, options = pickle.loads(_read(requests, size))
        shard = Shard(env_fns, first, ShardOptions(*options))
        _write(answers, _answer(request, shard.describe(), failed=False))
    except BaseException as error:
        _write(answers, _answer(request, as_answer("could not start", error), failed=True))
        return None
    return shard


def _serve(shard: Shard, requests: int, answers: int, memory: int) -> None:
    progress, pid = None, os.getpid()
    while True:
        request, kind, size = HEADER.unpack(_read(requests, HEADER.size))
        method, args = ("step", ()) if kind == STEP else pickle.loads(_read(requests, size))
        if method == "bind":
            progress = _bind(shard, memory, *args)
            result, failed = None, False
        else:
            assert progress is not None
            # Should this process die while it writes, the mark says that results are torn.
            progress[SEQUENCE] = -request
            result, failed = perform(shard, method, args)
            if os.getpid() != pid:
                return  # to `main`, which ends a copy
        progress[SEQUENCE] = request
        _write(answers, _answer(request, result, failed))


def _bind(shard: Shard, memory: int, size: int, n: int, workers: int, worker: int, rows: slice):
    shared = mmap.mmap(memory, size)
    os.close(memory)
    space = shard.describe()
    spaces = leaves(space.observation_space), leaves(space.action_space)
    buffers = make_buffers(*spaces, n, workers, shared).part(worker, rows)
    shard.bind(buffers)
    return buffers.progress


def _read(descriptor: int, size: int) -> bytes:
    """Reads exactly `size` bytes.

    Raises:
        EOFError: The parent closed the pipe.
    """
    data = os.read(descriptor, size)
    if len(data) == size:
        return data
    parts = bytearray(data)
    while len(parts) < size:
        part = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _answer(request: int, result: Any, failed: bool) -> bytes:
    """The message with a result; what cannot travel is left out, or reported as a failure."""
    kind = FAILED if failed else DONE
    if result is None:
        return message(request, kind)
    try:
        return message(request, kind, pickled(result))
    except Exception as error:
        if isinstance(result, Infos):
            current, final = _portable(result.current), _portable(result.final)
            kept = result._replace(current=current, final=final)
            return message(request, kind, pickle.dumps(kept))
        if isinstance(result, Description):  # whose entry point may be a local function
            kept = result._replace(spec=None, metadata={})
            return message(request, kind, pickle.dumps(kept))
        failure = WorkerError(
            f"what the environments returned cannot be sent between processes: {error}",
            pid=os.getpid(),
        )
        return message(request, FAILED, pickle.dumps(failure))


def _portable(infos: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    kept = []
    for i, info in infos:
        kept.append((i, {}))
        for key, value in info.items():
            try:
                pickled((key, value))
            except Exception:
                warnings.warn(
                    f"info[{key!r}] cannot be sent between processes and is left out", stacklevel=2
                )
            else:
                kept[-1][1][key] = value
    return kept
