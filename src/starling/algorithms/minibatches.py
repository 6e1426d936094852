"""The order in which an update goes through the rows of a rollout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array

_WORD = 32
_ENOUGH = 16


def shuffled(key: Array, n: int) -> Array:
    """0 ... n - 1 in random order, `[n]` int32, at a tenth of the cost of `random.permutation`.

    Sorts words whose high bits are random and whose low bits are the place. Those that draw the
    same random bits keep their order: with few random bits left beside large places whole
    stretches would, so the result is sorted anew by other bits then.
    """
    bits = max(1, math.ceil(math.log2(n)))
    low = jnp.uint32((1 << bits) - 1)
    places = jnp.arange(n, dtype=jnp.uint32)

    def sort(key: Array) -> Array:
        return jnp.sort((jax.random.bits(key, (n,)) & ~low) | places) & low

    order = sort(key)
    if _WORD - bits < _ENOUGH:
        order = order[sort(jax.random.fold_in(key, 1))]
    return order.astype(jnp.int32)
