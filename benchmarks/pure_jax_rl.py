"""PPO on device as PureJaxRL published it (Lu et al. 2022), written anew from its description.

One jitted function trains: a scan over updates, of a scan over environment steps, advantages by a
scan backwards, and scans over epochs and minibatches. Two separate networks in Flax, gradients
clipped and applied by an Optax chain, actions drawn from a distribution object, the whole batch
shuffled by `jax.random.permutation` before each epoch. A wrapper keeps track of returns.

Only the environments differ: both sides step Starling's, so that the algorithms are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.initializers import constant, orthogonal
from flax.training.train_state import TrainState

from starling.envs.compiled import CompiledEnv

Array = jax.Array


class Settings(NamedTuple):
    """Hyper-parameters, with the published values for CartPole-v1."""

    num_updates: int
    num_envs: int = 512
    num_steps: int = 128
    epochs: int = 4
    minibatches: int = 4
    lr: float = 2.5e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_grad_norm: float = 0.5


class Categorical(NamedTuple):
    """One choice among some."""

    logits: Array

    def sample(self, seed: Array) -> Array:
        """A choice for each row."""
        return jax.random.categorical(seed, self.logits)

    def log_prob(self, choice: Array) -> Array:
        """Log-probability of choices."""
        logits = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(logits, choice[..., None], -1)[..., 0]

    def entropy(self) -> Array:
        """In nats."""
        logits = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(logits) * logits, -1)


class ActorCritic(nn.Module):
    """Two networks of their own, 64-64 tanh."""

    num_actions: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Categorical, Array]:
        """The distribution of actions, and the value."""

        def network(outputs: int, gain: float) -> Array:
            hidden = x
            for _ in range(2):
                layer = nn.Dense(64, kernel_init=orthogonal(np.sqrt(2)), bias_init=constant(0.0))
                hidden = nn.tanh(layer(hidden))
            last = nn.Dense(outputs, kernel_init=orthogonal(gain), bias_init=constant(0.0))
            return last(hidden)

        return Categorical(network(self.num_actions, 0.01)), network(1, 1.0)[..., 0]


class Transition(NamedTuple):
    """One step of all environments."""

    done: Array
    action: Array
    value: Array
    reward: Array
    log_prob: Array
    observation: Array
    info: dict[str, Array]


class Logged(NamedTuple):
    """State of the environments with the returns and lengths of their episodes."""

    env: Any
    returns: Array
    lengths: Array
    finished_returns: Array
    finished_lengths: Array
    steps: Array


def reset_logged(env: CompiledEnv, key: Array) -> tuple[Logged, Array]:
    """Begins everywhere."""
    state, observation = env.reset(key)
    zeros, counts = jnp.zeros(env.num_envs), jnp.zeros(env.num_envs, jnp.int32)
    return Logged(state, zeros, counts, zeros, counts, counts), observation


def step_logged(env: CompiledEnv, state: Logged, action: Array) -> tuple:
    """Steps, and keeps track of returns: state, observation, reward, done, info."""
    inner, out = env.step(state.env, action)
    done = out.terminated | out.truncated
    returns, lengths = state.returns + out.reward, state.lengths + 1
    state = Logged(
        inner,
        jnp.where(done, 0.0, returns),
        jnp.where(done, 0, lengths),
        jnp.where(done, returns, state.finished_returns),
        jnp.where(done, lengths, state.finished_lengths),
        state.steps + 1,
    )
    info = {
        "returned_episode_returns": state.finished_returns,
        "returned_episode_lengths": state.finished_lengths,
        "timestep": state.steps,
        "returned_episode": done,
    }
    return state, out.observation, out.reward, done, info


def make_train(env: CompiledEnv, settings: Settings) -> Callable[[Array], dict[str, Any]]:
    """The function that trains from a key; to be jitted whole."""
    s = settings
    num_rows = s.num_envs * s.num_steps
    network: Any = ActorCritic(int(env.single_action_space.n))  # type: ignore[attr-defined]

    def annealed(count: Any) -> Any:
        return s.lr * (1.0 - (count // (s.minibatches * s.epochs)) / s.num_updates)

    def train(key: Array) -> dict[str, Any]:
        key, key_init, key_reset = jax.random.split(key, 3)
        zeros = jnp.zeros(env.single_observation_space.shape or ())
        optimizer = optax.chain(
            optax.clip_by_global_norm(s.max_grad_norm),
            optax.adam(learning_rate=annealed, eps=1e-5),
        )
        learner = TrainState.create(
            apply_fn=network.apply, params=network.init(key_init, zeros), tx=optimizer
        )
        state, observation = reset_logged(env, key_reset)

        def env_step(carry: tuple, _: None) -> tuple[tuple, Transition]:
            learner, state, before, key = carry
            key, key_action = jax.random.split(key)
            distribution, value = network.apply(learner.params, before)
            action = distribution.sample(seed=key_action)
            log_prob = distribution.log_prob(action)
            state, after, reward, done, info = step_logged(env, state, action)
            made = Transition(done, action, value, reward, log_prob, before, info)
            return (learner, state, after, key), made

        def advantages(batch: Transition, last_value: Array) -> tuple[Array, Array]:
            def backwards(carry: tuple, step: Transition) -> tuple[tuple, Array]:
                advantage, next_value = carry
                going = 1.0 - step.done
                delta = step.reward + s.gamma * next_value * going - step.value
                advantage = delta + s.gamma * s.gae_lambda * going * advantage
                return (advantage, step.value), advantage

            start = (jnp.zeros_like(last_value), last_value)
            _, found = jax.lax.scan(backwards, start, batch, reverse=True, unroll=16)
            return found, found + batch.value

        def loss(params: Any, batch: Transition, advantage: Array, target: Array) -> tuple:
            distribution, value = network.apply(params, batch.observation)
            log_prob = distribution.log_prob(batch.action)
            near = batch.value + (value - batch.value).clip(-s.clip, s.clip)
            errors = jnp.maximum(jnp.square(value - target), jnp.square(near - target))
            value_loss = 0.5 * errors.mean()
            ratio = jnp.exp(log_prob - batch.log_prob)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = jnp.clip(ratio, 1.0 - s.clip, 1.0 + s.clip) * advantage
            policy_loss = -jnp.minimum(ratio * advantage, clipped).mean()
            entropy = distribution.entropy().mean()
            total = policy_loss + s.value_coef * value_loss - s.entropy_coef * entropy
            return total, (value_loss, policy_loss, entropy)

        def minibatch(learner: TrainState, rows: tuple) -> tuple[TrainState, Any]:
            found, grads = jax.value_and_grad(loss, has_aux=True)(learner.params, *rows)
            return learner.apply_gradients(grads=grads), found

        def epoch(carry: tuple, _: None) -> tuple[tuple, Any]:
            learner, rollout, key = carry
            key, key_order = jax.random.split(key)
            order = jax.random.permutation(key_order, num_rows)
            flat = jax.tree.map(lambda x: x.reshape(num_rows, *x.shape[2:]), rollout)
            shuffled = jax.tree.map(lambda x: jnp.take(x, order, axis=0), flat)
            parts = jax.tree.map(lambda x: x.reshape(s.minibatches, -1, *x.shape[1:]), shuffled)
            learner, losses = jax.lax.scan(minibatch, learner, parts)
            return (learner, rollout, key), losses

        def update(carry: tuple, _: None) -> tuple[tuple, dict[str, Array]]:
            carry, batch = jax.lax.scan(env_step, carry, None, s.num_steps)
            learner, state, observation, key = carry
            _, last_value = network.apply(learner.params, observation)
            found = advantages(batch, last_value)
            start: Any = (learner, (batch, *found), key)
            (learner, _, key), _ = jax.lax.scan(epoch, start, None, s.epochs)
            return (learner, state, observation, key), batch.info

        carry = (learner, state, observation, key)
        carry, info = jax.lax.scan(update, carry, None, s.num_updates)
        return {"runner_state": carry, "metrics": info}

    return train
