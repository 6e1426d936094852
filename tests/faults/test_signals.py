"""Stop signals: one is a flag, a second ends the process, also while it cannot listen."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from starling.training.signals import StopSignals, exit_code

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]

POLITE = """
import sys
from starling.training.signals import StopSignals, exit_code
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.is_set():
        pass
print("saved", flush=True)
sys.exit(exit_code(stop.requested))
"""

# The main thread is inside a C function for minutes, as while XLA compiles a program.
BUSY = """
import hashlib, sys, threading, time
from starling.training.signals import StopSignals
def tell():
    while not stop.is_set():
        time.sleep(0.01)
    print("noted", flush=True)
with StopSignals(grace=float(sys.argv[1])) as stop:
    threading.Thread(target=tell, daemon=True).start()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@contextmanager
def child(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a script, waits until it is ready, and leaves none of it behind."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
    assert process.poll() is not None


def stop_by_a_second(process: subprocess.Popen[str], signum: int) -> None:
    """Sends a signal until the process ends: repeats within 0.1 s count as one."""
    while process.poll() is None:
        process.send_signal(signum)
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_a_flag(signum, code):
    with child(POLITE) as process:
        process.send_signal(signum)
        output, errors = process.communicate()
        assert (process.returncode, output, errors) == (code, "saved\n", "")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ends_a_busy_process_at_once(first, second):
    with child(BUSY, "1000") as process:
        assert process.stdout
        process.send_signal(first)
        assert process.stdout.readline() == "noted\n"
        stop_by_a_second(process, second)
        _, errors = process.communicate()
        assert process.returncode == exit_code(second)
        assert errors == "\nstopped at once; the last checkpoint is kept\n"


def test_time_runs_out_for_a_busy_process():
    with child(BUSY, "0.2") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        assert process.returncode == 143
        assert errors == "\ncould not stop in time; the last checkpoint is kept\n"


def test_one_request_delivered_twice_is_one():
    with StopSignals() as stop:
        # What the kernel does when `timeout` signals both its child and the child's group.
        stop._write_end.send(bytes([signal.SIGTERM, signal.SIGTERM]))
    assert stop.requested == signal.SIGTERM


def test_handlers_and_threads_are_as_before():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with StopSignals() as stop:
        assert not stop.is_set()
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_an_exception_passes_through():
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    with StopSignals() as stop:
        assert stop.requested is None
