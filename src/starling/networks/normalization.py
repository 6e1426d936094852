"""Running mean and variance, merged batch by batch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class RunningStatistics(NamedTuple):
    """Of everything seen so far.

    Attributes:
        seen: Number of rows.
        mean: Of the data's shape.
        squares: Sum of squared deviations from the mean, of the data's shape.
    """

    seen: Array
    mean: Array
    squares: Array

    @property
    def std(self) -> Array:
        """Standard deviation; 1 until there are data."""
        variance = self.squares / jnp.maximum(self.seen, 1.0)
        return jnp.where(self.seen > 0, jnp.sqrt(variance + 1e-8), 1.0)


def initial_statistics(shape: tuple[int, ...]) -> RunningStatistics:
    """Statistics of nothing."""
    return RunningStatistics(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))


def update_statistics(
    statistics: RunningStatistics, batch: Array, weights: Array | None = None
) -> RunningStatistics:
    """Merges a batch `[B, *shape]` in.

    Args:
        statistics: What was seen before.
        batch: New data.
        weights: `[B]` of 1 (counts) and 0 (does not), or None where all count.
    """
    return merge_statistics(statistics, statistics_of(batch, weights))


def statistics_of(batch: Array, weights: Array | None = None) -> RunningStatistics:
    """Statistics of a batch alone; arguments as for `update_statistics`."""
    if weights is None:
        weights = jnp.ones(batch.shape[0])
    rows = weights.reshape(-1, *[1] * (batch.ndim - 1))
    n = weights.sum()
    mean = (batch * rows).sum(0) / jnp.maximum(n, 1.0)
    return RunningStatistics(n, mean, (jnp.square(batch - mean) * rows).sum(0))


def merge_statistics(one: RunningStatistics, other: RunningStatistics) -> RunningStatistics:
    """Of all that two have seen, by the formula of Chan, Golub and LeVeque (1979)."""
    total = one.seen + other.seen
    delta = other.mean - one.mean
    share = other.seen / jnp.maximum(total, 1.0)
    return RunningStatistics(
        total,
        one.mean + delta * share,
        one.squares + other.squares + jnp.square(delta) * one.seen * share,
    )
