"""What the tests of faults rely on: leaks and wrong counters are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from counters import check_counters
from leaks import nothing_left

from starling.training.parallel_ppo import ParallelPPO


@contextmanager
def process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE):
        yield


@contextmanager
def thread() -> Iterator[None]:
    end = threading.Event()
    waiting = threading.Thread(target=end.wait)
    waiting.start()
    yield
    end.set()
    waiting.join()


@contextmanager
def descriptor() -> Iterator[None]:
    with open(os.devnull):
        yield


@contextmanager
def file_in(folder: str, prefix: str) -> Iterator[None]:
    descriptor, path = tempfile.mkstemp(prefix=prefix, dir=folder)
    os.close(descriptor)
    yield
    os.unlink(path)


LEAKS = {
    "children": process,
    "threads": thread,
    "descriptors .*/dev/null": descriptor,
    "shared_files": lambda: file_in("/dev/shm", "left-"),
    "temporary_files": lambda: file_in(tempfile.gettempdir(), "starling-"),
}


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and /dev/shm")
@pytest.mark.parametrize("what", LEAKS)
def test_what_is_left_is_found(what, monkeypatch):
    monkeypatch.setattr("leaks.PATIENCE", 0.1)
    leak = LEAKS[what]()
    with pytest.raises(AssertionError, match=what), nothing_left():
        leak.__enter__()
    leak.__exit__(None, None, None)
    with nothing_left(), LEAKS[what]():
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_descriptor_is_found_though_garbage_closes_another():
    others = [open(os.devnull) for _ in range(2)]  # noqa: SIM115
    left = []

    def leave_one():
        left.append(open(__file__))  # noqa: SIM115
        for other in others:
            other.close()

    with pytest.raises(AssertionError, match=r"descriptors .*test_leaks"), nothing_left():
        leave_one()
    left[0].close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 iterations of 64 steps, with more than 3 episodes."""
    settings = {"num_envs": 4, "num_steps": 16, "mini_batch_size": 64, "hidden_sizes": (8,)}
    files = {"tensorboard": False, "log_dir": str(tmp_path_factory.mktemp("logs"))}
    with ParallelPPO(
        "CartPole-v1", **settings, **files, backend="serial", preset="none", log_interval=1
    ) as agent:
        return Path(agent.train(4 * 64, quiet=True).run)


def lines_changed(change):
    def apply(file: Path) -> None:
        lines = file.read_text().splitlines(keepends=True)
        change(lines)
        file.write_text("".join(lines))

    return apply


def with_one_step_more(file: Path) -> None:
    result = json.loads(file.read_text())
    file.write_text(json.dumps({**result, "steps": result["steps"] + 64}))


@pytest.mark.parametrize(
    ("file", "mistake"),
    [
        ("metrics.jsonl", lines_changed(lambda lines: lines.pop(1))),
        ("metrics.jsonl", lines_changed(lambda lines: lines.pop())),
        ("metrics.jsonl", lines_changed(lambda lines: lines.append(lines[-1]))),
        ("metrics.jsonl", lines_changed(lambda lines: lines.reverse())),
        ("episodes.csv", lines_changed(lambda lines: lines.pop())),
        ("episodes.csv", lines_changed(lambda lines: lines.append(lines[-1]))),
        ("episodes.csv", lines_changed(lambda lines: lines.append(lines.pop(1)))),
        ("result.json", with_one_step_more),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_counters_that_are_wrong_are_found(run, file, mistake):
    assert check_counters(run)["episodes"] > 3
    whole = (run / file).read_bytes()
    mistake(run / file)
    try:
        with pytest.raises(AssertionError):
            check_counters(run)
    finally:
        (run / file).write_bytes(whole)
