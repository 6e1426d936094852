"""Distributed prioritised replay (Ape-X: Horgan et al. 2018, arXiv:1803.00933).

What actors need of DQN: each environment explores with an epsilon of its own, and whoever collects
a transition gives it its first priority, so that the learner need not look at it before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starling.algorithms.acting import Acting
from starling.algorithms.dqn import LEAST_PRIORITY, DQNAlgorithm
from starling.networks.q_network import pick
from starling.storage.rollout import Origin, Rollout

Array = jax.Array


def epsilons(num_envs: int) -> np.ndarray:
    """Share of random actions in each environment, `[N]`: 0.4^(1 + 7 i / (N - 1)) (section 4)."""
    return (0.4 ** (1 + 7 * np.arange(num_envs) / max(num_envs - 1, 1))).astype(np.float32)


class ApeX(DQNAlgorithm):
    """DQN, with `describe` for actors."""

    def __init__(self, *told: Any):
        super().__init__(*told)
        self._priorities = jax.jit(self.priorities)

    def begin(self, num_envs: int) -> None:
        """Nothing is carried from rollout to rollout."""

    def share(self, acting: Acting, actor: int, num_envs: int) -> Acting:
        """What an actor acts with: the parameters, and the epsilons of its own environments."""
        assert acting.epsilon is not None
        return acting._replace(epsilon=acting.epsilon[actor * num_envs :][:num_envs])

    def describe(self, acting: Acting, rollout: Rollout, carry: None) -> tuple[Rollout, None]:
        """Adds the first priorities to a rollout, where the replay draws by them.

        Args:
            acting: What chose the actions.
            rollout: `[T, N, ...]`.
            carry: None.
        """
        if not self.options.prioritized:
            return rollout, None
        errors = self._priorities(acting, rollout._replace(origin=Origin()))
        priorities = np.nan_to_num(np.asarray(errors), posinf=0.0) + LEAST_PRIORITY
        return rollout._replace(priorities=priorities), carry

    def priorities(self, acting: Acting, rollout: Rollout) -> Array:
        """Absolute TD errors of the returns of n steps, `[T, N]`.

            |G_t - Q(s_t, a_t)|,    G_t = R_t + gamma (G_{t+1} or v_t)

        v_t is the greatest value of what step t led to: 0 where the episode terminated, of the true
        final observation where it was truncated. It takes the place of the rest of a return after n
        steps, and earlier where the episode or the rollout ends: the rows whose returns reach into
        the next rollout get the error of a shorter one.
        """
        policy = self.policy
        params, statistics, _ = acting
        q = policy(params, policy.features(rollout.observations), statistics)
        values = self._greatest(q[1:], _masks_after(rollout.action_masks))
        if rollout.final_index is not None:
            finals = policy(params, policy.features(rollout.final_observations), statistics)
            flat = values.reshape(-1).at[rollout.final_index]
            values = flat.set(self._greatest(finals, None), mode="drop").reshape(values.shape)
        values = jnp.where(rollout.terminated, 0.0, values)
        ends = jnp.logical_or(rollout.terminated, rollout.truncated)
        if rollout.valid is not None:  # a step that was lost cuts what came before it
            ends = ends.at[:-1].set(ends[:-1] | ~rollout.valid[1:])
        returns = rollout.rewards + self.options.gamma * values
        for _ in range(self.options.n_step - 1):
            later = jnp.where(ends[:-1], values[:-1], returns[1:])
            later = jnp.concatenate([later, values[-1:]])
            returns = rollout.rewards + self.options.gamma * later
        chosen = pick(q[:-1], policy.from_raw(rollout.actions))
        return jnp.abs(returns[..., None] - chosen).mean(-1)

    def _greatest(self, q: Array, masks: Array | None) -> Array:
        """Value of the best actions, the mean over their components."""
        return pick(q, self.policy.best(q, masks)).mean(-1)


def _masks_after(masks: Array | None) -> Array | None:
    """What was allowed after each step: all, where the next rollout knows it."""
    if masks is None:
        return None
    return jnp.concatenate([masks[1:], jnp.ones_like(masks[:1])])
