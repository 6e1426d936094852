"""Actions from a policy: sampled with noise that was drawn before, or to be used."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from starling.networks.normalization import RunningStatistics
from starling.networks.policy import Policy

Array = jax.Array
Tree = Any

# Streams of random numbers beside that of the shuffles, which has the seed's own key.
_NOISE, _PREDICTIONS = 1, 2


class Acting(NamedTuple):
    """All of a train state that choosing actions takes: what learner and actors share.

    Attributes:
        params: Flat parameter vector, `[num_weights]`.
        observation_statistics: Of the observation features, or None if not normalised.
        epsilon: `[N]`, share of random actions in each environment; None where a policy is random
            by itself.
    """

    params: Any
    observation_statistics: RunningStatistics | None
    epsilon: Any = None


def noise_key(seed: Array, table: Array) -> Array:
    """Random key of the noise that the actions of rollout number `table` are sampled with."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _NOISE), table)


def prediction_key(seed: Array, count: Array) -> Array:
    """Random key of the `count`-th actions that are sampled to be used."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PREDICTIONS), count)


def draw_noise(policy: Policy, seed: Array, table: Array, shape: tuple[int, int]) -> Tree:
    """Table number `table` of the noise that actions are sampled with, `[T, N, ...]`."""
    return policy.distribution.noise(noise_key(seed, table), shape)


def act(
    policy: Policy,
    acting: Acting,
    observation: Tree,
    noise: Tree,
    t: Array,
    action_mask: Array | None = None,
    carry: Tree = (),
) -> tuple[Tree, Tree, Tree]:
    """Samples actions for one step of a rollout.

    Args:
        policy: That acts.
        acting: Its parameters and statistics.
        observation: `[N, ...]`.
        noise: `[T, N, ...]`, drawn with `draw_noise` for the whole rollout.
        t: Which row of the noise to use.
        action_mask: `[N, choices]`, or None.
        carry: State of a recurrent policy; () for these networks, which have none.

    Returns:
        Raw actions, the environment's actions (both `[N, ...]`; None where they are the raw
        ones), and the next carry.
    """
    return act_and_keep(policy, acting, observation, noise, t, action_mask, carry)[:3]


def act_and_keep(
    policy: Policy,
    acting: Acting,
    observation: Tree,
    noise: Tree,
    t: Array,
    action_mask: Array | None = None,
    carry: Tree = (),
) -> tuple[Tree, Tree, Tree, tuple[Array, Array]]:
    """What `act` gives, and what the networks said: a rollout's `outputs`."""
    distribution = policy.distribution
    params, statistics, _ = acting
    out = policy(params, policy.features(observation), statistics)
    now = jax.tree.map(lambda row: row[t], noise)
    raw = distribution.sample(out.outputs, out.parameters, now, action_mask)
    env = distribution.to_env(raw)
    return raw, None if env is raw else env, carry, (out.outputs, out.value)


def predict(
    policy: Policy,
    params: Array,
    statistics: RunningStatistics | None,
    observation: Tree,
    seed: Array,
    count: Array,
    action_mask: Array | None = None,
    deterministic: bool = True,
) -> Tree:
    """The environment's actions `[..., *space]`: the most probable ones, or samples."""
    distribution = policy.distribution
    out = policy(params, policy.features(observation), statistics)
    if deterministic:
        raw = distribution.mode(out.outputs, out.parameters, action_mask)
    else:
        noise = distribution.noise(prediction_key(seed, count), out.value.shape)
        raw = distribution.sample(out.outputs, out.parameters, noise, action_mask)
    return distribution.to_env(raw)
