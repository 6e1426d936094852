"""Several seeds at once: each run is as if it had been alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counters import metrics_of
from test_fused import BATCH, SMALL

import starling
from starling.cli import main
from starling.errors import UserError
from starling.training import several_seeds
from starling.training.parallel_ppo import ParallelPPO
from starling.training.result import TrainResult

WAYS = ["train_in_threads", "train_in_step"]

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains seeds in one of the ways, whatever the device."""

    def train_some(way: str = WAYS[0], num_seeds: int = 3, **settings: Any) -> list[TrainResult]:
        monkeypatch.setattr(several_seeds, "train_in_threads", getattr(several_seeds, way))
        settings = {**SMALL, "seed": 5, "log_dir": str(tmp_path / way), **settings}
        return starling.train_seeds("CartPole-v1", num_seeds=num_seeds, quiet=True, **settings)

    return train_some


def params(run: str) -> np.ndarray:
    return np.array(starling.load(run).state.params)


@pytest.mark.parametrize("way", WAYS)
def test_each_seed_is_the_run_of_that_seed(way, train, tmp_path):
    results = train(way)
    assert [result.seed for result in results] == [5, 6, 7]
    assert len({result.run for result in results}) == 3
    for result in results:
        settings = {**SMALL, "seed": result.seed, "log_dir": str(tmp_path / "alone")}
        with ParallelPPO("CartPole-v1", **settings) as agent:
            alone = agent.train(quiet=True)
        assert (result.status, result.steps) == ("completed", alone.steps)
        np.testing.assert_allclose(params(result.run), params(alone.run), rtol=1e-4, atol=1e-5)
        for one, other in zip(metrics_of(result.run), metrics_of(alone.run), strict=True):
            for name in ("rollout/ep_rew_mean", "train/value_loss", "train/approx_kl"):
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)
        for file in ("episodes.csv", "config.json", "result.json", "checkpoints"):
            assert Path(result.run, file).exists()
        assert Path(result.run, "episodes.csv").read_text() == (
            Path(alone.run, "episodes.csv").read_text()
        )
        config = json.loads(Path(result.run, "config.json").read_text())
        assert config["seed"] == result.seed
        assert "num_seeds" not in config
    assert not np.allclose(params(results[0].run), params(results[1].run), atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_that_is_done_early_leaves_the_others_going(way, train):
    results = train(way, stop_return=21.0, timesteps=100 * BATCH, lr=1e-9, env_kwargs={})
    steps = [result.steps for result in results]
    reached = [result.status == "stop_return" for result in results]
    assert any(reached)
    assert len(set(steps)) > 1
    for result in results:
        last = starling.load(result.run)
        assert last.step == result.steps
        assert last.version == last.iteration == result.steps // BATCH
        assert np.isfinite(last.state.params).all()


@pytest.mark.parametrize("way", WAYS)
def test_all_seeds_stop_when_asked(way, train):
    answers = iter([False] * 4)
    results = train(way, stop=lambda: next(answers, True))
    assert {result.status for result in results} == {"stopped"}
    assert all(result.steps < SMALL["timesteps"] for result in results)
    assert all(Path(result.run, "result.json").exists() for result in results)


def test_a_seed_that_fails_ends_the_others(train, monkeypatch):
    trained = several_seeds.Trainer.conclude

    def fail(self: Any, learnt: Any) -> Any:
        if self.config.seed == 6 and self.agent.iteration == 1:
            raise RuntimeError("no more")
        return trained(self, learnt)

    monkeypatch.setattr(several_seeds.Trainer, "conclude", fail)
    with pytest.raises(RuntimeError, match="no more"):
        train(timesteps=10**9)


def test_environments_that_are_no_jax_are_refused(train):
    with pytest.raises(UserError, match="written in JAX, but backend serial"):
        train(backend="serial")
    with pytest.raises(UserError, match="num_seeds must be at least 1, not 0"):
        train(num_seeds=0)


def test_from_the_command_line(tmp_path, capsys):
    options = "--num_envs 4 --num_steps 16 --mini_batch_size 32 --timesteps 128 --preset none"
    words = ["train", "--env", "CartPole-v1", *options.split(), "--log_dir", str(tmp_path)]
    assert main([*words, "--num-seeds", "2", "--hidden_sizes", "8", "--quiet", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [(run["seed"], run["steps"], run["backend"]) for run in runs] == [
        (0, 128, "compiled"),
        (1, 128, "compiled"),
    ]
    assert main(["evaluate", runs[1]["run"], "--episodes", "2"]) == 0
    image = tmp_path / "both.png"
    assert main(["plot", *(run["run"] for run in runs), "--save_fig", str(image)]) == 0
    assert image.exists()
    assert main(["train", "--resume", runs[0]["run"], "--num_seeds", "2"]) == 2
    assert "resume each of the runs alone" in capsys.readouterr().err
