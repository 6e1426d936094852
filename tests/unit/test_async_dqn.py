"""Actors that fill a replay while the network learns: ratio, priorities, deaths, resuming."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from counters import check_counters, count_what_is_learnt_from, metrics_of

from starling.errors import UserError
from starling.storage.checkpoint import load_checkpoint
from starling.training import actor_pool
from starling.training.async_dqn import AsyncDQN
from starling.training.trainer import Iteration

N, T, ACTORS = 6, 8, 3
BATCH = N // ACTORS * T
SMALL = {
    "num_envs": N,
    "num_actors": ACTORS,
    "num_steps": T,
    "mini_batch_size": 8,
    "hidden_sizes": (8,),
    "learning_starts": 4 * BATCH,
    "buffer_size": 40 * BATCH,
    "updates_per_transition": 0.25,
    "epsilon_steps": 8 * BATCH,
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 24 * BATCH,
    "log_interval": 1,
    "save_interval": 0,
}


@pytest.fixture
def make(tmp_path, no_actors_left, closed_at_the_end):
    """Makes agents that are closed in the end, after which no thread may be left."""

    def make_agent(env: Any = "CartPole-v1", **settings: Any) -> AsyncDQN:
        if "resume" not in settings:
            settings = {**SMALL, "log_dir": str(tmp_path), **settings}
        else:
            env = None
        return closed_at_the_end(AsyncDQN(env, **settings))

    return make_agent


@pytest.mark.parametrize("serial", [True, False])
def test_samples_keep_to_their_share_of_inserts(make, serial):
    agent = make(serial=serial)
    replay, learnt_from = agent.replay, count_what_is_learnt_from(agent)
    result = agent.train(quiet=True)
    assert result.steps == 24 * BATCH
    assert check_counters(agent.run)["episodes"] > 0
    assert int(agent.state.updates) == sum(learnt_from) // 4 > 0
    assert replay.sampled == 8 * int(agent.state.updates)
    last = metrics_of(agent.run)[-1]
    assert last["replay/sample_insert_ratio"] == replay.sampled / replay.inserted
    assert replay.duplicates == 0


def test_in_turns_two_runs_are_alike(make):
    one, other = make(serial=True), make(serial=True)
    for agent in (one, other):
        agent.train(quiet=True)
    np.testing.assert_array_equal(one.state.params, other.state.params)
    ours, theirs = one.replay.state(), other.replay.state()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_priorities_come_from_the_actors(make):
    agent = make(serial=True, learning_starts=24 * BATCH, priority_alpha=1.0)
    given = []
    add = agent.replay._replay.add

    def note(rollout: Any, **where: Any) -> int:
        given.append(rollout.priorities)
        return add(rollout, **where)

    agent.replay._replay.add = note
    agent.train(quiet=True)
    assert len(given) == 24
    assert all(len(np.unique(priorities)) > T for priorities in given)
    weights = agent.replay.state()["weights"]
    assert np.isin(weights.astype(np.float32), np.concatenate(given)).all()


def test_each_environment_ends_with_a_share_of_its_own(make):
    agent = make()
    assert agent.epsilon == pytest.approx(np.ones(N))
    agent.step = 4 * BATCH
    half = agent.epsilon
    agent.step = 10**6
    assert agent.epsilon == pytest.approx(0.4 ** (1 + 7 * np.arange(N) / (N - 1)), rel=1e-4)
    assert half == pytest.approx((1 + agent.epsilon) / 2)


class Fails(gym.Wrapper):
    """Fails at its 30th step, but the ones made later do not."""

    made = 0

    def __init__(self):
        super().__init__(gym.make("CartPole-v1"))
        Fails.made += 1
        self.left = 30 if Fails.made == 3 else 10**9

    def step(self, action: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise RuntimeError("worn out")
        return super().step(action)


def test_an_actor_that_dies_costs_what_it_had_under_way(make, caplog):
    Fails.made = 0
    agent = make(Fails)
    result = agent.train(quiet=True)
    assert result.steps == 24 * BATCH
    assert "begins anew" in caplog.text
    assert metrics_of(agent.run)[-1]["faults/actor_restarts"] == 1
    assert agent.replay.duplicates == 0
    Fails.made = 0
    with pytest.raises(RuntimeError, match="worn out"):
        make(Fails, actor_restarts=0).train(quiet=True)


class ComesBackLate(Fails):
    """Fails as the others do, and cannot be made in the next two attempts."""

    def __init__(self):
        if Fails.made in (6, 7):
            Fails.made += 1
            raise ConnectionError("not there yet")
        super().__init__()


def test_an_actor_whose_environments_cannot_be_made_is_tried_again(make):
    Fails.made, back = 0, []
    agent = make(ComesBackLate, timesteps=10**6)

    def until_it_is_back(iteration: Iteration) -> bool:
        back.append(any(rollout.origin.restarts for rollout in agent._pool.taken))
        return not back[-1]

    assert agent.train(quiet=True, callbacks=until_it_is_back).status == "callback"
    assert back[-1]
    assert metrics_of(agent.run)[-1]["faults/actor_restarts"] == 3


class Gated(Fails):
    """Fails as the others do, and is made again once the gate is open."""

    gate = threading.Event()

    def __init__(self):
        super().__init__()
        if Fails.made > N:
            assert self.gate.wait(60)


def test_nobody_waits_while_an_actor_gets_other_environments(make):
    """And gradient steps keep to what is added."""
    Fails.made, away = 0, []
    Gated.gate.clear()
    agent = make(Gated, timesteps=10**6, learning_starts=8)

    def open_later(iteration: Iteration) -> bool:
        replay = agent.replay
        if agent._pool.restarted:
            away.append((replay.inserted, replay.sampled))
        if len(away) == 20:
            Gated.gate.set()
        return not any(rollout.origin.restarts for rollout in agent._pool.taken)

    assert agent.train(quiet=True, callbacks=open_later).status == "callback"
    assert len(away) > 20
    inserted, sampled = np.subtract(away[-1], away[0])
    assert sampled == pytest.approx(inserted * 0.25 * 8, rel=0.1)


@pytest.mark.timeout(120)
def test_a_run_can_be_stopped_while_an_actor_is_begun_anew(make, monkeypatch):
    monkeypatch.setattr(actor_pool, "_FIRST_PAUSE", 10**6)
    monkeypatch.setattr(actor_pool, "_LONGEST_PAUSE", 10**6)
    Fails.made = 0
    agent = make(ComesBackLate)
    result = agent.train(quiet=True, stop=lambda: Fails.made >= 7)
    assert result.status == "stopped"
    assert load_checkpoint(agent.run).step == result.steps


def test_compiled_environments_are_stepped_from_the_host(make):
    agent = make(backend="compiled", timesteps=8 * BATCH)
    assert agent.train(quiet=True).steps == 8 * BATCH
    assert agent.replay.sampled > 0


def test_a_vector_environment_that_exists_has_one_actor(make):
    agent = make(gym.make_vec("CartPole-v1", N), num_actors=None, backend="auto")
    assert agent.config.actor_restarts == 0
    assert agent.train(6 * N * T, quiet=True).steps >= 6 * N * T
    with pytest.raises(UserError, match=r"actor_restarts 3 needs .* or actor_restarts 0"):
        make(gym.make_vec("CartPole-v1", N), num_actors=None, backend="auto", actor_restarts=3)


def test_a_resumed_run_goes_on_with_the_replay(make):
    agent, tables = make(timesteps=10 * BATCH), [0]

    def note_tables(iteration: Iteration) -> None:
        tables.extend(actor.sampler.next_table for actor in agent._pool.actors)

    agent.train(quiet=True, callbacks=note_tables)
    size = len(agent.replay)
    agent.close()
    resumed = make(resume=agent.run, timesteps=14 * BATCH)
    assert len(resumed.replay) == size
    assert resumed.sampler.next_table >= max(tables)
    assert resumed.train(quiet=True).steps == 14 * BATCH
    assert resumed.replay.inserted > size
    assert resumed.replay.duplicates == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_actors": 4}, "num_actors 4 does not divide num_envs 6: use 3 or 6"),
        ({"num_actors": 7}, "num_actors 7 does not divide num_envs 6: use 6"),
        ({"exact_resume": True}, "exact_resume does not go with async_dqn.*use algo dqn"),
    ],
)
def test_what_does_not_go_together_is_refused(make, settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
