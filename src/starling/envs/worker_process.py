"""A worker process of the process backend, as seen from its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

from starling.memory import resident_memory
from starling.standard_error import STDERR

# The parent's sys.path comes as arguments, so that a worker finds whatever the parent found.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[7:]; "
    "from starling.envs.worker import main; main(sys.argv[1:7])"
)
# They are the parent's business, and blocked until the worker has said so.
SIGNALS = [signal.SIGINT, signal.SIGTERM]
ONE_THREAD = {
    f"{library}_NUM_THREADS": "1"
    for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
}

_MOMENT = 0.001  # seconds between two looks at a process
_started: list[subprocess.Popen] = []  # those that have ended are forgotten when another starts
_adding = threading.Lock()  # actors start their workers in threads


class WorkerProcess:
    """A worker process, and this side's ends of its pipes."""

    def __init__(self, lifeline: int, memory: int):
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        os.set_blocking(self.requests, False)
        self.inbox = bytearray()
        safe_thread = threading.current_thread() is threading.main_thread()
        arguments = [requests, answers, lifeline, memory, os.getpid(), int(safe_thread)]
        path = [entry or os.getcwd() for entry in sys.path]
        # Where Python began without standard error, its number may be another file's by now.
        output = subprocess.DEVNULL if sys.__stderr__ is None else STDERR
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process = subprocess.Popen(
                # -P: nothing in the current directory is imported before sys.path is set
                [sys.executable, "-P", "-X", "faulthandler", "-c", _PROGRAM]
                + [str(argument) for argument in (*arguments, *path)],
                pass_fds=(requests, answers, lifeline, memory),
                stdin=subprocess.DEVNULL,
                stdout=output,  # what an environment prints is no result of the parent's
                stderr=output,
                env={**os.environ, **ONE_THREAD},
                process_group=0,  # Ctrl-C and a batch system's warning are the parent's business
            )
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(requests)
            os.close(answers)
        with _adding:
            living = [process for process in _started if process.returncode is None]
            _started[:] = [*living, self.process]

    def close(self) -> None:
        """Closes the pipes, at which an idle worker closes its environments and ends."""
        for descriptor in (self.requests, self.answers):
            if descriptor >= 0:
                os.close(descriptor)
        self.requests = self.answers = -1

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked of it any more."""
        return self.requests < 0

    def memory(self) -> int:
        """Bytes that the process keeps in memory; 0 where it has ended, or nobody says."""
        # Once closed, its id may be another's.
        return 0 if self.closed else resident_memory(self.process.pid)


def send_signal(process: subprocess.Popen, number: int) -> None:
    """Signals a worker and what its environments have started, unless it has ended."""
    if _reap(process):
        return
    try:
        os.killpg(process.pid, number)  # each has a group of its own
    except ProcessLookupError:  # which an environment can have left; or it has ended since
        process.send_signal(number)


def kill_all() -> None:
    """Kills this process's workers and what their environments have started: it ends at once."""
    for process in _started:
        if process.returncode is None:  # or its id may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(processes: Iterable[subprocess.Popen], seconds: float) -> None:
    """Waits for processes to end, for so many seconds in all.

    What the environments of one have started is killed when it has ended, unless it ended well: an
    encoder of a video, say, finishes then.
    """
    deadline = time.monotonic() + seconds
    for process in processes:
        while not _reap(process) and time.monotonic() < deadline:
            time.sleep(_MOMENT)


def end_of(process: subprocess.Popen, seconds: float) -> int | None:
    """As `wait_for`, for a worker that nobody has asked to end; its exit code, or None."""
    deadline = time.monotonic() + seconds
    while not (ended := _reap(process, asked=False)) and time.monotonic() < deadline:
        time.sleep(_MOMENT)
    return process.returncode if ended else None


def _reap(process: subprocess.Popen, asked: bool = True) -> bool:
    """Whether a worker has ended; kills what its environments have left, see `wait_for`."""
    if process.returncode is None and hasattr(os, "waitid"):  # macOS has it from Python 3.13 on
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):  # nobody has to wait where SIGCHLD is ignored
            end = os.waitid(os.P_PID, process.pid, options)
            if end is None:
                return False
            if not (asked and (end.si_code, end.si_status) == (os.CLD_EXITED, 0)):
                # As long as nobody has waited for it, its group's id can be no other's.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    return process.poll() is not None


def cause_of_death(code: int | None) -> str:
    """What an exit code means, as the end of a sentence."""
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
