"""Means over rows of which some count for nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def weighted_mean(x: Array, weight: Array | None) -> Array:
    """Mean of all elements, each counted `weight` times; of none, 0."""
    if weight is None:
        return x.mean()
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def weighted_variance(x: Array, weight: Array | None) -> Array:
    """Variance of all elements, each counted `weight` times."""
    return weighted_mean(jnp.square(x - weighted_mean(x, weight)), weight)
