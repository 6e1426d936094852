"""Samples actions, with random numbers that belong to one actor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from starling.algorithms.acting import Acting
from starling.algorithms.ppo import PPO
from starling.errors import UserError
from starling.storage.rollout import map_tree

Tree = Any


class Action(NamedTuple):
    """Actions for N environments.

    Attributes:
        raw: `[N, ...]`, as sampled: what a rollout keeps.
        env: `[N, ...]`, as the environment takes them.
        policy_state: `[N, ...]`, of a recurrent policy after this step; () for the others.
    """

    raw: Tree
    env: Tree
    policy_state: Tree = ()


class Sampler:
    """Samples actions with given parameters and noise of its own.

    Noise comes in tables, one for `num_steps` actions, since drawing it step by step costs as much
    as the networks. Several samplers of one seed share the tables out: each takes every
    `stride`-th, so that no two use the same.

    Args:
        algorithm: Whose policy acts.
        num_steps: Steps that one table lasts for.
        seed: Of the noise.
        device: Where the networks compute.
        first: Number of the first table.
        stride: From one table's number to the next.
    """

    def __init__(
        self,
        algorithm: PPO,
        num_steps: int,
        seed: int,
        device: Any,
        first: int = 0,
        stride: int = 1,
    ):
        self.algorithm, self.num_steps, self.device = algorithm, num_steps, device
        self.seed, self.next_table, self.stride = np.uint32(seed), first, stride
        self._noise: Tree = None
        self._size = self._row = 0

    def act(
        self,
        acting: Acting,
        observations: Tree,
        action_mask: np.ndarray | None = None,
        policy_state: Tree = (),
    ) -> Action:
        """Samples actions for a batch; observations `[N, ...]`, mask `[N, choices]` or None."""
        size = _batch_size(observations)
        if self._row == self.num_steps or size != self._size:
            if acting.epsilon is not None and len(acting.epsilon) != size:
                raise UserError(
                    f"{size} observations were given to explore from, and there is an epsilon for "
                    f"each of {len(acting.epsilon)} environments: give an observation of each, or "
                    "use predict"
                )
            self.new_table(size)
        t = np.uint32(self._row)
        self._row += 1
        raw, env, policy_state = self.algorithm.act(
            acting, observations, self._noise, t, action_mask, policy_state
        )
        # The common case, without the walk.
        raw = np.asarray(raw) if isinstance(raw, jax.Array) else map_tree(np.asarray, raw)
        return Action(raw, raw if env is None else map_tree(np.asarray, env), policy_state)

    def new_table(self, size: int) -> Tree:
        """Draws the noise of the next `num_steps` actions of `size` environments."""
        with jax.default_device(self.device):
            self._noise = self.algorithm.draw_noise(
                self.seed, np.uint32(self.next_table), (self.num_steps, size)
            )
        self.next_table += self.stride
        self._size, self._row = size, 0
        return self._noise

    def forget(self) -> None:
        """Makes the next action begin a new table."""
        self._size = self._row = 0

    def rewind(self, table: int) -> None:
        """Makes the next action draw the table of that number, though it was used already."""
        self.next_table = table
        self.forget()


def _batch_size(observations: Tree) -> int:
    while not isinstance(observations, np.ndarray):
        if isinstance(observations, Mapping):
            observations = next(iter(observations.values()))
        elif isinstance(observations, tuple | list):
            observations = observations[0]
        else:
            observations = np.asarray(observations)
    return len(observations)
