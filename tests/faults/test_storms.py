"""Runs stopped or killed at whatever moment: saved or not begun, nothing left, all counted once."""

from __future__ import annotations

import functools
import random
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from commands import (
    ROWS,
    Process,
    activity,
    done,
    starling,
    stop,
    train,
    wait_for,
    wait_until_gone,
)
from counters import check_counters, check_replay, rows_of
from leaks import ends_within, living_in
from measured import record

from starling.storage.checkpoint import Checkpoint, load_checkpoint

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

ALGORITHMS = ["ppo", "async_ppo", "dqn", "async_dqn"]
# Beside rollouts, updates and saves there are evaluations to be stopped in.
WATCHED = ["--eval_interval", "2", "--eval_episodes", "4"]

HIT: Counter[str] = Counter()
"""How many runs were stopped or killed at what."""


def wait_for_report(process: Process, metrics: Path, size: int = 1) -> None:
    """Waits until the run has reported so much more than it had before it was resumed."""
    before = metrics.stat().st_size if metrics.exists() else 0
    wait_for(process, metrics, before + size)


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint, which was finished."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that one was passed over
        checkpoint = load_checkpoint(run, finite=["parameters"])
    assert checkpoint.step % rows_of(checkpoint.documents["config"]) == 0
    return checkpoint


def run_in(log_dir: Path) -> Path | None:
    """The run, if there is one; then it holds a checkpoint, and no other half."""
    runs = list(log_dir.iterdir())
    if not runs:
        return None
    (run,) = runs
    newest(run)
    assert not list(run.rglob(".tmp-*"))
    return run


few = functools.partial(pytest.param, marks=pytest.mark.timeout(120))
many = functools.partial(pytest.param, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize(
    ("algo", "early", "late"),
    [
        *(few("ppo", 2, 1), few("async_ppo", 2, 1), few("dqn", 1, 1), few("async_dqn", 0, 1)),
        *(many(algo, 25, 25) for algo in ALGORITHMS),
    ],
)
def test_stopped_at_random_moments_and_resumed(tmp_path, algo, early, late):
    """Early: importing, compiling, starting. Late: in a rollout, update, evaluation or save."""
    moments = random.Random(f"{algo} {early}")
    turns = ["early"] * early + ["late"] * late
    moments.shuffle(turns)
    logs, stack = tmp_path / "logs", tmp_path / "stack"
    logs.mkdir()
    run, stopped_at = None, []
    for turn in turns:
        new = train("--log_dir", str(logs), *WATCHED, algo=algo)
        words = ["train", "--resume", str(run), "--quiet", "--json"] if run else new
        with starling(*words, stack=stack) as process:
            if turn == "early":
                time.sleep(moments.uniform(0, 2))  # the moment is what is tested
            else:
                name = run.name if run else f"CartPole-v1__{algo}__s0"
                wait_for_report(process, logs / name / "metrics.jsonl")
                time.sleep(moments.uniform(0, 0.2))
            HIT[activity(process, stack)] += 1
            stop(process, moments.choice([signal.SIGINT, signal.SIGTERM]))
        run = run_in(logs)
        stopped_at.append(load_checkpoint(run).step if run else 0)
    assert run
    assert stopped_at == sorted(stopped_at)
    assert len(set(stopped_at)) >= late  # each of those made some way
    finish(run)
    record("stopped", algo=algo, times=len(turns))


def finish(run: Path, *options: str) -> None:
    """Goes on with a run for a little, to its end."""
    steps = load_checkpoint(run).step + 5 * ROWS
    done("train", "--resume", str(run), "--timesteps", str(steps), "--quiet", *options)
    result = check_counters(run)
    assert result["steps"] == steps
    if result["algo"].endswith("dqn"):
        check_replay(run)


@pytest.mark.parametrize(
    ("algo", "kills"),
    [
        *(few(algo, 1) for algo in ("ppo", "async_ppo", "dqn")),
        *(many(algo, 20) for algo in ALGORITHMS),
    ],
)
def test_a_killed_run_leaves_no_worker_and_goes_on(tmp_path, algo, kills):
    """Most of its time goes into saving, and so do most of the kills."""
    moments = random.Random(f"{algo} {kills}")
    stack, run = tmp_path / "stack", tmp_path / "logs" / f"CartPole-v1__{algo}__s0"
    words = train("--log_dir", str(tmp_path / "logs"), *WATCHED, algo=algo)
    steps = 0
    for _ in range(kills):
        with starling(*words, stack=stack) as process:
            wait_for_report(process, run / "metrics.jsonl", size=4000)  # some iterations
            time.sleep(moments.uniform(0, 0.2))  # the moment is what is tested
            HIT[activity(process, stack)] += 1
            workers = living_in(process.pid) - {process.pid}
            assert len(workers) >= 2, "those to train on; there may be others to evaluate on"
            process.kill()
            assert all(ends_within(pid, 3.0) for pid in workers)
        assert newest(run).step > steps
        steps = newest(run).step
        words = ["train", "--resume", str(run), "--quiet"]
    finish(run, "--backend", "serial", "--device", "cpu")
    record("killed", algo=algo, times=kills)


@pytest.mark.slow
def test_the_storms_above_met_runs_at_different_things():
    if HIT.total() < 200:
        pytest.skip("not all of them were run")
    record("activities", **HIT)
    assert len(HIT) >= 6, HIT


HANGING = """
import subprocess
import threading
from pathlib import Path
import gymnasium as gym

class Env(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        if self.steps > 50:
            if IN_A_GROUP_OF_ITS_OWN:
                subprocess.Popen(["sleep", "1000"])
            Path("hangs").write_text("now")
            threading.Event().wait()
        return self.observation_space.sample(), 1.0, False, False, {}
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", ["serial", "process"])
def test_time_runs_out_for_a_run_whose_environment_hangs(tmp_path, backend):
    in_group = f"IN_A_GROUP_OF_ITS_OWN = {backend == 'process'}\n"  # which ends with its worker
    (tmp_path / "hanging.py").write_text(in_group + HANGING)
    words = train("--grace_seconds", "0.5", "--run_name", "run", env="hanging:Env", backend=backend)
    with starling(*words, folder=tmp_path) as process:
        wait_for(process, tmp_path / "hangs")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        assert process.returncode == 143
        assert errors == "\ncould not stop in time; what was saved is kept\n"
        wait_until_gone(process)
    assert load_checkpoint(tmp_path / "logs" / "run").step == 50 // 16 * ROWS
