"""Whole runs on a full disk, with a clock that jumps, beside each other, and without a fork."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import ROWS, done, starling, train, wait_for, wait_until_gone
from counters import check_counters, check_replay, metrics_of
from envs_for_tests import CountingEnv

import starling as package
from starling.cli import main
from starling.envs.process import ProcessVectorEnv
from starling.errors import UserError
from starling.storage.checkpoint import load_checkpoint, save_checkpoint
from starling.training.async_ppo import AsyncPPO
from starling.training.parallel_ppo import ParallelPPO
from starling.training.trainer import Iteration

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]
SMALL: dict[str, Any] = {
    "num_envs": 4,
    "num_steps": 16,
    "mini_batch_size": 64,
    "epochs": 1,
    "hidden_sizes": (8,),
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "log_interval": 1,
    "save_interval": 1,
}


# --- a full disk, and other limits -------------------------------------------------------------

# Files of at most 16 KB stand for a disk that is full: enough for metrics, not for weights or a
# replay.
FULL_DISK = """
import json, logging, resource, sys
import starling
from starling.storage.checkpoint import load_checkpoint

logging.basicConfig(format="%(levelname)s %(message)s")
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
settings = json.loads(sys.argv[3])
rows = settings["num_envs"] * settings["num_steps"]

def fill_and_make_room(it):
    if it.iteration == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, unlimited[1]))
    if it.iteration == 4:
        assert load_checkpoint(it.agent.run).step == 2 * rows
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    if it.iteration == 5:
        assert load_checkpoint(it.agent.run).step == 5 * rows

trainer = getattr(starling, sys.argv[2])
with trainer("CartPole-v1", **settings, log_dir=sys.argv[1], run_name="run") as agent:
    result = agent.train(6 * rows, callbacks=fill_and_make_room, quiet=True)
print(result.status)
"""


@pytest.mark.parametrize("trainer", ["ParallelPPO", "DQN"])
def test_a_disk_that_is_full_for_a_while_costs_its_checkpoints_only(tmp_path, trainer):
    settings = SMALL | {"hidden_sizes": (64, 64)}
    if trainer == "DQN":  # whose replay alone is too large
        settings = {name: value for name, value in SMALL.items() if name != "epochs"}
        settings |= {"num_steps": 64, "learning_starts": 256}
    rows = settings["num_envs"] * settings["num_steps"]
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path, trainer, json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "completed\n"), ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    assert len(told) == 2
    for line, step in zip(told, (3 * rows, 4 * rows), strict=True):
        assert f"the checkpoint of step {step} was not saved" in line
        assert "File too large; the ones before it are intact; the next save tries again" in line
    failed = [line.get("faults/failed_saves") for line in metrics_of(tmp_path / "run")]
    assert failed == [None, None, None, 1, 2, 2]
    assert check_counters(tmp_path / "run")["steps"] == 6 * rows
    if trainer == "DQN":
        check_replay(tmp_path / "run")
        sizes = {x.name: x.stat().st_size for x in (tmp_path / "run").rglob("*.safetensors")}
        assert [name for name, size in sizes.items() if size > 16384] == ["replay.safetensors"]


# The command under such a limit from its beginning.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from starling.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("room", "code", "message"),
    [
        (4096, 1, "its last checkpoint could not be saved in"),
        (16, 2, "config.json cannot be written (File too large): make room"),
    ],
)
def test_a_disk_that_is_full_to_the_end_is_told_in_one_line(tmp_path, room, code, message):
    options = ["--timesteps", str(2 * ROWS), "--save_interval", "0", "--hidden_sizes", "64"]
    words = train(*options, "--log_dir", str(tmp_path), backend="serial")
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("starling: error: ")]
    assert message in line
    assert bool(list(tmp_path.iterdir())) == (room > 16)  # no half run


def test_a_thousand_environments_fit_under_a_low_limit_of_file_descriptors():
    """Descriptors go by workers; too many of those are refused before one is started."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with pytest.raises(UserError, match=r"200 worker processes need 416 .* of the 256 allowed"):
            ProcessVectorEnv([CountingEnv] * 1000, num_workers=200)
        envs = ProcessVectorEnv([CountingEnv] * 1000, num_workers=2)
        envs.reset()
        observations, *_ = envs.step(np.zeros(1000, int))
        np.testing.assert_array_equal(observations, [[1, 1]] * 1000)
        envs.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- the clock ---------------------------------------------------------------------------------


@pytest.fixture
def set_back(monkeypatch):
    """A callback that sets the clock back by an hour after the first iteration."""
    real = time.time

    def callback(it: Iteration) -> None:
        if it.iteration == 1:
            monkeypatch.setattr(time, "time", lambda: real() - 3600)

    return callback


def test_a_clock_that_is_set_back_by_an_hour_changes_no_duration(
    tmp_path, monkeypatch, capfd, set_back
):
    monkeypatch.setattr("starling.reporting.progress._LINE_INTERVAL", 0.0)
    with ParallelPPO("CartPole-v1", **SMALL, log_dir=str(tmp_path)) as agent:
        result = agent.train(6 * ROWS, callbacks=set_back)
    told = metrics_of(Path(result.run))
    elapsed = [line["time/time_elapsed"] for line in told]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] > 0
    assert all(line["time/fps"] > 0 for line in told)
    assert result.wall_time_s >= elapsed[-1]
    left = re.findall(r"steps/s \| (\S+) left", capfd.readouterr().err)
    assert len(left) > 4
    assert all(re.fullmatch(r"0:\d\d:\d\d", duration) for duration in left)
    check_counters(Path(result.run))


def test_a_clock_that_is_set_back_by_an_hour_makes_no_run_longer(tmp_path, set_back):
    settings = {**SMALL, "timesteps": 10**9, "max_time": 0.5, "log_dir": str(tmp_path)}
    with ParallelPPO("CartPole-v1", **settings) as agent:
        assert agent.train(callbacks=set_back, quiet=True).status == "max_time"


def test_the_clock_that_can_be_set_serves_for_dates_only():
    """As TensorBoard wants them; durations and deadlines are for the monotonic clock."""
    for file in sorted(Path(package.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text())
        dates = {
            id(keyword.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for keyword in node.keywords
            if keyword.arg == "wall_time"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "time"):
                assert id(node) in dates, f"{file}:{node.lineno}"
            assert not (isinstance(node, ast.ImportFrom) and node.module == "time")


# --- several at once ---------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_two_runs_at_once_get_folders_of_their_own_and_keep_them(tmp_path, capfd):
    words = train("--log_dir", str(tmp_path), backend="serial")
    folders = [tmp_path / name for name in ("CartPole-v1__ppo__s0", "CartPole-v1__ppo__s0__2")]
    with starling(*words) as one, starling(*words) as other:
        for folder in folders:
            wait_for(one, folder / "metrics.jsonl", size=2000)
        assert set(tmp_path.iterdir()) == set(folders)
        for folder in folders:
            assert main(["train", "--resume", str(folder), "--timesteps", "2_000_000_000"]) == 2
            told = capfd.readouterr().err
            owner = one.pid if f"process {one.pid} " in told else other.pid
            assert told.startswith(f"starling: error: {folder} is in use by process {owner} on ")
            assert told.count("\n") == 1
        for process in (one, other):
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate()
            assert process.returncode == 143, errors
            wait_until_gone(process)
    for folder in folders:
        check_counters(folder)


# --- environments that do as they like ---------------------------------------------------------

UNRULY = """
import os, signal, sys, tempfile, threading
import gymnasium as gym

class Env(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def __init__(self, daemon):
        self.daemon = daemon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: print("ignored"))
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        print("o" * 3000, flush=True)
        print("e" * 3000, file=sys.stderr)
        if self.steps == 20:
            os.chdir(tempfile.gettempdir())
            threading.Thread(target=threading.Event().wait, daemon=self.daemon).start()
        return self.observation_space.sample(), 1.0, self.steps % 10 == 0, False, {}

    def close(self):
        print("closed")
"""


@pytest.mark.parametrize("backend", ["serial", "process"])
def test_an_environment_that_prints_and_changes_its_process_is_put_up_with(tmp_path, backend):
    """It also changes the current folder, takes the signals, and starts threads that never end."""
    (tmp_path / "unruly.py").write_text(UNRULY)
    daemon = "true" if backend == "serial" else "false"  # this process has to end, too
    options = ["--env_kwargs", f'{{"daemon": {daemon}}}', "--timesteps", str(4 * ROWS)]
    words = train(*options, "--log_dir", "logs", env="unruly:Env", backend=backend)
    said = done(*words, folder=tmp_path).splitlines()
    assert backend == "serial" or len(said) == 1  # what workers print goes to standard error
    result = json.loads(said[-1])
    assert (result["status"], result["episodes"]) == ("completed", 4 * 6)
    (run,) = (tmp_path / "logs").iterdir()
    assert str(run) == result["run"]
    check_counters(run)


# --- no fork -----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing can be forked here")
@pytest.mark.parametrize("trainer", [ParallelPPO, AsyncPPO])
def test_nothing_is_forked_once_jax_runs(tmp_path, monkeypatch, trainer):
    """Forked copies of a process with JAX's threads hang; workers are programs of their own."""

    def refuse() -> int:
        raise AssertionError("forked")

    jax.devices()
    for name in ("fork", "forkpty"):
        monkeypatch.setattr(os, name, refuse)
    settings = {**SMALL, "backend": "process", "num_workers": 2, "eval_interval": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # JAX's, of forks that bypass Python
        with trainer("CartPole-v1", **settings, eval_episodes=2, log_dir=str(tmp_path)) as agent:
            result = agent.train(2 * ROWS, quiet=True)
            assert agent.envs.backend == "process"
            assert agent.evaluate(episodes=2).episodes == 2
        with trainer(resume=result.run) as agent:
            assert agent.train(4 * ROWS, quiet=True).steps == 4 * ROWS
    check_counters(Path(result.run))


# --- what cannot be gone on from ---------------------------------------------------------------


@pytest.mark.parametrize("group", ["parameters", "training"])
def test_a_checkpoint_with_nan_is_passed_over_when_a_run_is_resumed(tmp_path, group):
    with ParallelPPO("CartPole-v1", **SMALL, log_dir=str(tmp_path)) as agent:
        run = Path(agent.train(2 * ROWS, quiet=True).run)
    newest = load_checkpoint(run)
    floats = [x for x in newest.arrays[group].values() if x.dtype == np.float32 and x.size > 1]
    floats[0][:] = np.nan
    folder = run / "checkpoints"
    save_checkpoint(folder, newest.step, newest.arrays, newest.documents, newest.counters)
    with pytest.warns(RuntimeWarning, match=f"{group}.safetensors holds a .* with NaN or inf"):
        agent = ParallelPPO(resume=run, timesteps=4 * ROWS)
    with agent:
        assert agent.step == ROWS
        agent.train(quiet=True)
    assert check_counters(run)["steps"] == 4 * ROWS
