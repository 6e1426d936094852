"""PPO sees where a square is: an environment of pixels, small enough for every test run."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import starling
from starling.storage.rollout import RolloutBuffer
from starling.training.parallel_ppo import ParallelPPO

SETTINGS = {
    "num_envs": 8,
    "num_steps": 16,
    "mini_batch_size": 64,
    "epochs": 4,
    "hidden_sizes": (32,),
    "lr": 1e-3,
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 1536,
    "save_interval": 0,
}


class Square(gym.Env):
    """A bright square on the left or on the right, among noise; the reward is for saying which."""

    observation_space: spaces.Space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.side = int(self.np_random.integers(2))
        return self.observation(), {}

    def step(self, action: Any):
        return self.observation(), float(action == self.side), True, False, {}

    def image(self) -> np.ndarray:
        image = self.np_random.integers(0, 60, (1, 36, 36), np.uint8)
        top, left = self.np_random.integers(0, 26), self.np_random.integers(0, 8)
        left += 18 * self.side
        image[:, top : top + 10, left : left + 10] += 150
        return image

    def observation(self) -> Any:
        return self.image()


class SquareAndSwitch(Square):
    """The same, with a switch beside the image that turns the right answer over."""

    observation_space = spaces.Dict(
        {"camera": Square.observation_space, "switch": spaces.Discrete(2)}
    )

    def observation(self) -> Any:
        return {"camera": self.image(), "switch": np.int64(self.switch)}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        gym.Env.reset(self, seed=seed)
        self.side, self.switch = (int(x) for x in self.np_random.integers(2, size=2))
        return self.observation(), {}

    def step(self, action: Any):
        return self.observation(), float(action == self.side ^ self.switch), True, False, {}


@pytest.fixture
def make(tmp_path, closed_at_the_end):
    def make_agent(env: Any, **settings: Any) -> ParallelPPO:
        return closed_at_the_end(
            ParallelPPO(env, **{**SETTINGS, "log_dir": str(tmp_path), **settings})
        )

    return make_agent


@pytest.mark.slow
def test_ppo_learns_from_pixels(make):
    agent = make(Square)
    assert agent.evaluate(episodes=100, seed=1).mean_return < 0.75
    agent.train(quiet=True)
    assert agent.evaluate(episodes=100, seed=1).mean_return > 0.95


def test_ppo_learns_from_pixels_and_numbers_at_once(make, tmp_path):
    """Neither tells the answer alone; images are not normalised, the switch is."""
    agent = make(SquareAndSwitch, normalize_observations=True, timesteps=4096)
    assert agent.evaluate(episodes=100, seed=1).mean_return < 0.75
    agent.train(quiet=True)
    assert agent.evaluate(episodes=100, seed=1).mean_return > 0.95
    assert agent.state.observation_statistics.mean.shape == (2,)

    agent.save(tmp_path / "square.ckpt")
    seen = [SquareAndSwitch().reset(seed=seed)[0] for seed in range(6)]
    batch = {name: np.stack([one[name] for one in seen]) for name in seen[0]}
    with starling.load(tmp_path / "square.ckpt") as loaded:
        np.testing.assert_array_equal(loaded.predict(batch), agent.predict(batch))
        assert loaded.predict(seen[0]) == agent.predict(seen[0])


def test_images_are_bytes_in_the_rollout_and_in_what_the_update_keeps(make):
    agent = make(Square, normalize_observations=True)  # of which there is nothing but the image
    buffer = RolloutBuffer(16, 8)
    observations = np.zeros((8, 1, 36, 36), np.uint8)
    buffer.begin(observations)
    never = np.zeros(8, np.bool_)
    for _ in range(16):
        action = agent.act(observations)
        buffer.add(action.raw, observations, np.zeros(8), never, never, {})
    rollout = buffer.finish()
    assert rollout.observations.dtype == np.uint8
    _, rows, _ = agent.algorithm._prepare(agent.state, rollout, np.zeros((16, 8), np.float32))
    assert rows.features.images[0].dtype == np.uint8
    assert rows.features.images[0].shape == (128, 1, 36, 36)
