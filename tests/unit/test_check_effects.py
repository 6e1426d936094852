"""What an environment does to the process that it runs in is found, and undone."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import threading
from typing import Any

import numpy as np
import pytest
from faulty_envs import Walk, check, faults, global_seed, walk

pytestmark = pytest.mark.timeout(60)


def test_printing_is_found(capfd):
    def prints(self: Walk) -> np.ndarray:
        print("hello")
        return self.np_random.normal(size=2)

    def writes(self: Walk) -> np.ndarray:
        os.write(1, b"from C\n")
        return self.np_random.normal(size=2)

    for start, line in ((prints, "hello"), (writes, "from C")):
        (finding,) = faults(walk(start=start))
        assert (finding.level, finding.name) == ("warning", "prints")
        assert repr(line) in finding.message
    os.write(1, b"afterwards\n")
    shown = capfd.readouterr().out
    assert "afterwards" in shown
    assert "from C" not in shown


def test_a_change_of_the_folder_is_found_and_undone(tmp_path):
    def start(self: Walk) -> np.ndarray:
        os.chdir(tmp_path)
        return self.np_random.normal(size=2)

    before = os.getcwd()
    (finding,) = faults(walk(start=start))
    assert (finding.level, finding.name) == ("warning", "changes-directory")
    assert str(tmp_path) in finding.message
    assert os.getcwd() == before


def test_signal_handlers_are_found_and_put_back():
    before = signal.getsignal(signal.SIGTERM)

    def init(self: Walk) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)

    (finding,) = faults(walk(__init__=init))
    assert (finding.level, finding.name) == ("warning", "signal-handler")
    assert "SIGTERM" in finding.message
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_callers_random_numbers_go_on():
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = np.random.random(), random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    check(walk(start=global_seed))
    assert (np.random.random(), random.random()) == expected  # noqa: NPY002


@pytest.mark.usefixtures("no_leaks")
def test_what_stays_behind_is_found(monkeypatch):
    monkeypatch.setattr("starling.envs.checks._PATIENCE", 0.01)
    done = threading.Event()
    held: list[Any] = []

    def thread(self: Walk) -> None:
        held.append(threading.Thread(target=done.wait))
        held[-1].start()

    def file(self: Walk) -> None:
        held.append(open(os.devnull))  # noqa: SIM115

    def process(self: Walk) -> None:
        held.append(subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL))

    try:
        for init, what in ((thread, "threads"), (file, "open files"), (process, "child processes")):
            found = faults(walk(__init__=init), steps=2)
            (finding,) = (finding for finding in found if finding.name == "leftovers")
            assert finding.level == "warning"
            assert finding.message.startswith(f"1 {what} stay behind")
    finally:
        done.set()
        for thing in held:
            if isinstance(thing, subprocess.Popen):
                thing.kill()
                thing.wait()
            elif isinstance(thing, threading.Thread):
                thing.join()
            else:
                thing.close()


@pytest.mark.usefixtures("no_leaks")
def test_what_close_ends_in_a_moment_is_not_left_behind():
    def init(self: Walk) -> None:
        self.done = threading.Event()
        threading.Thread(target=self.done.wait).start()

    assert faults(walk(__init__=init, close=lambda self: self.done.set())) == []


def test_growing_memory_is_found():
    kept: list[mmap.mmap] = []

    def leaks(self: Walk) -> float:
        kept.append(
            mmap.mmap(-1, 2**17)
        )  # never from what the process has free, as an array may be
        kept[-1].write(b"x" * 2**17)
        return 1.0

    (finding,) = faults(walk(reward=leaks), steps=100)
    assert (finding.level, finding.name) == ("warning", "memory-grows")
    assert 100 < int(finding.message.split()[3]) < 170
    for block in kept:
        block.close()
    assert faults(walk(reward=lambda self: float(np.ones(2**14)[0])), steps=100) == []
