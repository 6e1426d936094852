"""Deep Q-learning (Mnih et al. 2015, doi:10.1038/nature14236) and what was added to it since.

Double estimator: van Hasselt et al. 2016, arXiv:1509.06461. Dueling streams: Wang et al. 2016,
arXiv:1511.06581. Prioritised replay: Schaul et al. 2016, arXiv:1511.05952. Returns of several
steps, and all of these at once: Hessel et al. 2018, arXiv:1710.02298. Actions of several
components: Tavakoli et al. 2018, arXiv:1711.08946.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import optax

from starling.algorithms.acting import Acting, noise_key, prediction_key
from starling.algorithms.dqn_parameters import DQNParameters
from starling.algorithms.finite import if_finite
from starling.algorithms.optimizer import make_optimizer
from starling.networks.features import vector_of
from starling.networks.network_parameters import LayerParameters
from starling.networks.normalization import (
    RunningStatistics,
    initial_statistics,
    merge_statistics,
    statistics_of,
)
from starling.networks.q_network import QNetwork, pick

Array = jax.Array
Tree = Any
Batch = Any  # starling.storage.batch.Batch, of JAX's arrays


class DQNState(NamedTuple):
    """All that changes while learning.

    Attributes:
        params: Flat parameter vector of the network, `[num_weights]`.
        target_params: Of the target network, `[num_weights]`.
        opt_state: The optimiser's.
        observation_statistics: Of the observation features, or None if not normalised.
        updates: Gradient steps made.
        skipped: Calls of `update` that changed nothing, since the result was not finite.
        skipped_in_a_row: Of these, those since the last one that did.
    """

    params: Array
    target_params: Array
    opt_state: optax.OptState
    observation_statistics: RunningStatistics | None
    updates: Array
    skipped: Array
    skipped_in_a_row: Array


class Noise(NamedTuple):
    """What chance decides of T steps of N environments, uniform in [0, 1).

    Attributes:
        explore: `[T, N]`; below epsilon the action is random.
        choices: `[T, N, D, n]`; the greatest one is the random action.
    """

    explore: Array
    choices: Array


class DQNAlgorithm:
    """Pure functions for one pair of spaces: `init`, `act`, `update`.

    Args:
        observation_space: Of a single environment.
        action_space: Of a single environment.
        options: What DQN can be told.
        network: What the network can be told.
        num_envs: As the algorithms of on-policy trainers take it; means nothing here.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        options: DQNParameters,
        network: LayerParameters,
        num_envs: int = 1,
    ):
        del num_envs
        self.options = options
        self.policy = QNetwork(observation_space, action_space, network, options.dueling)
        self.optimizer = make_optimizer("adam", options.adam_eps, options.max_grad_norm)
        self._start = jax.jit(self._initial_state)
        self.act = jax.jit(self._act)
        self.predict = jax.jit(self._predict, static_argnames="deterministic")
        self.draw_noise = jax.jit(self._noise, static_argnums=2)
        self.seen = jax.jit(self._seen)
        self.observe = jax.jit(self._observe, donate_argnums=0)
        self.update = jax.jit(self._update, donate_argnums=0)

    def init(self, seed: int) -> DQNState:
        """Fresh parameters and everything that goes with them."""
        return self._start(self.policy.init(seed))

    def _initial_state(self, params: Array) -> DQNState:
        features = (self.policy.num_features,)
        return DQNState(
            params,
            jnp.copy(params),
            self.optimizer.init(params),
            initial_statistics(features) if self.options.normalize_observations else None,
            updates=jnp.int32(0),
            skipped=jnp.int32(0),
            skipped_in_a_row=jnp.int32(0),
        )

    def _noise(self, seed: Array, table: Array, shape: tuple[int, int]) -> Noise:
        """Table number `table` of the noise that actions are drawn with."""
        explore, choices = jax.random.split(noise_key(seed, table))
        return Noise(
            jax.random.uniform(explore, shape),
            jax.random.uniform(choices, (*shape, *self.policy.shape)),
        )

    def _act(
        self,
        acting: Acting,
        observation: Tree,
        noise: Noise,
        t: Array,
        action_mask: Array | None = None,
        carry: Tree = (),
    ) -> tuple[Tree, Tree, Tree]:
        """Chooses actions for one step of a rollout: the best ones, or with epsilon any.

        Args:
            acting: Parameters, statistics and epsilon.
            observation: `[N, ...]`.
            noise: Drawn with `draw_noise` for the whole rollout.
            t: Which row of the noise to use.
            action_mask: `[N, choices]`, or None.
            carry: State of a recurrent network; () for these, which have none.

        Returns:
            Raw actions, the environment's actions (both `[N, ...]`; None where they are the raw
            ones), and the next carry.
        """
        policy = self.policy
        params, statistics, epsilon = acting
        q = policy(params, policy.features(observation), statistics)
        best, random = policy.best(q, action_mask), policy.best(noise.choices[t], action_mask)
        explores = noise.explore[t] < epsilon
        raw = policy.to_raw(jnp.where(explores[:, None], random, best))
        env = policy.to_env(raw)
        return raw, None if env is raw else env, carry

    def _predict(
        self,
        params: Array,
        statistics: RunningStatistics | None,
        observation: Tree,
        seed: Array,
        count: Array,
        action_mask: Array | None = None,
        deterministic: bool = True,
    ) -> Tree:
        """The environment's actions `[..., *space]`: the best, or of epsilon_end random ones."""
        policy = self.policy
        q = policy(params, policy.features(observation), statistics)
        choices = policy.best(q, action_mask)
        if not deterministic:
            explore, random = jax.random.split(prediction_key(seed, count))
            explores = jax.random.uniform(explore, q.shape[:-2]) < self.options.epsilon_end
            others = policy.best(jax.random.uniform(random, q.shape), action_mask)
            choices = jnp.where(explores[..., None], others, choices)
        return policy.to_env(policy.to_raw(choices))

    def _seen(self, observations: Tree, valid: Array | None) -> RunningStatistics:
        """Statistics of a rollout's observations `[T, N, ...]`."""
        vectors = vector_of(self.policy.features(observations))
        weights = None if valid is None else valid.astype(jnp.float32).reshape(-1)
        *batch_shape, width = vectors.shape  # 0 wide where all is images
        return statistics_of(vectors.reshape(math.prod(batch_shape), width), weights)

    def _observe(self, state: DQNState, seen: RunningStatistics) -> DQNState:
        """Takes what was seen in a rollout into the statistics."""
        assert state.observation_statistics is not None
        statistics = merge_statistics(state.observation_statistics, seen)
        return state._replace(observation_statistics=statistics)

    def _update(
        self, state: DQNState, sums: Array, batches: Batch, count: Array, progress: Array
    ) -> tuple[DQNState, Array, Array, dict[str, Array]]:
        """Makes gradient steps, one with each minibatch.

        Args:
            state: Given up: its memory is used for the new one.
            sums: `[NUM_SUMS]`, of what is logged of the gradient steps so far, 0 at first.
            batches: K minibatches of B transitions, `[K, B, ...]`.
            count: Only so many of the K are learnt from.
            progress: Share of the training that is done, in [0, 1].

        Returns:
            The new state, or the old one where the new one would not be finite; the new sums; each
            transition's absolute TD error `[K, B]`; and metrics as device scalars, by their logged
            names, of all gradient steps in the sums.
        """
        gradient = jax.grad(self.loss, has_aux=True)
        lr = self.options.lr * (1.0 - progress if self.options.lr_schedule == "linear" else 1.0)

        def step(k: Array, carry: tuple[DQNState, Array, Array]) -> tuple[DQNState, Array, Array]:
            state, sums, errors = carry
            batch = jax.tree.map(lambda x: x[k], batches)
            grads, (error, numbers) = gradient(
                state.params, state.target_params, state.observation_statistics, batch
            )
            norm = jnp.linalg.norm(grads)
            sums = sums + jnp.concatenate([numbers, jnp.stack([norm, 1.0])])
            return self._descend(state, grads, lr), sums, errors.at[k].set(error)

        before, errors = state, jnp.zeros(batches.returns.shape)
        state, sums, errors = jax.lax.fori_loop(0, count, step, (state, sums, errors))
        means = sums[:-1] / jnp.maximum(sums[-1], 1.0)
        metrics = dict(zip(_METRICS, means, strict=True))
        metrics["train/learning_rate"] = jnp.asarray(lr, jnp.float32)
        return if_finite(state, before), sums, errors, metrics

    def _descend(self, state: DQNState, grads: Array, lr: Array | float) -> DQNState:
        """One step of the optimiser, after which the target network follows."""
        options = self.options
        changes, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = state.params - lr * jnp.asarray(changes)
        updates = state.updates + 1
        if options.target_update_interval is None:
            assert options.tau is not None
            target = state.target_params + options.tau * (params - state.target_params)
        else:
            now = updates % options.target_update_interval == 0
            target = jnp.where(now, params, state.target_params)
        return state._replace(
            params=params, target_params=target, opt_state=opt_state, updates=updates
        )

    def targets(
        self,
        params: Array,
        target_params: Array,
        statistics: RunningStatistics | None,
        batch: Batch,
    ) -> Array:
        """What Q is drawn towards, `[B]` (van Hasselt et al. 2016, eq. 4; Hessel et al. 2018).

            y = R + gamma^m Q'(s', argmax_a Q(s', a))

        R sums the discounted rewards of m steps, after which s' was observed; gamma^m is 0 where
        the episode terminated on the way. Q' is the target network; it also chooses a if the
        estimator is not double. Masked actions are never chosen. Of D components each chooses for
        itself, and Q' is the mean of their values (Tavakoli et al. 2018, eq. 5).
        """
        policy = self.policy
        features = policy.features(batch.next_observations)
        next_q = policy(target_params, features, statistics)
        chooser = policy(params, features, statistics) if self.options.double else next_q
        choices = policy.best(chooser, batch.next_action_masks)
        return batch.returns + batch.discounts * pick(next_q, choices).mean(-1)

    def loss(
        self,
        params: Array,
        target_params: Array,
        statistics: RunningStatistics | None,
        batch: Batch,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The mean loss of the TD errors, each with its weight.

            L = mean_i w_i mean_d l(y_i - Q_d(s_i, a_i))

        l(x) is x^2 / 2, or for "huber" |x| - 1/2 beyond 1 (Mnih et al. 2015, clipped errors). d
        runs over the components of an action (Tavakoli et al. 2018, eq. 6). w corrects for drawing
        by priority (Schaul et al. 2016, sec. 3.4), and is 1 otherwise.

        Args:
            params: Of the network, `[num_weights]`.
            target_params: Of the target network, `[num_weights]`.
            statistics: Of the observations, or None.
            batch: A minibatch, `[B, ...]`.

        Returns:
            The loss; each transition's absolute TD error `[B]`, the mean over the components; and
            what is logged: the loss, the mean of Q and of the absolute TD error.
        """
        policy = self.policy
        targets = jax.lax.stop_gradient(self.targets(params, target_params, statistics, batch))
        q = policy(params, policy.features(batch.observations), statistics)
        chosen = pick(q, policy.from_raw(batch.actions))
        errors = targets[:, None] - chosen
        size = jnp.abs(errors)
        losses = jnp.square(errors) / 2
        if self.options.loss == "huber":
            losses = jnp.where(size <= 1.0, losses, size - 0.5)
        loss = (batch.weights * losses.mean(-1)).mean()
        size = size.mean(-1)
        return loss, (size, jnp.stack([loss, chosen.mean(), size.mean()]))


_METRICS = ["train/loss", "train/q_mean", "train/td_error", "train/grad_norm"]

LEAST_PRIORITY = 1e-6
"""What a priority is above its TD error: a transition without one may be drawn again."""

NUM_SUMS = len(_METRICS) + 1
"""Sums that `update` carries on: of each metric, and the number of gradient steps."""
