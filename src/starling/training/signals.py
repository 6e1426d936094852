"""Stopping on Ctrl-C or SIGTERM: a flag for the loop to poll, used by the command line only."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from typing import Any

from starling.envs.worker_process import kill_all

GRACE_SECONDS = 25.0
"""From the first signal to the end: schedulers of clusters kill after 30."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# `timeout`, and tools that pass signals on, deliver one request twice within milliseconds.
_SAME_REQUEST_SECONDS = 0.1
_END_OF_WATCH = b"\0"  # no signal has the number 0


def exit_code(signum: int) -> int:
    """Returns the exit code of a process that a signal stopped (130 for SIGINT)."""
    return 128 + signum


_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class StopSignals:
    """Notes the first SIGINT or SIGTERM; ends the process at the second, or when time is up.

    ```python
    with StopSignals() as stop:
        while not stop.is_set():
            ...
    ```

    A thread reads the signals from a socket: Python runs its own handlers only between two
    instructions of the main thread, so never while that compiles a program, and a second Ctrl-C
    has to work then too.

    Args:
        grace: Seconds from the first signal to the end of the `with` block; a process that takes
            longer is ended, and what the last checkpoint holds is kept. None waits for ever.

    Attributes:
        requested: The first signal's number, or None.
    """

    def __init__(self, grace: float | None = GRACE_SECONDS):
        self.requested: int | None = None
        self._grace = grace
        self._previous: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether the process was asked to stop."""
        return self.requested is not None

    @property
    def exit_code(self) -> int:
        """That of a process whose stop was asked for, or not (0)."""
        return 0 if self.requested is None else exit_code(self.requested)

    def __enter__(self) -> StopSignals:
        # Sockets, as Windows can wait for nothing else.
        self._read_end, self._write_end = socket.socketpair()
        self._write_end.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        self._previous_wakeup = signal.set_wakeup_fd(
            self._write_end.fileno(), warn_on_full_buffer=False
        )
        for signum in _SIGNALS:
            # The handler has nothing to do: that there is one makes the socket get the number.
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            # Once asked to stop, the process is about to end: a second signal, meant to hurry it,
            # must not come upon the interpreter while that is taking itself down.
            over = self.requested is not None and handler in _DEFAULTS
            signal.signal(signum, signal.SIG_IGN if over else handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._write_end.send(_END_OF_WATCH)
        self._thread.join()
        self._read_end.close()
        self._write_end.close()

    def _note(self, signum: int, frame: object) -> None:
        # Also here, so that the main thread sees the flag at its next instruction.
        if self.requested is None:
            self.requested = signum

    def _watch(self) -> None:
        first_at = 0.0
        deadline: float | None = None
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read_end], [], [], wait)[0]:
                assert self.requested is not None
                _end(self.requested, "could not stop in time")
            received = self._read_end.recv(64)
            now = time.monotonic()
            for signum in received:
                if signum == _END_OF_WATCH[0]:
                    return
                if signum not in _SIGNALS:
                    continue
                if not first_at:
                    first_at = now
                    self.requested = self.requested or signum
                    deadline = None if self._grace is None else now + self._grace
                elif now - first_at > _SAME_REQUEST_SECONDS:
                    _end(signum, "stopped at once")


def _end(signum: int, why: str) -> None:
    """Ends the process and its workers without clean-up: checkpoints are whole."""
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar had hidden it
    with contextlib.suppress(OSError):
        os.write(2, f"{show_cursor}\n{why}; what was saved is kept\n".encode())
    kill_all()  # they would end with this process, but not what their environments have started
    os._exit(exit_code(signum))
