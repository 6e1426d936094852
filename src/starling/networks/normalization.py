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
    """Merges a batch `[B, *shape]` in, by the formula of Chan, Golub and LeVeque (1979).

    Args:
        statistics: What was seen before.
        batch: New data.
        weights: `[B]` of 1 (counts) and 0 (does not), or None where all count.
    """
    if weights is None:
        weights = jnp.ones(batch.shape[0])
    rows = weights.reshape(-1, *[1] * (batch.ndim - 1))
    n = weights.sum()
    mean = (batch * rows).sum(0) / jnp.maximum(n, 1.0)
    squares = (jnp.square(batch - mean) * rows).sum(0)
    total = statistics.seen + n
    delta = mean - statistics.mean
    share = n / jnp.maximum(total, 1.0)
    return RunningStatistics(
        total,
        statistics.mean + delta * share,
        statistics.squares + squares + jnp.square(delta) * statistics.seen * share,
    )
