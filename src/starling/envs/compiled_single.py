"""An environment written in JAX as a `gymnasium.Env`, for evaluation and for watching."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from starling.envs.compiled import BatchedEnv, JaxEnv
from starling.envs.compiled_vector import CompiledVectorEnv
from starling.envs.spaces import flatten, select, unflatten


class CompiledSingleEnv(gym.Env):
    """One environment in a program of its own, stepped by the caller."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, env: JaxEnv):
        """Takes over `env`."""
        self._envs = CompiledVectorEnv(BatchedEnv(env, 1))
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.spec = self._envs.spec

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Starts an episode."""
        super().reset(seed=seed)
        observations, infos = self._envs.reset(seed=None if seed is None else [seed])
        return select(self.observation_space, observations, 0), _masks(infos)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """Steps; the observation after the end of an episode is its last one."""
        space = self.action_space
        batch = unflatten(space, [np.asarray(leaf)[None] for leaf in flatten(space, action)])
        observations, rewards, terminations, truncations, infos = self._envs.step(batch)
        observation = select(self.observation_space, observations, 0)
        if "final_obs" in infos:
            observation = infos["final_obs"][0]
        ends = bool(terminations[0]), bool(truncations[0])
        return observation, float(rewards[0]), *ends, _masks(infos)

    def close(self) -> None:
        """Forgets the state."""
        self._envs.close()


def _masks(infos: dict[str, Any]) -> dict[str, Any]:
    return {"action_mask": infos["action_mask"][0]} if "action_mask" in infos else {}
