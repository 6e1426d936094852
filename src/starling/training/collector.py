"""Fills rollouts from environments that are stepped on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from starling.envs.vector_env import VectorEnv
from starling.storage.rollout import Origin, Rollout, RolloutBuffer

Tree = Any


class Action(NamedTuple):
    """Actions for N environments.

    Attributes:
        raw: `[N, ...]`, as sampled: what a rollout keeps.
        env: `[N, ...]`, as the environment takes them.
    """

    raw: Tree
    env: Tree


class HostCollector:
    """Steps a vector environment with a policy, T steps at a time.

    Attributes:
        observations: `[N, ...]`, what the next actions will be chosen for.
    """

    def __init__(self, envs: VectorEnv, num_steps: int):
        self.envs = envs
        self.buffer = RolloutBuffer(num_steps, envs.num_envs)
        self.sequence = 0

    def reset(self, seed: int | None) -> None:
        """Begins new episodes everywhere."""
        self._take(*self.envs.reset(seed=seed))

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Brings the environments back to where `envs.state()` saw them."""
        self._take(*self.envs.restore(states))

    def _take(self, observations: Tree, infos: dict[str, Any]) -> None:
        self.observations = observations
        self.action_mask: np.ndarray | None = infos.get("action_mask")

    def collect(
        self,
        act: Callable[[Tree, np.ndarray | None], Action],
        version: int,
        stop: Callable[[], bool],
    ) -> Rollout | None:
        """Collects one rollout.

        Args:
            act: Chooses actions for observations and action masks.
            version: Of the parameters that it uses.
            stop: Asked before each step.

        Returns:
            The rollout, valid until the next one; None if `stop` said so before it was full.
        """
        buffer, envs = self.buffer, self.envs
        observations, mask = self.observations, self.action_mask
        buffer.begin(observations)
        for _ in range(buffer.num_steps):
            if stop():
                return None
            action = act(observations, mask)
            observations, rewards, terminated, truncated, infos = envs.step(action.env)
            buffer.add(action.raw, observations, rewards, terminated, truncated, infos, mask)
            if mask is not None:
                mask = infos["action_mask"]
        self.observations, self.action_mask = observations, mask
        rollout = buffer.finish(Origin(version, 0, self.sequence))
        self.sequence += 1
        return rollout
