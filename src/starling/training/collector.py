"""Fills rollouts from environments that are stepped on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from starling.envs.vector_env import VectorEnv, heeding
from starling.storage.rollout import Origin, Rollout, RolloutBuffer
from starling.training.sampler import Action

Tree = Any


class Policy(Protocol):
    """What acts: an agent, or an actor's share of one.

    Attributes:
        version: Of its parameters.
    """

    version: int

    def act(self, observations: Tree, action_mask: Any, policy_state: Tree) -> Action:
        """Samples actions for observations `[N, ...]`."""
        ...


class HostCollector:
    """Steps a vector environment with a policy, T steps at a time.

    Attributes:
        observations: `[N, ...]`, what the next actions will be chosen for.
        activity: What a trainer that waits for a rollout is doing.
    """

    activity = "collect"

    def __init__(self, envs: VectorEnv, num_steps: int):
        self.envs = envs
        self.buffer = RolloutBuffer(num_steps, envs.num_envs)
        self.sequence = 0

    def reset(self, seed: int | Sequence[int] | None) -> None:
        """Begins new episodes everywhere."""
        self._take(*self.envs.reset(seed=seed))

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Brings the environments back to where `envs.state()` saw them."""
        self._take(*self.envs.restore(states))

    def _take(self, observations: Tree, infos: dict[str, Any]) -> None:
        self.observations = observations
        self.action_mask = _copied(infos.get("action_mask"))
        self.policy_state: Tree = ()

    def collect(
        self,
        policy: Policy,
        stop: Callable[[], bool],
    ) -> Rollout | None:
        """Collects one rollout.

        Args:
            policy: Chooses the actions.
            stop: Asked before each step.

        Returns:
            The rollout, valid until the next one; None if `stop` said so before it was full.
        """
        with heeding(self.envs, stop):
            return self._collect(policy, stop)
        return None

    def _collect(self, policy: Policy, stop: Callable[[], bool]) -> Rollout | None:
        buffer, envs = self.buffer, self.envs
        buffer.begin(self.observations, self.policy_state)
        for _ in range(buffer.num_steps):
            if stop():
                return None
            mask = self.action_mask
            action = policy.act(self.observations, mask, self.policy_state)
            observations, rewards, terminated, truncated, infos = envs.step(action.env)
            buffer.add(action.raw, observations, rewards, terminated, truncated, infos, mask)
            self.observations, self.policy_state = observations, action.policy_state
            self.action_mask = _copied(infos.get("action_mask"))
        rollout = buffer.finish(Origin(policy.version, 0, self.sequence))
        self.sequence += 1
        return rollout


def _copied(mask: np.ndarray | None) -> np.ndarray | None:
    """A mask for keeps: the environments may write the next one into the same array."""
    return None if mask is None else np.array(mask)
