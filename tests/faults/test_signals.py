"""Stop signals: one is a flag, a second ends the process, also while it cannot listen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import ROWS, starling, train, wait_for, wait_until_gone
from leaks import living_in

from starling.storage.checkpoint import load_checkpoint
from starling.training.signals import StopSignals, exit_code

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("no_leaks"),
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
        assert errors == "\nstopped at once; what was saved is kept\n"


def test_time_runs_out_for_a_busy_process():
    with child(BUSY, "0.2") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        assert process.returncode == 143
        assert errors == "\ncould not stop in time; what was saved is kept\n"


@pytest.fixture
def handlers():
    """Puts the handlers back: a process that was asked to stop ignores further signals."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("handlers")
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


# --- a whole run; test_storms.py stops more of them ------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


# Whoever is first to come to the gate waits there until it is opened, once.
GATED = """
import contextlib, traceback
import gymnasium as gym

def wait_at_gate():
    with contextlib.suppress(FileExistsError):
        with open("waits", "x") as file:
            file.write("now")
        with open("gate") as gate:
            gate.read()

class Env(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if WHERE == "reset":
            wait_at_gate()
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}

def before_a_program_is_compiled(event, **_):
    callers = [frame.f_code.co_name for frame, _ in traceback.walk_stack(None)]
    if event == "/jax/compilation_cache/compile_requests_use_cache" and WHERE in callers:
        wait_at_gate()

if WHERE != "reset":
    import jax
    jax.monitoring.register_event_listener(before_a_program_is_compiled)
"""


def steps_when_stopped_at_the_gate(folder: Path, where: str, signum: int, backend: str) -> int:
    (folder / "gated.py").write_text(f"WHERE = {where!r}{GATED}")
    os.mkfifo(folder / "gate")
    words = train("--run_name", "run", env="gated:Env", backend=backend)
    with starling(*words, folder=folder) as process:
        wait_for(process, folder / "waits")
        for pid in living_in(process.pid):  # the workers, too: batch systems signal all there is
            os.kill(pid, signum)
        (folder / "gate").write_text("")
        output, errors = process.communicate()
        assert (process.returncode, errors) == (exit_code(signum), "")
        wait_until_gone(process)
    result = json.loads(output)
    assert (result["status"], result["steps"]) == ("stopped", load_checkpoint(result["run"]).step)
    return result["steps"]


@linux_only
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("signum", "backend"), [(signal.SIGINT, "serial"), (signal.SIGTERM, "process")]
)
def test_a_run_is_stopped_in_its_first_reset(tmp_path, signum, backend):
    assert steps_when_stopped_at_the_gate(tmp_path, "reset", signum, backend) == 0


@linux_only
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("signum", "where", "steps"),
    [(signal.SIGINT, "collect", 0), (signal.SIGTERM, "update", ROWS)],
)
def test_a_run_is_stopped_while_it_compiles(tmp_path, signum, where, steps):
    """What it needed the program for is done; nothing after it is."""
    assert steps_when_stopped_at_the_gate(tmp_path, where, signum, "serial") == steps


@linux_only
@pytest.mark.timeout(120)
def test_a_second_interrupt_leaves_no_worker(tmp_path):
    with starling(*train("--log_dir", str(tmp_path), "--run_name", "run")) as process:
        wait_for(process, tmp_path / "run" / "metrics.jsonl", size=2000)
        assert len(living_in(process.pid)) == 3
        # To the whole group, as a terminal does.
        while process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.11)
        _, errors = process.communicate()
        assert process.returncode == 130, errors
        wait_until_gone(process)
    assert "Traceback" not in errors
