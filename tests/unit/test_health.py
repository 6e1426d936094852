"""What is logged of the environments' workers: faults of the whole run, stragglers, memory."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import gymnasium as gym
import numpy as np
import pytest
from counters import metrics_of
from envs_for_tests import CountingEnv, FaultyEnv, boom

import starling
from starling.envs import restarts
from starling.envs.make import make_vec
from starling.envs.vector_env import VectorEnv
from starling.errors import StarlingError, StoppedError
from starling.training import health, trainer
from starling.training.actor import Actor
from starling.training.async_ppo import AsyncPPO
from starling.training.fused import Ends
from starling.training.health import Health
from starling.training.parallel_ppo import ParallelPPO
from starling.training.trainer import Iteration


def collector(busy: list[float] | None = None, memory: Any = (), **faults: int) -> Any:
    """What steps environments that tell this."""
    seconds = None if busy is None else np.array(busy)
    envs = SimpleNamespace(faults=faults, busy_seconds=seconds, worker_memory=list(memory))
    return SimpleNamespace(envs=envs)


def test_faults_are_added_to_those_of_the_past():
    watched = collector(env_errors=2, restarts=0, lost_steps=7)
    health = Health(watched)
    health.past.update(env_errors=3, worker_deaths=1)
    assert health.faults() == {"env_errors": 5, "worker_deaths": 1, "lost_steps": 7}
    watched.envs.faults["env_errors"] = 4
    health.past["failed_saves"] += 1
    assert health.metrics() == {
        "faults/env_errors": 7,
        "faults/worker_deaths": 1,
        "faults/lost_steps": 7,
        "faults/failed_saves": 1,
    }
    assert Health(collector()).metrics() == {}


def test_the_straggler_is_of_the_time_since_the_last_line():
    watched = collector([10.0, 10.0, 10.0])
    health = Health(watched)
    assert health.metrics() == {}  # nobody has stepped since
    for busy, ratio in [([11, 12, 13], 1.5), ([12, 13, 17], 2.0), ([13, 14, 1], 1.0)]:
        watched.envs.busy_seconds = np.array(busy, float)
        assert health.metrics() == {"perf/straggler": pytest.approx(ratio)}
    watched.envs.busy_seconds = None
    assert health.metrics() == {}


def test_one_worker_waits_for_nobody():
    watched = collector([1.0])
    health = Health(watched)
    watched.envs.busy_seconds = np.array([2.0])
    assert health.metrics() == {}


def test_the_largest_worker_is_told():
    assert Health(collector(memory=[80.5, 120.0])).metrics() == {"perf/worker_memory_max": 120.0}


def test_an_actor_with_other_environments_counts_those_of_both():
    envs, others = (make_vec(CountingEnv, 2, backend="serial") for _ in range(2))
    envs.faults["env_errors"] = 2
    actor = Actor(0, envs, MagicMock(), MagicMock(num_steps=4), False)
    actor.begin_anew(others, [1, 2])
    others.faults["env_errors"] = 1
    assert actor.faults == {"env_errors": 3}


def test_every_vector_environment_counts_for_itself():
    vectors = [make_vec(CountingEnv, 2, backend="serial") for _ in range(2)]
    vectors[0].faults["env_errors"] = 1
    assert vectors[1].faults.get("env_errors", 0) == 0
    for envs in vectors:
        envs.close()
    unmeasured = VectorEnv()
    assert unmeasured.busy_seconds is None
    assert unmeasured.worker_memory == []


# --- runs --------------------------------------------------------------------------------------

N, T = 4, 16
BATCH = N * T
SMALL: dict[str, Any] = {
    "num_envs": N,
    "num_steps": T,
    "mini_batch_size": None,
    "epochs": 1,
    "hidden_sizes": (8,),
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 8 * BATCH,
    "log_interval": 1,
    "save_interval": 0,
}


@pytest.fixture
def make(tmp_path, closed_at_the_end):
    """Makes agents that are closed in the end."""

    def make_agent(kind: Any, env: Any, **settings: Any) -> Any:
        if "resume" not in settings:
            settings = {**SMALL, "log_dir": str(tmp_path), **settings}
        return closed_at_the_end(kind(env, **settings))

    return make_agent


def logged(agent: Any, name: str) -> list[int]:
    return [line.get(f"faults/{name}", 0) for line in metrics_of(agent.run)]


def fail_once(it: Iteration) -> None:
    """Lets the environments tell of one more fault after each iteration, as they might."""
    faults = it.agent.envs.faults
    faults["env_errors"] = faults.get("env_errors", 0) + 1


def test_totals_of_a_run_never_go_backwards(make):
    agent = make(ParallelPPO, CountingEnv)
    agent.train(2 * BATCH, callbacks=fail_once, quiet=True)
    agent.train(4 * BATCH, callbacks=fail_once, quiet=True)
    assert logged(agent, "env_errors") == [0, 1, 2, 3]
    agent.train(5 * BATCH, quiet=True)
    agent.close()
    resumed = make(ParallelPPO, CountingEnv, resume=agent.run)
    resumed.train(8 * BATCH, callbacks=fail_once, quiet=True)
    assert logged(agent, "env_errors") == [0, 1, 2, 3, 4, 4, 5, 6]


class NeverFinite(CountingEnv):
    """Observes NaN in every step; its resets are sound."""

    def _observation(self):
        return super()._observation() + (np.nan if self.steps else 0)


def test_a_run_in_which_nothing_is_left_to_learn_from_ends(no_leaks, make, monkeypatch):
    """Each step is cut off, so that no number of them would ever be reached."""
    most = 2 * BATCH
    monkeypatch.setattr(health, "_MOST_LOST", most)
    agent = make(ParallelPPO, NeverFinite, on_invalid_data="truncate")
    told = f"none of the last {most} environment steps .*invalid_data {most}, lost_steps {most}"
    with pytest.raises(StarlingError, match=told):
        agent.train(quiet=True)
    assert (agent.step, agent.envs.faults["lost_steps"]) == (0, most)


def test_a_step_that_is_left_is_enough():
    healthy = Health(collector())
    rewards = np.zeros((100, 4))
    one = np.zeros((100, 4), bool)
    one[50, 2] = True
    for valid in [np.zeros((100, 4), bool), one] * 4:
        assert healthy.made(Ends(rewards, None, None, valid)) == valid.sum()
    assert healthy.made(Ends(rewards, None, None)) == 400


@pytest.fixture
def no_room_at_first(monkeypatch):
    """The first two saves fail."""
    save, asked = trainer.save_checkpoint, iter(range(10**9))

    def save_later(*arguments: Any, **settings: Any) -> Any:
        if next(asked) < 2:
            raise OSError("no room")
        return save(*arguments, **settings)

    monkeypatch.setattr(trainer, "save_checkpoint", save_later)


def test_a_callback_may_stop_at_the_first_save_that_fails(no_leaks, make, no_room_at_first):
    agent = make(ParallelPPO, CountingEnv, save_interval=2)
    seen = []

    def note(it: Iteration) -> bool:
        seen.append(it.metrics.get("faults/failed_saves", 0))
        return not seen[-1]

    with pytest.raises(
        StarlingError, match=r"over \(callback\), but its last checkpoint could not"
    ):
        agent.train(5 * BATCH, callbacks=note, quiet=True)
    assert seen == [0, 1]
    assert agent.train(3 * BATCH, quiet=True).status == "completed"
    assert starling.load(agent.run).step == 3 * BATCH


def test_saves_that_failed_are_counted_from_call_to_call(make, no_room_at_first):
    agent = make(ParallelPPO, CountingEnv, save_interval=1)
    agent.train(2 * BATCH, quiet=True)
    agent.train(3 * BATCH, quiet=True)
    agent.close()
    make(ParallelPPO, CountingEnv, resume=agent.run).train(4 * BATCH, quiet=True)
    assert logged(agent, "failed_saves") == [0, 1, 2, 2]


@pytest.mark.timeout(120)
def test_environments_in_processes_tell_of_themselves(no_leaks, make):
    """Each fails in every 20th step, which is lost with the episode: none comes to its end."""
    settings = {"backend": "process", "num_workers": 2, "on_env_error": "restart"}
    failing = functools.partial(FaultyEnv, boom, step=20)
    agent = make(ParallelPPO, failing, **settings)
    agent.train(BATCH, quiet=True)
    result = agent.train(3 * BATCH - 2 * N, quiet=True)
    assert (result.episodes, result.steps) == (0, 3 * BATCH - 2 * N)
    for fault in ("env_errors", "restarts", "lost_steps"):
        assert logged(agent, fault) == [0, N, 2 * N]
    for metrics in metrics_of(agent.run):
        assert 1 <= metrics["perf/straggler"] <= 2
        assert 10 < metrics["perf/worker_memory_max"] < 10_000


class Failing(gym.Wrapper):
    """Fails once, at the 40th step of all."""

    steps = 0

    def __init__(self):
        super().__init__(gym.make("CartPole-v1"))

    def step(self, action):
        Failing.steps += 1
        if Failing.steps == 40:
            raise ArithmeticError("the pole broke")
        return self.env.step(action)


def test_an_actor_that_begins_anew_does_not_forget(make):
    Failing.steps = -1000
    agent = make(AsyncPPO, Failing, num_actors=2, serial=True, actor_restarts=1)

    def note(it: Iteration) -> None:
        for actor in it.agent._pool.actors:
            if not actor.restarts:
                actor.envs.faults["lost_steps"] = 5
        if it.iteration == 2:
            Failing.steps = 0  # one fails in the next rollout

    agent.train(5 * BATCH, callbacks=note, quiet=True)
    assert logged(agent, "actor_restarts") == [0, 0, 1, 1, 1]
    assert logged(agent, "lost_steps") == [0, 10, 10, 10, 10]


@pytest.mark.parametrize("kind", [ParallelPPO, AsyncPPO])
def test_a_run_can_be_stopped_while_its_first_reset_fails(no_leaks, make, monkeypatch, kind):
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 600.0)
    monkeypatch.setattr(restarts, "_LONGEST_PAUSE", 600.0)
    agent = make(kind, functools.partial(FaultyEnv, boom, "reset"), on_env_error="restart")
    with pytest.raises(StoppedError, match="asked to stop after this: environment 0 failed"):
        agent.train(quiet=True, stop=lambda: True)
    assert agent.step == 0
