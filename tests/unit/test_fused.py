"""Whole iterations in one program: the same as one by one, and Python is there when needed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from counters import metrics_of

from starling.envs.make import make_vec
from starling.training.compiled_collector import CompiledCollector
from starling.training.fused import FusedLearner
from starling.training.parallel_ppo import ParallelPPO

N, T = 4, 16
BATCH = N * T
SMALL: dict[str, Any] = {
    "num_envs": N,
    "num_steps": T,
    "mini_batch_size": 32,
    "epochs": 2,
    "hidden_sizes": (8,),
    "lr": 3e-3,
    "lr_schedule": "linear",
    "normalize_observations": True,
    "normalize_rewards": True,
    "preset": "none",
    "backend": "compiled",
    "tensorboard": False,
    "timesteps": 12 * BATCH,
    "log_interval": 4,
    "env_kwargs": {"max_episode_steps": 12},
}


def one_by_one(agent: ParallelPPO) -> CompiledCollector:
    """A collector with which the trainer collects and updates in two programs."""
    return CompiledCollector(agent.envs, T, agent.algorithm, agent.device)


@pytest.fixture
def make(tmp_path, shared_programs, closed_at_the_end):
    """Makes agents that are closed in the end."""

    def make_agent(env: Any = "CartPole-v1", **settings: Any) -> ParallelPPO:
        if "resume" not in settings:
            settings = {**SMALL, "log_dir": str(tmp_path), **settings}
        return closed_at_the_end(ParallelPPO(env, **settings))

    return make_agent


@pytest.fixture
def patient(monkeypatch):
    """Lets every call make as many iterations as it may, whatever they take."""
    monkeypatch.setattr("starling.training.fused._LONGEST_CALL", 1e6)


def calls(monkeypatch) -> list[int]:
    """How many iterations each call made, once there were some."""
    made: list[int] = []
    learn = FusedLearner.learn

    def noted(self: FusedLearner, *arguments: Any) -> Any:
        learnt = learn(self, *arguments)
        made.append(len(learnt))
        return learnt

    monkeypatch.setattr(FusedLearner, "learn", noted)
    return made


def episodes(agent: ParallelPPO) -> str:
    assert agent.run is not None
    return (agent.run / "episodes.csv").read_text()


def assert_close(a: ParallelPPO, b: ParallelPPO) -> None:
    """The same results; bit for bit here, to float32 rounding in general."""
    assert (a.step, a.iteration, a.version) == (b.step, b.iteration, b.version)
    assert a.sampler.next_table == b.sampler.next_table
    one, other = (jax.tree.map(np.asarray, x.state._replace(key=0)) for x in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, other)
    assert episodes(a) == episodes(b)
    for x, y in zip(metrics_of(a.run), metrics_of(b.run), strict=True):
        for name in x.keys() & y.keys():
            if not name.startswith(("perf/", "time/fps", "time/time_elapsed")):
                assert x[name] == pytest.approx(y[name], rel=1e-3, abs=1e-5), name


def test_iterations_in_one_program_are_those_made_one_by_one(make, monkeypatch, patient):
    made = calls(monkeypatch)
    fused = make()
    fused.train(quiet=True)
    assert made == [1, 3, 4, 4]  # the first compiles; each ends where a line is logged
    with monkeypatch.context() as patch:
        patch.setattr(ParallelPPO, "make_collector", one_by_one)
        apart = make()
        apart.train(quiet=True)
    assert len(made) == 4
    assert_close(fused, apart)
    assert [line["time/iterations"] for line in metrics_of(fused.run)] == [4, 8, 12]
    rates = [line["train/learning_rate"] for line in metrics_of(fused.run)]
    assert rates == pytest.approx([3e-3 * (1 - i / 12) for i in (3, 7, 11)])
    shares = {name for name in metrics_of(fused.run)[-1] if name.endswith("_share")}
    assert shares == {"perf/fused_share", "perf/report_share"}


def test_the_program_is_compiled_once(make, patient):
    agent = make()
    agent.train(total_timesteps=9 * BATCH, quiet=True)
    agent.train(total_timesteps=15 * BATCH, quiet=True)
    learner = agent._before.collector
    assert learner._program._cache_size() == 1
    assert agent.iteration == 15


def test_noise_of_another_table_gives_another_policy(make, patient):
    right, wrong = make(), make()
    wrong.sampler.next_table += 1
    for agent in (right, wrong):
        agent.train(total_timesteps=4 * BATCH, quiet=True)
    assert not np.allclose(right.state.params, wrong.state.params, rtol=1e-4, atol=1e-5)


def test_a_call_ends_where_python_is_needed(make, monkeypatch, patient):
    made = calls(monkeypatch)
    agent = make(log_interval=100, save_interval=5, eval_interval=3, eval_episodes=2)
    agent.train(quiet=True)
    assert made == [1, 2, 2, 1, 3, 1, 2]  # after 3, 5, 6, 9, 10 and 12 iterations
    evaluated = [line for line in metrics_of(agent.run) if "eval/mean_reward" in line]
    assert [line["time/total_timesteps"] // BATCH for line in evaluated] == [3, 6, 9, 12]


def test_callbacks_and_targets_are_asked_after_every_iteration(make, monkeypatch, patient):
    made = calls(monkeypatch)
    told: list[int] = []
    agent = make()
    result = agent.train(
        quiet=True, callbacks=lambda it: told.append(it.iteration) or it.step < 448
    )
    assert (result.status, result.steps) == ("callback", 448)
    assert told == [1, 2, 3, 4, 5, 6, 7]
    assert set(made) == {1}
    reached = make(stop_return=1.0, timesteps=100 * BATCH).train(quiet=True)
    assert reached.status == "stop_return"
    assert 100 <= reached.episodes < 110
    assert set(made) == {1}


def test_the_run_is_saved_before_what_a_callback_raises_goes_up(make):
    agent = make()

    def fail(it: Any) -> None:
        if it.iteration == 3:
            raise ArithmeticError("a mistake")

    with pytest.raises(ArithmeticError, match="a mistake"):
        agent.train(quiet=True, callbacks=fail)
    agent.close()
    resumed = make(None, resume=agent.run)
    assert (resumed.step, resumed.iteration) == (3 * BATCH, 3)
    np.testing.assert_array_equal(resumed.state.params, agent.state.params)
    assert resumed.train(quiet=True).steps == 12 * BATCH


def test_a_call_takes_no_longer_than_about_a_second(make, monkeypatch):
    made = calls(monkeypatch)
    monkeypatch.setattr("starling.training.fused._LONGEST_CALL", 0.0)
    make(timesteps=5 * BATCH).train(quiet=True)
    assert made == [1] * 5


def test_stopping_ends_between_calls_and_the_run_goes_on(make, patient):
    whole = make()
    whole.train(quiet=True)
    asked = iter([False, False, True])
    agent = make()
    result = agent.train(quiet=True, stop=lambda: next(asked))
    assert (result.status, result.steps) == ("stopped", 4 * BATCH)
    agent.train(quiet=True)
    assert_close(agent, whole)


def test_a_run_is_resumed_from_its_checkpoint(make, patient):
    agent = make()
    agent.train(total_timesteps=8 * BATCH, quiet=True)
    agent.close()
    resumed = make(None, resume=agent.run)
    np.testing.assert_array_equal(resumed.state.params, agent.state.params)
    result = resumed.train(total_timesteps=12 * BATCH, quiet=True)
    assert (result.status, result.steps, resumed.iteration) == ("completed", 12 * BATCH, 12)


def test_few_iterations_fit_where_rollouts_are_large(make, monkeypatch):
    monkeypatch.setattr("starling.training.fused._LARGEST_OUTPUT", 6 * BATCH * 3)
    envs = make_vec("CartPole-v1", N, backend="compiled")
    algorithm = make().algorithm
    assert FusedLearner(envs, T, algorithm, None, most=10).most == 3
    assert FusedLearner(envs, 10 * T, algorithm, None, most=10).most == 1
