"""DQN makes gradient steps while it collects the next rollout: with which parameters, and how."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import gymnasium as gym
import jax
import numpy as np
import pytest
from envs_for_tests import SampleEnv
from gymnasium import spaces

from starling.storage.rollout import Rollout
from starling.training.dqn import DQN

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]

SMALL: dict[str, Any] = {
    "num_envs": 2,
    "num_steps": 8,
    "mini_batch_size": 8,
    "hidden_sizes": (8,),
    "learning_starts": 16,
    "updates_per_transition": 0.25,
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 6 * 16,
    "save_interval": 0,
    "log_interval": 100,  # a report waits for what is learnt
}


@pytest.fixture
def make(tmp_path, shared_programs, closed_at_the_end):
    """Makes agents that are closed in the end."""

    def make_agent(env: Any = "CartPole-v1", **settings: Any) -> DQN:
        return closed_at_the_end(DQN(env, **{**SMALL, "log_dir": str(tmp_path), **settings}))

    return make_agent


def iterate(agent: DQN, collector: Any) -> dict[str, Any]:
    return agent.update(collector.collect(agent, lambda: False))


def started(agent: DQN) -> Any:
    collector = agent.make_collector()
    collector.reset(seed=0)
    return collector


def test_the_next_rollout_is_collected_meanwhile(make, monkeypatch):
    learning, stepped = threading.Event(), threading.Event()

    class Env(gym.Wrapper):
        def step(self, action):
            if agent._steps is not None:  # whether the thread has come to them or not
                assert learning.wait(30)
                stepped.set()
            return self.env.step(action)

    def update(*arguments):
        learning.set()
        assert stepped.wait(30), "nothing was collected meanwhile"
        return before(*arguments)

    agent = make(lambda: Env(gym.make("CartPole-v1")), learning_starts=32)
    before = agent.algorithm.update
    monkeypatch.setattr(agent.algorithm, "update", update)
    assert agent.train(quiet=True).status == "completed"
    assert int(agent.state.updates) == 20


def test_it_acts_with_the_parameters_from_before_the_newest_gradient_steps(make):
    agent = make()
    collector, acted_with, learnt = started(agent), [], [np.array(agent.state.params)]
    for _ in range(4):
        acted_with.append(np.array(agent.acting.params))
        iterate(agent, collector)
        learnt.append(np.array(agent.state.params))
    np.testing.assert_array_equal(acted_with, [learnt[0], *learnt[:3]])
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(learnt))


def test_who_resumes_exactly_acts_with_the_same_parameters(make):
    agent = make(exact_resume=True)
    agent.train(quiet=True)
    acting, learnt = np.array(agent.acting.params), np.array(agent.state.params)
    agent.close()
    with DQN(resume=agent.run) as resumed:
        np.testing.assert_array_equal(resumed.acting.params, acting)
        np.testing.assert_array_equal(resumed.state.params, learnt)
    assert not np.array_equal(acting, learnt)


def test_metrics_come_in_once_the_steps_have_ended(make, monkeypatch):
    agent, go = make(), threading.Event()
    before = agent.algorithm.update
    monkeypatch.setattr(agent.algorithm, "update", lambda *a: go.wait(30) and before(*a))
    metrics = iterate(agent, started(agent))
    assert "train/loss" not in metrics
    go.set()
    assert int(agent.state.updates) == 4
    assert np.isfinite(metrics["train/loss"])
    assert metrics["replay/sample_insert_ratio"] == 4 * 8 / 16


def test_where_no_step_was_due_it_acts_with_the_newest_parameters(make):
    agent = make(updates_per_transition=0.05)
    collector, newest = started(agent), []
    for _ in range(6):
        updates = int(agent.state.updates)
        iterate(agent, collector)
        learnt = int(agent.state.updates) > updates
        newest.append(np.array_equal(agent.acting.params, agent.state.params) is not learnt)
    assert all(newest)
    assert 0 < int(agent.state.updates) < 6


@pytest.mark.parametrize("prioritized", [False, True])
def test_an_exact_resume_makes_no_difference(make, prioritized):
    settings = {"exact_resume": True, "prioritized": prioritized, "lr": 0.1}
    whole = make(**settings)
    whole.train(quiet=True)
    half = make(**settings)
    half.train(stop=iter([False] * 29 + [True]).__next__, quiet=True)  # within the fourth rollout
    half.close()
    with DQN(resume=half.run) as resumed:
        resumed.train(quiet=True)
        ours, theirs = resumed.arrays(), whole.arrays()
        assert ours.keys() == theirs.keys() == {"parameters", "training", "acting", "replay"}
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_statistics_are_there_before_the_rollout_is_written_over(make, monkeypatch):
    space = spaces.Box(-1, 1, (4000,))
    agent = make(
        lambda: SampleEnv(space, spaces.Discrete(2)), normalize_observations=True,
        buffer_size=1024, updates_per_transition=1e-9,
    )  # fmt: skip
    flags, rewards = np.zeros((500, 2), bool), np.zeros((500, 2), np.float32)
    observations = np.ones((501, 2, 4000), np.float32)
    rollout = Rollout(observations, flags.astype(np.int32), rewards, flags, flags, None, None)
    seen, add, ready = agent.algorithm.seen, agent.replay.add, []

    def note(*rows):
        ready.append(seen(*rows))
        return ready[-1]

    def look(rollout):
        ready[-1] = ready[-1].mean.is_ready()
        return add(rollout)

    monkeypatch.setattr(agent.algorithm, "seen", note)
    monkeypatch.setattr(agent.replay, "add", look)
    for _ in range(4):  # the first waits for programs to be compiled
        agent.update(rollout)
    assert ready == [True] * 4


def failing(agent: DQN, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(agent.algorithm, "update", fail)


def test_what_fails_goes_up_once(make, monkeypatch):
    agent = make()
    failing(agent, monkeypatch)
    with pytest.raises(RuntimeError, match="no memory left"):
        agent.train(quiet=True)
    assert agent.evaluate(episodes=1).episodes == 1
    assert agent.save(agent.run / "afterwards").exists()


def test_what_fails_and_nobody_asks_for_is_told_when_closing(make, monkeypatch, caplog):
    agent = make()
    failing(agent, monkeypatch)
    iterate(agent, started(agent))
    agent.close()
    assert "the newest gradient steps failed: RuntimeError('no memory left')" in caplog.text


def test_a_state_that_is_replaced_is_not_written_over(make, monkeypatch):
    agent, go = make(), threading.Event()
    before = agent.algorithm.update
    monkeypatch.setattr(agent.algorithm, "update", lambda *a: go.wait(30) and before(*a))
    other = agent.algorithm.init(1)
    iterate(agent, started(agent))
    threading.Timer(0.1, go.set).start()
    agent.state = other
    assert agent.state is other
    assert agent.acting.params is other.params


def test_closing_ends_the_thread(make):
    agent = make()
    agent.train(quiet=True)
    assert [t for t in threading.enumerate() if t.name.startswith("starling-learner")]
    agent.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("starling-learner")]
