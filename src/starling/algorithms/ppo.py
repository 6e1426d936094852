"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), and A2C as a case of it.

A2C (Mnih et al. 2016, arXiv:1602.01783, synchronous) is PPO with one pass over the whole rollout
and no clip: the ratio is 1 then, and its gradient the policy gradient (Huang et al. 2022,
arXiv:2205.09123).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax

from starling.algorithms import acting
from starling.algorithms.finite import if_finite
from starling.algorithms.minibatches import in_parts, rows_in_cache, shuffled
from starling.algorithms.optimizer import make_optimizer
from starling.algorithms.ppo_parameters import PPOParameters
from starling.algorithms.ppo_state import Minibatch, TrainState
from starling.algorithms.returns import discounted_sums, generalized_advantages
from starling.algorithms.weighted import weighted_mean, weighted_variance
from starling.networks.features import Features, normalize, vector_of
from starling.networks.network_parameters import NetworkParameters
from starling.networks.normalization import (
    RunningStatistics,
    initial_statistics,
    update_statistics,
)
from starling.networks.policy import Policy, PolicyOutput
from starling.storage.rollout import Origin, Rollout

Array = jax.Array
Tree = Any

REWARD_CLIP = 10.0
"""Normalised rewards are clipped to this."""


class PPO:
    """Pure functions for one pair of spaces: `init`, `act`, `update`.

    Args:
        observation_space: Of a single environment.
        action_space: Of a single environment.
        options: What PPO can be told.
        network: What the networks can be told.
        num_envs: N, environments in a rollout.

    Attributes:
        mesh: Devices that share out each minibatch; state and rollout have to lie on all of them.
            None: there is one.
    """

    mesh: jax.sharding.Mesh | None = None

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        options: PPOParameters,
        network: NetworkParameters,
        num_envs: int,
    ):
        self.options = options
        self.num_envs = num_envs
        self.policy = Policy(observation_space, action_space, network)
        self.optimizer = make_optimizer(options.optimizer, options.adam_eps, options.max_grad_norm)
        self._start = jax.jit(self._initial_state)
        self.act_and_keep = functools.partial(acting.act_and_keep, self.policy)
        self.act = jax.jit(functools.partial(acting.act, self.policy))
        self.predict = jax.jit(
            functools.partial(acting.predict, self.policy), static_argnames="deterministic"
        )
        self.draw_noise = jax.jit(
            functools.partial(acting.draw_noise, self.policy), static_argnums=2
        )
        self._values_at = jax.jit(self._final_values, static_argnums=3)
        self._learn = jax.jit(self._update, donate_argnums=0)

    def init(self, seed: int) -> TrainState:
        """Fresh parameters and everything that goes with them."""
        return self._start(self.policy.init(seed), np.uint32(seed))

    def _initial_state(self, params: Array, seed: Array) -> TrainState:
        options = self.options
        features = (self.policy.num_features,)
        return TrainState(
            params,
            self.optimizer.init(params),
            initial_statistics(features) if options.normalize_observations else None,
            initial_statistics(()) if options.normalize_rewards else None,
            jnp.zeros(self.num_envs) if options.normalize_rewards else None,
            jax.random.key(seed),
            updates=jnp.int32(0),
            skipped=jnp.int32(0),
            skipped_in_a_row=jnp.int32(0),
        )

    def update(
        self, state: TrainState, rollout: Rollout, progress: Array | float = 0.0
    ) -> tuple[TrainState, dict[str, Array]]:
        """Learns from a rollout: advantages, then epochs of shuffled minibatches.

        Args:
            state: Given up: its memory is used for the new one.
            rollout: T steps that these parameters collected.
            progress: Share of the training that is done, for the schedules, in [0, 1].

        Returns:
            The new state, or the old one where the new one would not be finite, and metrics as
            device scalars, by their logged names.
        """
        final_values = None
        if rollout.final_index is not None:
            final_values = self._values_at(
                state.params,
                state.observation_statistics,
                (rollout.final_observations, rollout.final_index),
                rollout.rewards.shape,
            )
        # What the program does not read must not make it compile again.
        rest = rollout._replace(final_observations=(), final_index=(), origin=Origin())
        return self._learn(state, rest, final_values, jnp.asarray(progress, jnp.float32))

    def _final_values(
        self,
        params: Array,
        statistics: RunningStatistics | None,
        finals: tuple[Tree, Array],
        shape: tuple[int, int],
    ) -> Array:
        """V of the true final observation of each truncated step `[T, N]`, 0 elsewhere."""
        observations, index = finals
        total, n = shape[0] * shape[1], index.size
        # Compiled environments give the observations of all steps, of which few were truncated:
        # those are looked at in groups, in as many as it takes.
        group = min(n, rows_in_cache(self.policy.widest))
        cut = index < total
        places = jnp.flatnonzero(cut, size=math.ceil(n / group) * group, fill_value=n)

        def look(i: Array, values: Array) -> Array:
            now = jax.lax.dynamic_slice(places, (i * group,), (group,))
            rows = jax.tree.map(lambda x: x.at[now].get(mode="clip"), observations)
            found = self.policy(params, self.policy.features(rows), statistics).value
            at = index.at[now].get(mode="fill", fill_value=total)
            return values.at[at].set(found, mode="drop")

        groups = (cut.sum() + group - 1) // group
        return jax.lax.fori_loop(0, groups, look, jnp.zeros(total)).reshape(shape)

    def _update(
        self, state: TrainState, rollout: Rollout, final_values: Array | None, progress: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        options, before = self.options, state
        state, rows, metrics = self._prepare(state, rollout, final_values)
        lr, clip = self._schedules(progress)
        key, shuffle_key = jax.random.split(state.key)
        num_rows = rows.old_value.shape[0]
        size = options.mini_batch_size or num_rows
        gradient = jax.grad(functools.partial(self.loss, clip=clip), has_aux=True)
        mean_gradient = in_parts(gradient, size, self.policy.widest, self.mesh)

        def minibatch(
            carry: tuple[Array, optax.OptState, Array], index: Array
        ) -> tuple[tuple[Array, optax.OptState, Array], Array]:
            def step(params: Array, opt_state: optax.OptState):
                batch = rows if index.size == num_rows else jax.tree.map(lambda x: x[index], rows)
                numbers, grads = mean_gradient(params, self._standardized(batch))
                updates, opt_state = self.optimizer.update(grads, opt_state, params)
                numbers = jnp.append(numbers, jnp.linalg.norm(grads))
                return params - lr * jnp.asarray(updates), opt_state, numbers

            params, opt_state, going = carry
            if options.target_kl is None:
                params, opt_state, numbers = step(params, opt_state)
                return (params, opt_state, going), jnp.append(numbers, 1.0)
            params, opt_state, numbers = jax.lax.cond(
                going,
                step,
                lambda params, opt_state: (params, opt_state, jnp.zeros(len(_LOSS_METRICS))),
                params,
                opt_state,
            )
            counted = jnp.append(numbers, going)
            going = going & (numbers[_LOSS_METRICS.index("train/approx_kl")] <= options.target_kl)
            return (params, opt_state, going), counted

        def epoch(carry: tuple, key: Array) -> tuple[tuple, Array]:
            order = shuffled(key, num_rows).reshape(-1, size)
            return jax.lax.scan(minibatch, carry, order)

        carry = (state.params, state.opt_state, jnp.bool_(True))
        keys = jax.random.split(shuffle_key, options.epochs)
        (params, opt_state, _), numbers = jax.lax.scan(epoch, carry, keys)
        numbers = numbers.reshape(-1, len(_LOSS_METRICS) + 1)
        taken = numbers[:, -1]
        means = numbers[:, :-1].sum(0) / taken.sum()
        metrics |= dict(zip(_LOSS_METRICS, means, strict=True))
        metrics["train/learning_rate"] = jnp.asarray(lr, jnp.float32)
        if clip is not None:
            metrics["train/clip_range"] = jnp.asarray(clip, jnp.float32)
        state = state._replace(
            params=params, opt_state=opt_state, key=key, updates=state.updates + 1
        )
        return if_finite(state, before), metrics

    def _schedules(self, progress: Array) -> tuple[Array | float, Array | float | None]:
        """Learning rate and clip range at some progress."""
        options, remaining = self.options, 1.0 - progress
        lr = options.lr * (remaining if options.lr_schedule == "linear" else 1.0)
        clip = options.clip_param
        if clip is not None and options.clip_schedule == "linear":
            clip = clip * remaining
        return lr, clip

    def _look_at(
        self, state: TrainState, features: Array | Features, known: tuple[Array, Array] | None
    ) -> PolicyOutput:
        """What the networks say of all steps `[T + 1, N]`, on a CPU as many as a cache holds."""

        def look(features: Array | Features) -> tuple[Array, Array]:
            out = self.policy(state.params, features, state.observation_statistics)
            return out.outputs, out.value

        def by_steps(features: Array | Features) -> tuple[Array, Array]:
            return jax.lax.map(look, features, batch_size=steps)

        all_steps, num_envs = jax.tree.leaves(features)[0].shape[:2]
        steps = max(1, rows_in_cache(self.policy.widest) // num_envs)
        if known is not None:  # but of the last
            last = look(jax.tree.map(lambda x: x[-1:], features))
            found = jax.tree.map(lambda rest, last: jnp.concatenate([rest, last]), known, last)
        elif steps >= all_steps:
            found = look(features)
        else:
            found = jax.lax.platform_dependent(features, cpu=by_steps, default=look)
        return PolicyOutput(found[0], self.policy.log_std(state.params), found[1])

    def _prepare(
        self, state: TrainState, rollout: Rollout, final_values: Array | None
    ) -> tuple[TrainState, Minibatch, dict[str, Array]]:
        """Values, advantages and old log-probabilities of all rows, in one pass of the networks.

        Statistics learn from this rollout only after it was looked at with those that the policy
        acted with: the old log-probabilities would be another policy's otherwise.
        """
        distribution = self.policy.distribution
        rollout = jax.tree.map(jnp.asarray, rollout)
        features = self.policy.features(rollout.observations)
        out = self._look_at(state, features, rollout.outputs)
        log_prob = distribution.log_prob(
            out.outputs[:-1], out.parameters, rollout.actions, rollout.action_masks
        )
        weight = None if rollout.valid is None else rollout.valid.astype(jnp.float32)
        state, rewards = self._normalized_rewards(state, rollout, weight)
        if final_values is None:
            final_values = out.value[1:]
        advantages, targets = self._advantages(rollout, rewards, out.value, final_values, log_prob)
        values = out.value[:-1]
        batch = Minibatch(
            jax.tree.map(lambda x: x[:-1], features),
            rollout.actions,
            rollout.action_masks,
            log_prob if rollout.log_probs is None else rollout.log_probs,
            values,
            advantages,
            targets,
            weight,
        )
        rows = jax.tree.map(lambda x: x.reshape(values.size, *x.shape[2:]), batch)
        rows = rows._replace(features=normalize(rows.features, state.observation_statistics))
        variance = weighted_variance(targets, weight)
        unexplained = weighted_variance(targets - values, weight) / jnp.maximum(variance, 1e-12)
        metrics = {
            "rollout/value_mean": weighted_mean(values, weight),
            "train/explained_variance": 1.0 - unexplained,
        }
        if distribution.num_parameters:
            metrics["train/std"] = jnp.exp(out.parameters).mean()
        if state.observation_statistics is not None:
            flat = vector_of(features)[:-1].reshape(values.size, -1)
            seen = update_statistics(state.observation_statistics, flat, rows.weight)
            state = state._replace(observation_statistics=seen)
        return state, rows, metrics

    def _normalized_rewards(
        self, state: TrainState, rollout: Rollout, weight: Array | None
    ) -> tuple[TrainState, Array]:
        """Rewards as they are learnt from `[T, N]`, by statistics that know this rollout's."""
        rewards = rollout.rewards
        if state.reward_statistics is None:
            return state, rewards
        before = state.reward_sums if rollout.reward_sums is None else rollout.reward_sums
        assert before is not None
        ended = jnp.logical_or(rollout.terminated, rollout.truncated)
        sums, carry = discounted_sums(rewards, ended, before, self.options.gamma, rollout.valid)
        weights = None if weight is None else weight.reshape(-1)
        statistics = update_statistics(state.reward_statistics, sums.reshape(-1), weights)
        state = state._replace(reward_statistics=statistics)
        if rollout.reward_sums is None:
            state = state._replace(reward_sums=carry)
        return state, jnp.clip(rewards / statistics.std, -REWARD_CLIP, REWARD_CLIP)

    def _advantages(
        self,
        rollout: Rollout,
        rewards: Array,
        values: Array,
        final_values: Array,
        log_prob: Array,
    ) -> tuple[Array, Array]:
        """Advantages and targets of the value `[T, N]`, for rewards as they are learnt from."""
        del log_prob  # whoever corrects for another policy's actions needs it
        return generalized_advantages(
            rewards,
            values,
            final_values,
            rollout.terminated,
            rollout.truncated,
            self.options.gamma,
            self.options.gae_lambda,
            rollout.valid,
        )

    def _standardized(self, batch: Minibatch) -> Minibatch:
        """A minibatch with normalised advantages, and weights of mean 1."""
        advantage, weight = batch.advantage, batch.weight
        if self.options.normalize_advantage:
            std = jnp.sqrt(weighted_variance(advantage, weight))
            advantage = (advantage - weighted_mean(advantage, weight)) / (std + 1e-8)
        if weight is not None:
            weight = weight * (weight.size / jnp.maximum(weight.sum(), 1.0))
        return batch._replace(advantage=advantage, weight=weight)

    def loss(
        self, params: Array, batch: Minibatch, clip: Array | float | None
    ) -> tuple[Array, Array]:
        """The clipped surrogate objective with value loss and entropy bonus (eq. 9), negated.

        It is a mean over rows: that of a minibatch is the mean of those of its equal parts.

        Args:
            params: Of the policy, `[num_weights]`.
            batch: Rows of a minibatch, with normalised features and advantages, and weights
                whose mean over the minibatch is 1.
            clip: Range of the ratio, or None.

        Returns:
            The loss, and what is logged of it: policy loss, value loss, negative entropy,
            approximate KL divergence, share of clipped ratios.
        """
        options, distribution = self.options, self.policy.distribution

        def mean(x: Array) -> Array:
            return (x if batch.weight is None else x * batch.weight).mean()

        out = self.policy(params, batch.features, None)
        log_prob = distribution.log_prob(
            out.outputs, out.parameters, batch.actions, batch.action_masks
        )
        entropy = mean(distribution.entropy(out.outputs, out.parameters, batch.action_masks))

        log_ratio = log_prob - batch.old_log_prob
        ratio = jnp.exp(log_ratio)
        surrogate = ratio * batch.advantage
        if clip is not None:
            clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * batch.advantage
            surrogate = jnp.minimum(surrogate, clipped)
        policy_loss = -mean(surrogate)

        error = jnp.square(out.value - batch.target)
        if options.value_clip is not None:
            change = jnp.clip(out.value - batch.old_value, -options.value_clip, options.value_clip)
            error = jnp.maximum(error, jnp.square(batch.old_value + change - batch.target))
        value_loss = mean(error)

        loss = policy_loss + options.value_coef * value_loss - options.entropy_coef * entropy
        approx_kl = mean(ratio - 1.0 - log_ratio)  # Schulman's low-variance estimator
        if clip is None:
            clip_fraction = jnp.zeros(())
        else:
            clip_fraction = mean((jnp.abs(ratio - 1.0) > clip).astype(jnp.float32))
        return loss, jnp.stack([policy_loss, value_loss, -entropy, approx_kl, clip_fraction])


_LOSS_METRICS = [
    "train/policy_gradient_loss",
    "train/value_loss",
    "train/entropy_loss",
    "train/approx_kl",
    "train/clip_fraction",
    "train/grad_norm",
]
