"""PPO on rollouts that older policies collected: V-trace returns under the clipped surrogate.

The surrogate is PPO's, with the policy that acted, mu, as the old one (IMPALA's correction in
Schulman et al.'s objective, as in Luo et al. 2020, arXiv:1912.00167):

    r_t = pi(a_t | s_t) / mu(a_t | s_t)
    L = -E[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)] + c_v E[(V(s_t) - v_t)^2] - c_e E[H]

with A_t and v_t by V-trace (`returns.vtrace`) from pi and V as they are before the update. Where no
update came between (lag 0), pi is mu, and this is PPO.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starling.algorithms.acting import Acting
from starling.algorithms.ppo import PPO
from starling.algorithms.ppo_state import TrainState
from starling.algorithms.returns import discounted_sums, vtrace
from starling.networks.policy import PolicyOutput
from starling.storage.rollout import Origin, Rollout

Array = jax.Array


class VTracePPO(PPO):
    """PPO, corrected for the lag between the policy that acted and the one that learns.

    An update leaves `Acting` of the state that it is given intact, since actors may be using it.
    """

    options: Any  # PPOParameters and LagParameters in one

    def __init__(self, *told: Any):
        super().__init__(*told)
        # Who waits for the update acts with what will learn: what the networks say, it knows.
        self._keeps_outputs = getattr(self.options, "sync_mode", "") == "blocking"
        self._learn_beside_actors = jax.jit(self._update_beside_actors, donate_argnums=1)
        self._learn = self._split
        self._described = jax.jit(self._describe)

    def _split(self, state: TrainState, *rest: Any) -> tuple[TrainState, dict[str, Array]]:
        acting = Acting(state.params, state.observation_statistics)
        own = state._replace(params=None, observation_statistics=None)
        return self._learn_beside_actors(acting, own, *rest)

    def _update_beside_actors(
        self, acting: Acting, own: TrainState, *rest: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        params, statistics, _ = acting
        return self._update(own._replace(params=params, observation_statistics=statistics), *rest)

    def _advantages(
        self,
        rollout: Rollout,
        rewards: Array,
        values: Array,
        final_values: Array,
        log_prob: Array,
    ) -> tuple[Array, Array]:
        options = self.options
        if rollout.log_probs is None or options.correction == "none":
            return super()._advantages(rollout, rewards, values, final_values, log_prob)
        return vtrace(
            rewards,
            values,
            final_values,
            rollout.terminated,
            rollout.truncated,
            log_prob - rollout.log_probs,
            options.gamma,
            options.gae_lambda,
            options.rho_clip,
            options.c_clip,
            rollout.valid,
        )

    def _look_at(self, state: TrainState, features: Any, known: Any) -> PolicyOutput:
        """What the networks say now; what they said when they acted was of older parameters.

        In blocking runs it was of these, and is taken as it is.
        """
        return super()._look_at(state, features, known if self._keeps_outputs else None)

    def begin(self, num_envs: int) -> np.ndarray | None:
        """What an actor carries from rollout to rollout, where its environments begin episodes.

        Returns:
            Discounted sums of the rewards of the episodes under way, `[N]`; None where rewards are
            not normalised.
        """
        return np.zeros(num_envs, np.float32) if self.options.normalize_rewards else None

    def share(self, acting: Acting, actor: int, num_envs: int) -> Acting:
        """What an actor acts with: the same as all others."""
        del actor, num_envs
        return acting

    def describe(
        self, acting: Acting, rollout: Rollout, reward_sums: np.ndarray | None
    ) -> tuple[Rollout, np.ndarray | None]:
        """Adds what a rollout needs to be learnt from later, by whoever collected it.

        Args:
            acting: What chose the actions.
            rollout: `[T, N, ...]`.
            reward_sums: `[N]`, carried on from the rollout before.

        Returns:
            The rollout with log-probabilities and reward sums, and in blocking runs with what the
            networks said; and what is carried on, that of before where it would not be finite, as
            nothing is learnt from such a rollout.
        """
        read = rollout._replace(final_observations=(), final_index=(), origin=Origin())
        described = self._described(acting, read, reward_sums)
        log_probs, outputs, after = jax.device_get(described)
        rollout = rollout._replace(log_probs=log_probs, reward_sums=reward_sums, outputs=outputs)
        return rollout, after

    def _describe(
        self, acting: Acting, rollout: Rollout, reward_sums: Array | None
    ) -> tuple[Array, tuple[Array, Array] | None, Array | None]:
        if rollout.outputs is None:
            observations = jax.tree.map(lambda x: x[:-1], rollout.observations)
            features = self.policy.features(observations)
            out = self.policy(acting.params, features, acting.observation_statistics)
            outputs, values = out.outputs, out.value
        else:
            outputs, values = rollout.outputs
        kept = (outputs, values) if self._keeps_outputs else None
        log_std = self.policy.log_std(acting.params)
        log_probs = self.policy.distribution.log_prob(
            outputs, log_std, rollout.actions, rollout.action_masks
        )
        if reward_sums is None:
            return log_probs, kept, None
        ended = jnp.logical_or(rollout.terminated, rollout.truncated)
        gamma = self.options.gamma
        after = discounted_sums(rollout.rewards, ended, reward_sums, gamma, rollout.valid)[1]
        return log_probs, kept, jnp.where(jnp.isfinite(after), after, reward_sums)
