"""What PPO carries from update to update, and what a gradient step sees of a rollout."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from starling.networks.features import Features
from starling.networks.normalization import RunningStatistics

Array = jax.Array
Tree = Any


class TrainState(NamedTuple):
    """All that changes while learning.

    Attributes:
        params: Flat parameter vector of the policy, `[num_weights]`.
        opt_state: The optimiser's.
        observation_statistics: Of the observation features, or None if not normalised.
        reward_statistics: Of the discounted reward sums, or None if not normalised.
        reward_sums: `[N]`, the discounted sums of the episodes under way, or None.
        key: Random key of the shuffles.
        updates: Rollouts learnt from.
        skipped: Rollouts that were not learnt from, since the result was not finite.
        skipped_in_a_row: Of these, those since the last one that was learnt from.
    """

    params: Array
    opt_state: optax.OptState
    observation_statistics: RunningStatistics | None
    reward_statistics: RunningStatistics | None
    reward_sums: Array | None
    key: Array
    updates: Array
    skipped: Array
    skipped_in_a_row: Array


class Minibatch(NamedTuple):
    """Rows of a rollout with what the update needs of them, each `[B, ...]`."""

    features: Array | Features
    actions: Tree
    action_masks: Array | None
    old_log_prob: Array
    old_value: Array
    advantage: Array
    target: Array
    weight: Array | None
