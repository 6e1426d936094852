"""One of EnvPool's environments as a `gymnasium.Env`, for evaluation and for watching."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from starling.envs.envpool import EnvPoolVectorEnv
from starling.envs.spaces import select


class EnvPoolEnv(gym.Env):
    """A pool of one environment; an episode that ended stays there until `reset`."""

    def __init__(self, env_id: str, **env_kwargs: Any):
        """Takes the `env_id` and `env_kwargs` of `EnvPoolVectorEnv`."""
        self._pool = EnvPoolVectorEnv(env_id, 1, env_kwargs=env_kwargs, num_workers=1, infos="all")
        self.observation_space = self._pool.single_observation_space
        self.action_space = self._pool.single_action_space
        self.metadata = dict(self._pool.metadata)
        self.spec = self._pool.spec
        self.render_mode = self._pool.render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Starts an episode; a seed builds the pool anew."""
        super().reset(seed=seed)
        observations, infos = self._pool.reset(seed=None if seed is None else [seed])
        return self._first(observations), _row(infos)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """Steps; the observation after the end of an episode is its last one."""
        self._pool.send(np.asarray(action)[None])
        observations, rewards, terminations, truncations, infos = self._pool.recv_unreset()
        return (
            self._first(observations),
            float(rewards[0]),
            bool(terminations[0]),
            bool(truncations[0]),
            _row(infos),
        )

    def render(self) -> Any:
        """An RGB frame `[H, W, 3]`."""
        return self._pool.render()[0]

    def close(self) -> None:
        """Ends the pool's thread."""
        self._pool.close()

    def _first(self, observations: Any) -> Any:
        return select(self.observation_space, observations, 0)


def _row(infos: dict[str, Any]) -> dict[str, Any]:
    return {name: value[0] for name, value in infos.items() if not name.startswith("_")}
