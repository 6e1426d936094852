"""An environment whose step takes a millisecond in which the processor has nothing to do.

So it is with simulators on other machines, robots and web services.
"""

from __future__ import annotations

import time

import gymnasium
import numpy as np

STEP = 1e-3  # seconds
EPISODE = 200  # steps


class Sleeping(gymnasium.Env[np.ndarray, np.int64]):
    """Episodes of fixed length with a reward for the action that the observation names."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        """Begins an episode."""
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        """Sleeps."""
        time.sleep(STEP)
        reward = float(action == (self.observation[0] > 0))
        self.steps += 1
        return self._observe(), reward, False, self.steps == EPISODE, {}

    def _observe(self) -> np.ndarray:
        self.observation = self.np_random.uniform(-1.0, 1.0, 4).astype(np.float32)
        return self.observation


class SleepingCartPole(gymnasium.Wrapper):
    """CartPole-v1, asleep for a millisecond at each step."""

    def __init__(self):
        super().__init__(gymnasium.make("CartPole-v1"))

    def step(self, action):
        """Sleeps."""
        time.sleep(STEP)
        return self.env.step(action)


class SleepingPixels(gymnasium.Env[np.ndarray, np.int64]):
    """Images as those of Atari games, four in a stack; a step sleeps for a millisecond."""

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = gymnasium.spaces.Discrete(6)

    def reset(self, *, seed=None, options=None):
        """Begins an episode."""
        super().reset(seed=seed)
        self.images = self.np_random.integers(0, 256, (8, 84, 84, 4), np.uint8)
        self.steps = 0
        return self.images[0], {}

    def step(self, action):
        """Sleeps."""
        time.sleep(STEP)
        self.steps += 1
        return self.images[self.steps % 8], 0.0, False, self.steps == EPISODE, {}
