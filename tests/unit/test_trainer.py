"""Runs: what they collect and leave behind, and that they go on exactly where they stopped."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from counters import metrics_of
from envs_for_tests import CountingEnv, MaskedEnv, fails_when_armed, hang, kill_self
from same_runs import assert_like_one_run, same, without_times

import starling
from starling.envs.make import make_vec
from starling.storage.checkpoint import load_checkpoint
from starling.training.collector import Action, HostCollector
from starling.training.parallel_ppo import ParallelPPO
from starling.training.result import TrainResult
from starling.training.trainer import Iteration

pytestmark = pytest.mark.usefixtures("no_leaks")

N, T = 4, 16
BATCH = N * T
SMALL = {
    "num_envs": N,
    "num_steps": T,
    "mini_batch_size": 32,
    "epochs": 2,
    "hidden_sizes": (8,),
    "lr": 3e-3,
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 4 * BATCH,
    "log_interval": 1,
    "save_interval": 3,
}


class FailsLater(CountingEnv):
    """Fails in the third rollout."""

    def step(self, action):
        if self.episodes * self.length + self.steps == 3 * T:
            raise ValueError("boom")
        return super().step(action)


@pytest.fixture
def make(tmp_path, shared_programs, closed_at_the_end):
    """Makes agents that are closed in the end."""

    def make_agent(env: Any = "CartPole-v1", **settings: Any) -> ParallelPPO:
        if "resume" not in settings:
            settings = {**SMALL, "log_dir": str(tmp_path), **settings}
        return closed_at_the_end(ParallelPPO(env, **settings))

    return make_agent


def resume(make, agent: ParallelPPO, **settings: Any) -> ParallelPPO:
    agent.close()
    return make(None, resume=agent.run, **settings)


# --- collecting --------------------------------------------------------------------------------


class Acting:
    """A policy of a version that acts by a function."""

    def __init__(self, act: Any, version: int = 0):
        self.act, self.version = act, version


def always(value: int, version: int = 0) -> Acting:
    def act(observations: np.ndarray, mask: np.ndarray | None, state: Any) -> Action:
        actions = np.full(len(observations), value)
        return Action(actions, actions)

    return Acting(act, version)


def never() -> bool:
    return False


@pytest.mark.parametrize("copy", [False, True])
def test_rollouts_hold_what_the_environments_did(copy):
    envs = make_vec(CountingEnv, 2, backend="serial", copy=copy)  # truncated at step 5
    collector = HostCollector(envs, 7)
    collector.reset(0)
    first = collector.collect(always(1, 3), never)
    assert first is not None
    assert (first.origin.version, first.origin.sequence) == (3, 0)
    counts = [[1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [2, 0], [2, 1], [2, 2]]
    np.testing.assert_array_equal(first.observations, np.stack([counts, counts], 1))
    np.testing.assert_array_equal(first.truncated.T, [[0, 0, 0, 0, 1, 0, 0]] * 2)
    assert not first.terminated.any()
    assert first.final_index[:3].tolist() == [8, 9, 14]
    np.testing.assert_array_equal(first.final_observations[:2], [[1, 5], [1, 5]])
    assert (first.actions == 1).all()
    assert (first.rewards == 1).all()
    second = collector.collect(always(0, 4), never)  # goes on where the first ended
    assert second is not None
    assert second.origin.sequence == 1
    np.testing.assert_array_equal(second.observations[0, 0], [2, 2])
    np.testing.assert_array_equal(second.observations[-1, 0], [3, 4])
    envs.close()


@pytest.mark.parametrize("copy", [False, True])
def test_masks_in_a_rollout_are_those_that_were_acted_under(copy):
    envs = make_vec(MaskedEnv, 2, backend="serial", copy=copy)
    collector = HostCollector(envs, 7)
    collector.reset(0)

    def act(observations: np.ndarray, mask: np.ndarray | None, state: Any) -> Action:
        assert mask is not None
        forbidden = observations[:, 1].astype(int) % 3
        np.testing.assert_array_equal(mask, np.arange(3) != forbidden[:, None])
        actions = np.argmax(mask, -1)
        return Action(actions, actions)

    for _ in range(2):
        rollout = collector.collect(Acting(act), never)
        assert rollout is not None
        assert rollout.action_masks is not None
        forbidden = rollout.observations[:-1, :, 1].astype(int) % 3
        np.testing.assert_array_equal(rollout.action_masks, np.arange(3) != forbidden[..., None])
        chosen = np.take_along_axis(rollout.action_masks, rollout.actions[..., None], -1)
        assert chosen.all()
    envs.close()


@pytest.mark.parametrize("copy", [False, True])
def test_after_an_interruption_the_next_rollout_begins_where_the_environments_are(copy):
    envs = make_vec(CountingEnv, 2, backend="serial", copy=copy)
    collector = HostCollector(envs, 4)
    collector.reset(0)
    answers = iter([False, False, True])
    assert collector.collect(always(0), lambda: next(answers)) is None
    rollout = collector.collect(always(0), never)
    assert rollout is not None
    np.testing.assert_array_equal(rollout.observations[:, 0, 1], [2, 3, 4, 0, 1])
    envs.close()


# --- the same again ----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_parameters(make):
    agents = [make(seed=seed) for seed in (3, 3, 4)]
    for agent in agents:
        agent.train(quiet=True)
    first, second, other = agents
    same(first.arrays(), second.arrays())
    assert without_times(metrics_of(first.run)) == without_times(metrics_of(second.run))
    assert not np.array_equal(first.state.params, other.state.params)


@pytest.mark.timeout(120)
def test_processes_give_the_same_parameters_as_serial(make):
    agents = [make(), make(backend="process", num_workers=2)]
    for agent in agents:
        agent.train(quiet=True)
    same(agents[0].arrays(), agents[1].arrays())
    assert agents[1].envs.backend == "process"


def test_evaluation_and_reports_do_not_change_the_training(make):
    plain = make(log_interval=4, save_interval=0)
    watched = make(eval_interval=1, eval_episodes=3, save_interval=1)

    def look(it: Iteration) -> None:
        it.agent.predict(np.zeros(4, np.float32), deterministic=False)

    plain.train(quiet=True)
    watched.train(quiet=True, callbacks=[look])
    same(plain.arrays(), watched.arrays())


# --- going on ----------------------------------------------------------------------------------

NORMALISED = {"normalize_observations": True, "normalize_rewards": True}
SCHEDULED = {"lr_schedule": "linear", "clip_schedule": "linear", **NORMALISED}


@pytest.fixture
def whole(make):
    """One run of 4 rollouts, by settings."""

    def run(**settings: Any) -> ParallelPPO:
        agent = make(exact_resume=True, **settings)
        agent.train(quiet=True)
        return agent

    return run


@pytest.mark.parametrize("settings", [{}, NORMALISED], ids=["plain", "normalised"])
def test_n_and_resumed_n_are_2n(make, whole, settings):
    half = make(exact_resume=True, **settings)
    half.train(2 * BATCH, quiet=True)
    rest = resume(make, half, timesteps=4 * BATCH)
    assert rest.step == 2 * BATCH
    rest.train(quiet=True)
    assert_like_one_run(rest, whole(**settings))


def test_stopped_by_a_callback_and_resumed(make, whole):
    half = make(exact_resume=True, **SCHEDULED)
    assert half.train(callbacks=lambda it: it.iteration < 2, quiet=True).status == "callback"
    rest = resume(make, half)
    assert rest.train(quiet=True).status == "completed"
    assert_like_one_run(rest, whole(**SCHEDULED))


@pytest.mark.parametrize("asked", [2 * T, 2 * T + 1, 3 * T - 1], ids=str)
def test_stopped_within_a_rollout_and_resumed(make, whole, asked):
    """What was collected of the rollout is given up, and collected again."""
    half = make(exact_resume=True, **SCHEDULED)
    answers = iter([False] * asked + [True])
    assert half.train(stop=lambda: next(answers), quiet=True).status == "stopped"
    assert half.step == 2 * BATCH
    rest = resume(make, half)
    rest.train(quiet=True)
    assert_like_one_run(rest, whole(**SCHEDULED))


def test_stopped_within_a_rollout_and_trained_on(make, whole):
    agent = make(exact_resume=True, **SCHEDULED)
    answers = iter([False] * (2 * T + 5) + [True])
    agent.train(stop=lambda: next(answers), quiet=True)
    agent.train(quiet=True)
    assert_like_one_run(agent, whole(**SCHEDULED))


def test_a_second_call_goes_on(make, whole):
    agent = make(exact_resume=True)
    agent.train(2 * BATCH, quiet=True)
    run = agent.run
    agent.train(4 * BATCH, quiet=True)
    assert agent.run == run
    assert_like_one_run(agent, whole())


def fails_once(path: Path, at: int) -> gym.Env:
    """A CartPole that fails in one of its steps, unless the file is there."""

    class Env(gym.Wrapper):
        steps = 0

        def step(self, action):
            self.steps += 1
            if self.steps == at and not path.exists():
                path.touch()
                raise ValueError("boom")
            return super().step(action)

    return Env(gym.make("CartPole-v1"))


@pytest.mark.parametrize("at", [2 * T + 1, 2 * T + 5, 3 * T], ids=str)
def test_failed_within_a_rollout_and_resumed(make, whole, tmp_path, at):
    """The run is saved as it was before that rollout, which is collected again."""
    env = functools.partial(fails_once, tmp_path / "failed", at)
    half = make(env, exact_resume=True, save_interval=0, **SCHEDULED)
    with pytest.raises(starling.WorkerError, match="boom"):
        half.train(quiet=True)
    assert half.step == 2 * BATCH
    half.close()
    rest = make(env, resume=half.run)
    rest.train(quiet=True)
    assert_like_one_run(rest, whole(**SCHEDULED))


def test_failed_within_a_rollout_and_trained_on(make, whole, tmp_path):
    env = functools.partial(fails_once, tmp_path / "failed", 2 * T + 5)
    agent = make(env, exact_resume=True, **SCHEDULED)
    with pytest.raises(starling.WorkerError, match="boom"):
        agent.train(quiet=True)
    agent.train(quiet=True)
    assert_like_one_run(agent, whole(**SCHEDULED))


def kill_a_worker(agent: ParallelPPO) -> None:
    victim = agent.envs._workers._crew[1].process  # pyright: ignore
    os.kill(victim.pid, signal.SIGKILL)
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)


WORKERS = {"exact_resume": True, "backend": "process", "num_workers": 2}


@pytest.mark.timeout(120)
def test_a_worker_that_dies_between_rollouts_costs_its_episodes(make):
    agent = make(on_env_error="restart", save_interval=1, **WORKERS)

    def kill(it: Iteration) -> None:
        if it.iteration == 2:
            kill_a_worker(agent)

    agent.train(callbacks=kill, quiet=True)
    assert agent.envs.faults == {"worker_deaths": 1, "restarts": 1, "lost_steps": 2}
    rest = resume(make, agent, timesteps=5 * BATCH)
    rest.train(quiet=True)
    rest.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", [kill_self, hang])
def test_a_worker_that_is_lost_in_an_evaluation_is_replaced(make, tmp_path, fault, caplog):
    env = functools.partial(fails_when_armed, fault, tmp_path / "armed", os.getpid())
    settings = {"eval_interval": 2, "eval_episodes": 3, "step_timeout": 4.0, **WORKERS}
    agent = make(env, on_env_error="restart", **settings)
    agent.train(callbacks=lambda it: (tmp_path / "armed").touch(), quiet=True)
    assert not agent.envs.faults
    kind = "timeouts" if fault is hang else "worker_deaths"
    logged = next(line for line in reversed(metrics_of(agent.run)) if "time/fps" in line)
    assert logged[f"faults/{kind}"] == logged["faults/restarts"] == 1
    checkpoint = load_checkpoint(agent.run)
    assert checkpoint.counters["faults"][kind] == 1
    (told,) = (line for line in caplog.messages if line.startswith("in an evaluation, "))
    assert f"{kind} 1" in told


@pytest.mark.timeout(120)
def test_a_worker_that_is_lost_in_an_evaluation_ends_neither_run_nor_agent(make, tmp_path):
    env = functools.partial(fails_when_armed, kill_self, tmp_path / "armed", os.getpid())
    agent = make(env, eval_interval=2, eval_episodes=3, save_interval=0, **WORKERS)
    with pytest.raises(starling.WorkerError, match=r"^in an evaluation: environment .* signal 9"):
        agent.train(callbacks=lambda it: (tmp_path / "armed").touch(), quiet=True)
    assert starling.load(agent.run).step == 2 * BATCH
    assert agent.evaluate(3).lengths.tolist() == [100] * 3


@pytest.mark.timeout(120)
def test_what_is_known_is_saved_if_the_episodes_are_not(make, caplog):
    agent = make(save_interval=0, **WORKERS)
    with pytest.raises(starling.WorkerError, match="signal 9"):
        agent.train(callbacks=lambda it: kill_a_worker(agent), quiet=True)
    assert "the environments' episodes cannot be saved" in caplog.text
    assert agent.step == BATCH
    rest = resume(make, agent)
    assert rest.step == BATCH
    rest.train(2 * BATCH, quiet=True)
    assert "has no episodes to go on with: others begin" in caplog.text
    rest.close()


@pytest.mark.timeout(120)
def test_resumed_on_another_backend(make, whole):
    half = make(exact_resume=True)
    half.train(2 * BATCH, quiet=True)
    rest = resume(make, half, timesteps=4 * BATCH, backend="process", num_workers=2)
    rest.train(quiet=True)
    assert_like_one_run(rest, whole())


def test_without_exact_resume_other_episodes_begin(make):
    half = make()
    half.train(2 * BATCH, quiet=True)
    params = half.arrays()["parameters"]
    rest = resume(make, half, timesteps=4 * BATCH)
    same(rest.arrays()["parameters"], params)
    result = rest.train(quiet=True)
    assert result.steps == 4 * BATCH
    steps = [line["time/total_timesteps"] for line in metrics_of(rest.run)]
    assert steps == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]


def test_a_run_that_is_done_is_resumed_without_a_step(make):
    agent = make()
    agent.train(quiet=True)
    rest = resume(make, agent)
    result = rest.train(quiet=True)
    assert (result.status, result.steps, rest.iteration) == ("completed", 4 * BATCH, 4)


# --- predict, save, load -----------------------------------------------------------------------


def test_loaded_policies_predict_the_same(make, tmp_path):
    agent = make(normalize_observations=True)
    agent.train(2 * BATCH, quiet=True)
    observations = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = agent.predict(observations)
    saved = agent.save(tmp_path / "mine")
    assert agent.run is not None
    for path in (saved, agent.run, agent.run / "checkpoints"):
        loaded = starling.load(path)
        np.testing.assert_array_equal(loaded.predict(observations), expected)
        assert loaded.step == 2 * BATCH
    assert loaded.evaluate(3, seed=2).returns.tolist() == agent.evaluate(3, 2).returns.tolist()
    loaded.close()


def test_evaluations_are_on_fresh_and_repeatable_episodes(make):
    agent = make()
    first, second, other = (agent.evaluate(5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.returns, second.returns)
    assert not np.array_equal(first.returns, other.returns)
    assert first.episodes == 5
    drawn = [agent.evaluate(5, 1, deterministic=False).returns for _ in range(2)]
    assert not np.array_equal(*drawn)


# --- ends --------------------------------------------------------------------------------------


def test_callbacks_see_every_iteration_and_may_stop(make):
    agent = make()
    seen: list[Iteration] = []
    also: list[int] = []

    def stop_at_3(it: Iteration) -> bool | None:
        seen.append(it)
        return False if it.iteration == 3 else None

    result = agent.train(callbacks=[stop_at_3, lambda it: also.append(it.step)], quiet=True)
    assert result.status == "callback"
    assert [it.iteration for it in seen] == [1, 2, 3]
    assert also == [it.step for it in seen] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert all(it.agent is agent for it in seen)
    assert all(np.isfinite(float(it.metrics["train/value_loss"])) for it in seen)
    assert starling.load(result.run).step == 3 * BATCH  # it was saved


class Mistake(Exception):
    """Of a user's callback."""


@pytest.mark.parametrize("settings", [{}, {"exact_resume": True}], ids=str)
def test_a_run_is_saved_before_what_a_callback_raises_goes_up(make, settings):
    agent = make(save_interval=0, **settings)

    def fail(it: Iteration) -> None:
        if it.iteration == 2:
            raise Mistake

    with pytest.raises(Mistake):
        agent.train(callbacks=fail, quiet=True)
    assert agent.run is not None
    loaded = starling.load(agent.run)
    assert (loaded.step, loaded.iteration) == (2 * BATCH, 2)
    np.testing.assert_array_equal(loaded.state.params, agent.state.params)
    assert not (agent.run / "result.json").exists()
    rest = resume(make, agent)
    assert rest.train(quiet=True).steps == 4 * BATCH
    if settings:
        whole = make(**settings)
        whole.train(quiet=True)
        assert_like_one_run(rest, whole)


def test_timesteps_are_rounded_up_to_whole_rollouts(make):
    agent = make(timesteps=BATCH + 1)
    assert agent.train(quiet=True).steps == 2 * BATCH


def test_max_time_ends_a_run(make):
    result = make(max_time=1e-6).train(quiet=True)
    assert (result.status, result.steps) == ("max_time", BATCH)


def test_stop_return_waits_for_100_episodes(make):
    agent = make(CountingEnv, stop_return=0.0, timesteps=100 * BATCH)  # every 5 steps: 12 to 16
    result = agent.train(quiet=True)
    assert result.status == "stop_return"
    assert 100 <= result.episodes < 100 + 16
    assert result.episode_return_mean is not None


# --- what a run leaves -------------------------------------------------------------------------

EVERY_LINE = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "rollout/value_mean",
    "time/fps",
    "time/iterations",
    "time/total_timesteps",
    "time/time_elapsed",
    "train/approx_kl",
    "train/clip_fraction",
    "train/entropy_loss",
    "train/explained_variance",
    "train/policy_gradient_loss",
    "train/value_loss",
    "train/learning_rate",
    "train/grad_norm",
    "perf/collect_share",
    "perf/update_share",
    "perf/wait_share",
    "perf/report_share",
    "perf/frames_per_second",
}


def test_a_run_leaves_metrics_result_and_checkpoints(make):
    agent = make(eval_interval=2, eval_episodes=2)
    result = agent.train(quiet=True)
    assert agent.run is not None
    assert agent.run.name == "CartPole-v1__ppo__s0"
    written = metrics_of(agent.run)
    evaluations = [line for line in written if "eval/mean_reward" in line]
    iterations = [line for line in written if "eval/mean_reward" not in line]
    assert [line["time/iterations"] for line in iterations] == [1, 2, 3, 4]
    assert [line["time/total_timesteps"] for line in evaluations] == [2 * BATCH, 4 * BATCH]
    assert all("eval/mean_ep_length" in line for line in evaluations)
    assert iterations[-1].keys() == EVERY_LINE | {"train/clip_range"}
    for line in iterations:
        assert line.keys() | {"rollout/ep_rew_mean", "rollout/ep_len_mean"} >= EVERY_LINE
        shares = [value for name, value in line.items() if name.endswith("_share")]
        assert sum(shares) == pytest.approx(1)
    stored = json.loads((agent.run / "result.json").read_text())
    assert stored == dataclasses.asdict(result)
    assert stored.keys() == {field.name for field in dataclasses.fields(TrainResult)}
    assert stored["steps"] == 4 * BATCH
    assert stored["preset"] is None
    assert (stored["env"], stored["algo"], stored["backend"]) == ("CartPole-v1", "ppo", "serial")
    config = json.loads((agent.run / "config.json").read_text())
    assert config["lr"] == SMALL["lr"]
    assert {"starling", "jax", "numpy", "gymnasium"} <= config["versions"].keys()
    names = sorted(path.name for path in (agent.run / "checkpoints").glob("step_*"))
    assert names[-1] == f"step_{4 * BATCH:012d}"
    scores = [line["eval/mean_reward"] for line in evaluations]
    best = starling.load(agent.run, which="best")
    assert best.step == (4 if scores[1] >= scores[0] else 2) * BATCH


def test_episodes_are_reported_as_the_environment_rewards_them(make):
    """Not as normalisation scales them."""
    agent = make(CountingEnv, env_kwargs={"terminate": True}, **NORMALISED)
    result = agent.train(quiet=True)
    assert agent.run is not None
    with (agent.run / "episodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result.episodes == N * (4 * T // 5)
    assert {row["length"] for row in rows} == {"5"}
    returns = [float(row["return"]) for row in rows]
    assert set(returns) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert len(set(returns)) > 1
    assert result.episode_return_mean == pytest.approx(np.mean(returns[-100:]))
    assert int(rows[0]["step"]) == 5 * N


def test_runs_do_not_share_a_folder(make):
    agents = [make(), make()]
    for agent in agents:
        agent.train(BATCH, quiet=True)
    assert [agent.run.name for agent in agents] == [
        "CartPole-v1__ppo__s0",
        "CartPole-v1__ppo__s0__2",
    ]


# --- environments of other kinds ---------------------------------------------------------------


def test_reset_steps_of_next_step_environments_are_not_counted(make):
    envs = gym.vector.SyncVectorEnv([lambda: CountingEnv(terminate=True)] * N)
    assert envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.NEXT_STEP
    agent = make(envs, backend="auto")
    result = agent.train(quiet=True)
    # Of 6 steps one is a reset: 64 steps have 10 of them, so that a fifth rollout is needed.
    made = sum(t % 6 != 5 for t in range(5 * T)) * N
    assert result.steps == agent.step == made
    assert result.episodes == N * (5 * T // 6)
    assert metrics_of(agent.run)[-1]["rollout/ep_len_mean"] == 5


def test_a_run_is_saved_when_an_environment_fails(make):
    agent = make(FailsLater, save_interval=0)
    with pytest.raises(starling.WorkerError, match="boom"):
        agent.train(quiet=True)
    assert agent.step == 2 * BATCH
    assert starling.load(agent.run).step == 2 * BATCH


class FailsInItsOwnWay(gym.vector.SyncVectorEnv):
    """A vector environment of a user's, which raises what it likes."""

    calls = 0

    def step(self, actions):
        self.calls += 1
        if self.calls == 2 * T + 5:
            raise ValueError("boom")
        return super().step(actions)


def test_a_run_is_saved_when_a_vector_environment_of_a_user_fails(make):
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = FailsInItsOwnWay([CountingEnv] * N, autoreset_mode=same_step)
    agent = make(envs, backend="auto", save_interval=0)
    with pytest.raises(ValueError, match="boom"):
        agent.train(quiet=True)
    assert agent.step == starling.load(agent.run).step == 2 * BATCH


def other_spaces(path: Path) -> gym.Env:
    """Fails as `fails_once` does, and is another environment when it is made anew."""
    if path.exists():
        return gym.make("Acrobot-v1")
    return fails_once(path, 2 * T + 5)


def test_a_run_is_saved_when_an_environment_cannot_be_begun_anew(make, tmp_path):
    env = functools.partial(other_spaces, tmp_path / "failed")
    agent = make(env, save_interval=0, on_env_error="restart")
    with pytest.raises(starling.UserError, match="same observation_space"):
        agent.train(quiet=True)
    assert starling.load(agent.run).step == agent.step == 2 * BATCH


def test_a_result_that_cannot_be_written_costs_a_message(make, monkeypatch, caplog):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    agent = make()
    with monkeypatch.context() as patch:
        patch.setattr("starling.training.trainer.write_json", no_space)
        assert agent.train(quiet=True).status == "completed"
    assert "result.json was not written" in caplog.text
    assert starling.load(agent.run).step == 4 * BATCH
