"""Environments so small that what must be learnt is known; each tells one kind of mistake."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from starling.training.parallel_ppo import ParallelPPO

NUMBER = spaces.Box(-1, 1, (1,))
SETTINGS = {
    "num_envs": 8,
    "num_steps": 32,
    "mini_batch_size": 64,
    "epochs": 4,
    "hidden_sizes": (16,),
    "lr": 1e-2,
    "gamma": 0.9,
    "max_grad_norm": None,
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 6144,
    "save_interval": 0,
}


def number(x: float) -> np.ndarray:
    return np.array([x], np.float32)


class Probe(gym.Env):
    """One-step episodes that observe a random sign; `reward` is what a subclass says."""

    observation_space: spaces.Space = NUMBER
    action_space: spaces.Space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        return self.observation(), {}

    def step(self, action: Any):
        return self.observation(), self.reward(action), True, False, {}

    def observation(self) -> Any:
        return number(self.sign)

    def reward(self, action: Any) -> float:
        return 1.0


@pytest.fixture
def trained(tmp_path, shared_programs, closed_at_the_end):
    """Trains on an environment, and closes the agent in the end."""

    def train(env: Any, **settings: Any) -> ParallelPPO:
        settings = {**SETTINGS, "log_dir": str(tmp_path), **settings}
        agent = closed_at_the_end(ParallelPPO(env, **settings))
        agent.train(quiet=True)
        return agent

    return train


def values(agent: ParallelPPO, *observations: float) -> np.ndarray:
    policy, state = agent.algorithm.policy, agent.state
    features = policy.features(np.array(observations, np.float32)[:, None])
    return np.asarray(policy(state.params, features, state.observation_statistics).value)


# --- values ------------------------------------------------------------------------------------


class Unchanging(gym.Env):
    """One state, reward 1, an end after 10 steps of one kind or the other."""

    observation_space, action_space = NUMBER, spaces.Discrete(2)

    def __init__(self, terminates: bool = False):
        self.terminates = terminates

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return number(1.0), {}

    def step(self, action: int):
        self.steps += 1
        end = self.steps == 10
        return number(1.0), 1.0, end and self.terminates, end and not self.terminates, {}


def test_truncation_does_not_end_the_return(trained):
    """The value is 1 / (1 - gamma) = 10; with truncation as an end it would be below 6.5."""
    assert values(trained(Unchanging, timesteps=8192), 1.0)[0] == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize("mode", list(gym.vector.AutoresetMode))
def test_truncation_in_vector_environments_of_every_autoreset_mode(trained, mode):
    envs = gym.vector.SyncVectorEnv([Unchanging] * 8, autoreset_mode=mode)
    agent = trained(envs, backend="auto", timesteps=8192)
    assert values(agent, 1.0)[0] == pytest.approx(10, abs=0.5)


def test_termination_ends_the_return(trained):
    """The 10 steps of an episode are worth (1 - 0.9^k) / 0.1 for k = 10 ... 1 steps to go."""
    agent = trained(Unchanging, env_kwargs={"terminates": True}, timesteps=8192)
    assert 3.5 < values(agent, 1.0)[0] < 6.5


def test_a_constant_reward(trained):
    np.testing.assert_allclose(values(trained(Probe), -1, 1), [1, 1], atol=0.02)


class Observed(Probe):
    def reward(self, action: Any) -> float:
        return self.sign


def test_a_reward_that_is_observed(trained):
    np.testing.assert_allclose(values(trained(Observed), -1, 1), [-1, 1], atol=0.05)


class Delayed(Probe):
    """Observes 0, then 1; only the second step is rewarded."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        gym.Env.reset(self, seed=seed)
        self.steps = 0
        return number(0.0), {}

    def step(self, action: int):
        self.steps += 1
        return number(1.0), float(self.steps == 2), self.steps == 2, False, {}


def test_a_reward_that_comes_later(trained):
    agent = trained(Delayed)
    np.testing.assert_allclose(values(agent, 0, 1), [0.9, 1], atol=0.05)


# --- actions -----------------------------------------------------------------------------------


class Chosen(Probe):
    def reward(self, action: int) -> float:
        return 1.0 if action == 1 else -1.0


def test_an_action_that_is_rewarded(trained):
    assert trained(Chosen).evaluate(20).mean_return == 1


class Matched(Probe):
    """The right action depends on what is observed."""

    def reward(self, action: int) -> float:
        return 1.0 if (action == 1) == (self.sign > 0) else -1.0


def test_an_action_that_fits_the_observation(trained):
    agent = trained(Matched)
    assert agent.evaluate(50).mean_return == 1
    np.testing.assert_allclose(values(agent, -1, 1), [1, 1], atol=0.1)


class Aimed(Probe):
    """The action nearest to a target on either side of a shifted box is the best."""

    action_space = spaces.Box(2, 6, (1,))

    def reward(self, action: np.ndarray) -> float:
        return -(float(action[0] - 4 - self.sign) ** 2)


@pytest.mark.parametrize("squash", [False, True])
def test_a_continuous_action_that_fits_the_observation(trained, squash):
    # Small steps: a mean far beyond the bounds would see no difference between actions.
    agent = trained(Aimed, squash_actions=squash, lr=1e-3, log_std_init=-0.7, timesteps=24_576)
    assert agent.evaluate(20).mean_return > -0.02
    assert agent.predict(number(1)) == pytest.approx(5, abs=0.2)
    assert agent.predict(number(-1)) == pytest.approx(3, abs=0.2)


class Forbidden(Probe):
    """Action 2 would be best, but it is allowed only with a positive sign; else 1 is."""

    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, _ = super().reset(seed=seed)
        return observation, {"action_mask": self.mask()}

    def step(self, action: int):
        assert self.mask()[action], "a forbidden action was taken"
        return *super().step(action)[:4], {"action_mask": self.mask()}

    def mask(self) -> np.ndarray:
        return np.array([1, 1, self.sign > 0], np.int8)

    def reward(self, action: int) -> float:
        return float(action)


def test_a_masked_action(trained):
    agent = trained(Forbidden)
    result = agent.evaluate(50)
    assert set(result.returns) == {1.0, 2.0}  # the best that is allowed
    np.testing.assert_allclose(values(agent, -1, 1), [1, 2], atol=0.1)


class Nested(Probe):
    """Two observations decide on two actions, each hidden in its structure."""

    observation_space = spaces.Dict(
        {"way": spaces.Discrete(2, start=1), "more": spaces.Tuple((NUMBER, spaces.MultiBinary(2)))}
    )
    action_space = spaces.Tuple(
        (spaces.Discrete(2, start=5), spaces.Dict({"bits": spaces.MultiDiscrete([2, 2])}))
    )

    def observation(self) -> Any:
        self.way = int(self.np_random.integers(1, 3))
        bits = self.np_random.integers(0, 2, 2).astype(np.int8)
        return {"way": self.way, "more": (number(self.sign), bits)}

    def step(self, action: Any):
        reward = self.reward(action)
        return self.observation(), reward, True, False, {}

    def reward(self, action: Any) -> float:
        choice, bits = action[0], action[1]["bits"]
        return float(choice - 5 == self.way - 1) + float(bits[1] == (self.sign > 0))


def test_nested_observations_and_actions(trained):
    assert trained(Nested, timesteps=12_288).evaluate(50).mean_return == 2


def test_normalised_observations_and_rewards(trained):
    """Rewards of a thousand and observations near a million are learnt like small ones."""

    class Large(Matched):
        observation_space = spaces.Box(-np.inf, np.inf, (1,))

        def observation(self) -> np.ndarray:
            return number(1e6 + 100 * self.sign)

        def reward(self, action: int) -> float:
            return 1000 * super().reward(action)

    agent = trained(Large, normalize_observations=True, normalize_rewards=True)
    assert agent.evaluate(50).mean_return == 1000


def test_a2c_learns_with_the_same_programs(trained):
    agent = trained(
        Matched,
        algo="a2c",
        num_steps=8,
        mini_batch_size=None,
        epochs=1,
        lr=7e-3,
        timesteps=8192,
    )
    assert agent.config.algo == "a2c"
    assert agent.evaluate(50).mean_return == 1
