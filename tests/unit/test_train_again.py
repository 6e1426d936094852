"""Runs that are interrupted, watched and gone on with, on one agent."""

from __future__ import annotations

import csv
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from counters import metrics_of
from gymnasium import spaces

import starling
from starling.errors import UserError
from starling.storage.rollout import RolloutBuffer
from starling.training.parallel_ppo import ParallelPPO

pytestmark = pytest.mark.usefixtures("no_leaks")

N, T = 2, 16


class TenSteps(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any):
        self.count += 1
        return np.zeros(3, np.float32), 1.0, False, self.count == 10, {}


class MaskedLate(TenSteps):
    """Says only after the first step what is forbidden, and forbids it from then on."""

    def step(self, action: Any):
        result = super().step(action)
        if self.count > 1 and action == 1:
            raise ValueError("forbidden")
        return *result[:4], {"action_mask": np.array([1, 0, 1], np.int8)}


@pytest.fixture
def make(tmp_path, shared_programs, closed_at_the_end):
    def make_agent(env: Any, **settings: Any) -> ParallelPPO:
        own = {
            "num_envs": N,
            "num_steps": T,
            "mini_batch_size": None,
            "epochs": 1,
            "hidden_sizes": (8,),
            "timesteps": 8 * N * T,
            "normalize_rewards": True,
            "backend": "serial",
            "tensorboard": False,
            "log_dir": str(tmp_path),
        }
        return closed_at_the_end(ParallelPPO(env, **{**own, **settings}))

    return make_agent


def after(calls: int):
    """A `stop` that says so at its n-th call."""
    made = iter(range(10**9))
    return lambda: next(made) >= calls


def test_episodes_that_were_given_up_are_not_spliced_with_others(make):
    agent = make(TenSteps)
    assert agent.train(stop=after(2 * T + 7), quiet=True).status == "stopped"
    assert agent.train(quiet=True).status == "completed"
    with (agent.run / "episodes.csv").open() as file:
        lengths = {row["length"] for row in csv.DictReader(file)}
    assert lengths == {"10"}


def test_masks_that_come_late_are_kept_to(make):
    assert make(MaskedLate).train(quiet=True).status == "completed"


def test_a_rollout_allows_everything_where_no_mask_was_given():
    buffer = RolloutBuffer(3, 1)
    nothing = np.zeros(1)
    for _ in range(2):  # the second rollout must not hold what is left of the first
        buffer.begin(np.zeros((1, 2)))
        for mask in (None, np.array([[1, 0]]), None):
            ends = np.zeros(1, bool)
            buffer.add(np.zeros(1, int), np.zeros((1, 2)), nothing, ends, ends, {}, mask)
        masks = buffer.finish().action_masks
        assert masks.tolist() == [[[True, True]], [[True, False]], [[True, True]]]


def test_short_runs_are_reported_too(make):
    agent = make(TenSteps, timesteps=3 * N * T, log_interval=2)
    agent.train(quiet=True)
    assert [line["time/iterations"] for line in metrics_of(agent.run)] == [2, 3]


@pytest.mark.parametrize(("answer", "iterations"), [(False, 1), (np.False_, 1), (0, 8), (None, 8)])
def test_only_false_stops(make, answer, iterations):
    agent = make(TenSteps)
    agent.train(callbacks=lambda told: answer, quiet=True)
    assert agent.iteration == iterations


def test_callbacks_see_what_is_logged(make):
    seen = []
    make(TenSteps).train(callbacks=lambda told: seen.append(told.metrics), quiet=True)
    assert seen[-1]["rollout/ep_rew_mean"] == 10
    assert seen[-1]["time/total_timesteps"] == 8 * N * T
    assert "train/value_loss" in seen[-1]


def test_a_policy_can_be_scored_on_an_environment_that_is_given(make):
    agent = make(lambda: TenSteps())
    result = agent.train(quiet=True)
    loaded = starling.load(result.run, env_name=TenSteps)
    assert loaded.evaluate(episodes=3).mean_return == 10
    loaded.close()


def test_predict_takes_lists_and_refuses_other_shapes(make):
    agent = make(TenSteps)
    assert agent.predict([0.0, 0.0, 0.0]).shape == ()
    assert agent.predict(np.zeros((5, 3))).shape == (5,)
    for shape in [(4,), (2, 2, 3), ()]:
        with pytest.raises(UserError, match="shape"):
            agent.predict(np.zeros(shape))


def test_a_closed_agent_says_how_to_go_on(make):
    agent = make("CartPole-v1")
    agent.train(2 * N * T, quiet=True)
    agent.close()
    with pytest.raises(UserError, match=r"is closed.*ParallelPPO\(resume='") as error:
        agent.train(4 * N * T, quiet=True)
    rest = eval(str(error.value).rpartition("go on with ")[2], {"ParallelPPO": ParallelPPO})
    with rest:
        assert rest.train(4 * N * T, quiet=True).steps == 4 * N * T
