"""What a user can get wrong: one sentence, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from starling.cli import main

pytestmark = pytest.mark.usefixtures("no_leaks")

ENVIRONMENTS = """
import os
import gymnasium as gym
import numpy as np

class Env(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, space=None, render_mode=None):
        size = int(os.environ.get("OBSERVATION_SIZE", 3))
        self.observation_space = space or gym.spaces.Box(-1, 1, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return self.observation_space.sample(), {}

    def step(self, action):
        self.left -= 1
        return self.observation_space.sample(), 1.0, self.left == 0, False, {}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)

def with_text():
    return Env(space=gym.spaces.Text(5))

def with_raising_init():
    raise RuntimeError("the simulator is not installed")
"""

TRAIN = ["train", "--env", "CartPole-v1"]
SMALL = ["--num_envs", "2", "--num_steps", "16", "--mini_batch_size", "32", "--timesteps", "32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of an environment of the user's own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "own_environments.py").write_text(ENVIRONMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        train = ["train", "--env", "own_environments:Env", "--backend", "serial", "--quiet"]
        assert main([*train, *SMALL, "--log_dir", str(folder), "--run_name", "run"]) == 0
        yield folder / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"  # says who used the run last
    }


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs a command that must be refused, in an empty folder that must stay so."""
    monkeypatch.chdir(tmp_path)

    def check(arguments, words, unchanged=tmp_path, notices=0):
        before = content(unchanged)
        folders = set(unchanged.rglob("*"))
        assert main(arguments) == 2
        told = capfd.readouterr()
        lines = [line for line in told.err.splitlines() if not line.startswith("starling: backend")]
        assert len(lines) == 1 + notices, told.err
        assert lines[-1].startswith("starling: error: ")
        assert re.search(words, lines[-1]), lines[-1]
        assert told.out == ""
        assert content(unchanged) == before
        assert set(unchanged.rglob("*")) == folders

    return check


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("def make(:", "SyntaxError: invalid syntax"),
        ("None.display", r"AttributeError: 'NoneType' .* \(at torn\.py:1\)"),
        ("raise SystemExit('usage: torn FILE')", "SystemExit: usage: torn FILE"),
    ],
)
def test_a_module_whose_import_fails(refused, tmp_path, monkeypatch, line, words):
    (tmp_path / "torn.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for command in ("train", "tune"):
        refused([command, "--env", "torn:make"], f"env 'torn:make': importing it failed: {words}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # names
        (["tarin"], "unknown command 'tarin': did you mean train"),
        (["train"], "env is missing"),
        (["train", "--env", "CartPol-v1"], "'CartPol-v1'.*did you mean CartPole-v1"),
        (["train", "--env", "nowhere:Env"], "no module 'nowhere'"),
        (["train", "--env", "json:Env"], "'json' has no 'Env'"),
        ([*TRAIN, "--algo", "pppo"], "unknown algo 'pppo': did you mean ppo"),
        ([*TRAIN, "--algo", "nowhere:Trainer"], "'nowhere:Trainer' cannot be imported"),
        ([*TRAIN, "--backend", "proces"], "unknown backend 'proces': did you mean process"),
        ([*TRAIN, "--backend", "nowhere:Envs"], "'nowhere:Envs' cannot be imported"),
        ([*TRAIN, "--preset", "Cartpole-v1x"], "unknown preset.*did you mean CartPole-v1"),
        ([*TRAIN, "--preset", "mine.toml"], r"preset mine\.toml cannot be read"),
        ([*TRAIN, "--activation", "rely"], "unknown activation 'rely': did you mean relu"),
        # options
        ([*TRAIN, "--num_env", "3"], "unknown option --num_env: did you mean --num_envs"),
        ([*TRAIN, "--n-steps", "3"], "unknown option --n-steps: Starling calls it --num_steps"),
        ([*TRAIN, "--batch_size=3"], "--batch_size: Starling calls it --mini_batch_size"),
        ([*TRAIN, "--ent-coef", "0"], "--ent-coef: Starling calls it --entropy_coef"),
        ([*TRAIN, "--lr"], "--lr: expected one argument"),
        ([*TRAIN, "--lr", "fast"], "lr must be a number, not fast"),
        ([*TRAIN, "stray"], "unexpected argument 'stray'"),
        ([*TRAIN, "--env_kwargs", "{"], "env_kwargs must be a JSON object"),
        ([*TRAIN, "--env_kwargs", '{"gravity": 1}'], "CartPole-v1 takes no argument 'gravity'"),
        # numbers
        ([*TRAIN, "--num_envs", "0"], "num_envs must be at least 1, not 0"),
        ([*TRAIN, "--num_envs", "-1"], "num_envs must be at least 1, not -1"),
        ([*TRAIN, "--num_envs", "1.5"], "num_envs must be a whole number, not 1.5"),
        ([*TRAIN, "--num_steps", "0"], "num_steps must be at least 1"),
        (
            [*TRAIN, "--mini_batch_size", "100"],
            "mini_batch_size 100 does not divide num_envs x num_steps = 8 x 64 = 512: use 64 or",
        ),
        ([*TRAIN, "--num_envs", "5"], "mini_batch_size 128 does not divide .* 320: use 80 or 160"),
        (
            [*TRAIN, "--timesteps", "100"],
            "timesteps 100 is shorter than one rollout, .* 8 x 64 = 512: use .* at least 512",
        ),
        ([*TRAIN, "--lr", "0"], "lr must be above 0"),
        ([*TRAIN, "--gamma", "1.5"], r"gamma must be in \[0, 1\]"),
        ([*TRAIN, "--seed", "-1"], "seed must be at least 0"),
        ([*TRAIN, "--grace_seconds", "0"], "grace_seconds must be above 0 and .* 86400, not 0"),
        ([*TRAIN, "--grace_seconds", "inf"], "grace_seconds must be above 0 .*, not inf"),
        ([*TRAIN, "--grace_seconds", "nan"], "grace_seconds must be above 0 .*, not nan"),
        ([*TRAIN, "--grace_seconds", "soon"], "grace_seconds: invalid float value: 'soon'"),
        # things that do not go together, or are not there
        ([*TRAIN, "--exact_resume", "--backend", "envpool"], "exact_resume does not go with"),
        ([*TRAIN, "--exact_resume", "--backend", "compiled"], "exact_resume does not go with"),
        ([*TRAIN, "--device", "tpuu"], "unknown device 'tpuu'"),
        ([*TRAIN, "--device", "cpu:99"], "unknown device|no device cpu:99"),
        ([*TRAIN, "--device", "tpu:99"], "no device tpu:99 here: .* cpu"),
        ([*TRAIN, "--run_name", "../escape"], "no name of a folder"),
        # runs
        (["train", "--resume", "nothing"], "nothing is no run folder"),
        (["evaluate", "nothing"], "nothing is no run folder"),
        (["evaluate", "."], "no run folder: it has no config.json"),
        (["evaluate"], "required: RUN"),
        (["play", "nothing", "--video", "a.mp4"], "nothing is no run folder"),
        (["play", "nothing", "--video", "a.txt"], r"end it in \.mp4 or \.gif"),
        (["plot", "nothing"], "nothing does not exist"),
        (["plot"], "required: RUN"),
        (["presets", "--algo", "pppo"], "unknown algo 'pppo'"),
        (["backends", "--all"], "unknown option --all"),
        (["bench"], "bench env or bench train"),
        (["bench", "envs"], "unknown benchmark 'envs': did you mean env"),
        (["bench", "env"], "env is missing"),
        (["bench", "env", "--env", "CartPol-v1"], "did you mean CartPole-v1"),
        (["bench", "env", "--env", "CartPole-v1", "--num_envs", "0"], "num_envs"),
        (["bench", "env", "--env", "CartPole-v1", "--seconds", "0"], "seconds must be above 0"),
        (["bench", "env", "--env", "CartPole-v1", "--backend", "proces"], "did you mean process"),
        (["bench", "train"], "env is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_in_one_line(refused, arguments, words):
    refused(arguments, words)


def test_space_that_cannot_be_handled(refused, tmp_path, monkeypatch):
    (tmp_path / "text_environment.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    env = "text_environment:with_text"
    refused(["train", "--env", env, "--backend", "serial"], "the space Text")


def test_log_dir_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [*TRAIN, *SMALL, "--log_dir", "file/logs"]
    refused(arguments, "log_dir 'file/logs' cannot be written to", notices=1)  # what it begins


def test_missing_extra(refused, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "wandb" else find_spec(name, *rest),
    )
    refused([*TRAIN, "--wandb_project", "x"], r"pip install 'starling-rl\[wandb\]'")


def test_missing_extra_for_an_environment(refused):
    if importlib.util.find_spec("ale_py"):
        pytest.skip("ale-py is installed here")
    refused(["train", "--env", "ALE/Pong-v5"], r"pip install 'starling-rl\[atari\]'")


def test_no_display(refused, trained, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    refused(["play", str(trained)], "no display .* --video")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--resume", "RUN"], "done with its 32 timesteps: ask for more with --timesteps"),
        (["train", "--resume", "RUN", "--lr", "1"], r"made with lr 0\.0003, not 1\.0: leave"),
        (["train", "--resume", "RUN", "--env", "X"], "made with env own_environments:Env, not X"),
        (["train", "--resume", "RUN", "--algo", "a2c"], "made with algo ppo, not a2c"),
        (["train", "--resume", "RUN", "--n_envs", "3"], "Starling calls it --num_envs"),
        (["evaluate", "RUN", "--checkpoint", "best"], "holds no best checkpoint"),
        (["evaluate", "RUN", "--checkpoint", "first"], "invalid choice: 'first'"),
        (["evaluate", "RUN", "--episodes", "0"], "episodes must be at least 1, not 0"),
        (["evaluate", "RUN", "--episodes", "x"], "invalid int value: 'x'"),
        (["evaluate", "RUN", "--seed", "-1"], "seed must be at least 0"),
        (["evaluate", "RUN", "--grace-seconds", "-3"], "grace_seconds must be above 0"),
        (["play", "RUN", "--grace_seconds", "1e9", "--video", "a.mp4"], "at most 86400"),
        (["plot", "RUN", "--window", "0"], "window must be at least 1"),
        (["plot", "RUN", "--save_fig", "curve.doc"], "no ending of an image"),
        (["play", "RUN", "--episodes", "0", "--video", "a.mp4"], "episodes must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_run_that_cannot_be_used_like_this(refused, trained, arguments, words):
    refused([str(trained) if word == "RUN" else word for word in arguments], words, trained)


@pytest.mark.parametrize("command", ["evaluate", "play", "train"])
def test_checkpoint_that_does_not_fit_the_environment(refused, trained, monkeypatch, command):
    monkeypatch.setenv("OBSERVATION_SIZE", "4")
    arguments = {
        "evaluate": ["evaluate", str(trained)],
        "play": ["play", str(trained), "--video", "a.mp4"],
        "train": ["train", "--resume", str(trained), "--timesteps", "64"],
    }
    refused(arguments[command], "does not fit", trained)


def test_damaged_checkpoint(refused, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (weights,) = run.glob("checkpoints/step_*/parameters.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(["evaluate", str(run)], "parameters.safetensors is damaged", run)


def test_run_without_a_checkpoint(refused, trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / "config.json").write_bytes((trained / "config.json").read_bytes())
    for command in (["evaluate", str(run)], ["train", "--resume", str(run)]):
        refused(command, "holds no checkpoint", run)
    refused(["plot", str(run)], "no episode has ended", run)


def test_environment_that_cannot_be_made_shows_its_own_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "broken_environment.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    env = "broken_environment:with_raising_init"
    assert main(["train", "--env", env, "--backend", "serial"]) == 1
    told = capfd.readouterr().err
    assert told.splitlines()[0].startswith("starling: error: ")
    assert "in with_raising_init" in told
    assert "RuntimeError: the simulator is not installed" in told
    assert not (tmp_path / "logs").exists()
