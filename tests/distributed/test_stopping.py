"""Runs that have a Ray of their own, stopped: saved, told in one line, nothing of Ray left."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from commands import Process, done, starling, stop, train, wait_for
from counters import check_counters, rows_of
from leaks import ends_within, living_in

from starling.storage.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


def train_on_ray(log_dir: Path) -> list[str]:
    """The words of a run with one worker."""
    words = ["--log_dir", str(log_dir), "--run_name", "run", "--num_workers", "1"]
    return train(*words, algo="distributed_ppo", backend="serial")


def wait_for_learning(process: Process, run: Path) -> None:
    """Waits until updates are reported that were not before."""
    metrics = run / "metrics.jsonl"
    wait_for(process, metrics, (metrics.stat().st_size if metrics.exists() else 0) + 1)


def test_an_interrupt_from_the_terminal_is_one_line_and_a_save(tmp_path):
    with starling(*train_on_ray(tmp_path)) as process:
        wait_for_learning(process, tmp_path / "run")
        assert len(living_in(process.pid)) > 5, "those of Ray are there, and are looked for"
        stop(process, signal.SIGINT, to_group=True)
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.step > 0
    assert checkpoint.step % rows_of(checkpoint.documents["config"]) == 0


@pytest.mark.slow
def test_all_of_ray_ends_with_a_run_that_is_killed(tmp_path):
    """Most of it at once, and in a minute what only notices that the head node is gone."""
    with starling(*train_on_ray(tmp_path)) as process:
        wait_for_learning(process, tmp_path / "run")
        processes = living_in(process.pid) - {process.pid}
        assert len(processes) > 5
        process.kill()
        assert all(ends_within(pid, 90.0) for pid in processes)


@pytest.mark.slow
@pytest.mark.usefixtures("no_leaks")
def test_stopped_again_and_again_and_resumed(tmp_path):
    run, steps = tmp_path / "run", 0
    for words, early, signum in [
        (train_on_ray(tmp_path), False, signal.SIGTERM),
        (["train", "--resume", str(run), "--quiet", "--json"], True, signal.SIGTERM),
        (["train", "--resume", str(run), "--quiet", "--json"], False, signal.SIGINT),
    ]:
        with starling(*words) as process:
            if early:
                time.sleep(4)  # while Ray or its workers start
            else:
                wait_for_learning(process, run)
            stop(process, signum, to_group=signum == signal.SIGINT)
        newest = load_checkpoint(run)
        assert newest.step > steps - early
        steps = newest.step
    more = steps + 5 * rows_of(newest.documents["config"])
    done("train", "--resume", str(run), "--timesteps", str(more), "--quiet")
    assert check_counters(run)["steps"] == more
