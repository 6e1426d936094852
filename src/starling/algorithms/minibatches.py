"""The order in which an update goes through the rows of a rollout, how many at once, and where."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Array = jax.Array
Tree = Any

_WORD = 32
_ENOUGH = 16

# Numbers in a layer's output that still lie in a core's cache, with all that belongs to them.
_CACHED = 64 * 1024
_FEWEST_ROWS = 256  # products of fewer waste more than the cache saves


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


def rows_in_cache(widest: int) -> int:
    """Rows that fit into a core's cache, with what networks make of them.

    Args:
        widest: Numbers in the widest layer's output for a row.
    """
    return max(_FEWEST_ROWS, _CACHED // widest)


def count_blocks(rows: int, widest: int) -> int:
    """In how many equal parts a minibatch goes through the networks on a CPU.

    Args:
        rows: In the minibatch.
        widest: Numbers in the widest layer's output for a row.
    """
    fewest = math.ceil(rows / rows_in_cache(widest))
    # Where hardly anything divides the rows, parts would be tiny: leave the minibatch whole then.
    return next((n for n in range(fewest, 4 * fewest) if rows % n == 0), 1)


def mean_gradient(
    gradient: Callable[[Array, Tree], tuple[Array, Array]], params: Array, batch: Tree, blocks: int
) -> tuple[Array, Array]:
    """The gradient of a loss that is a mean over rows, and what else it gives.

    On a CPU block by block: what the layers of a block give is still in the cache when the way
    back needs it, which makes large minibatches a quarter faster.

    Args:
        gradient: Of params and rows: the gradient, and numbers that are means as well.
        params: What the gradient is of.
        batch: Rows, each leaf `[B, ...]`.
        blocks: In how many parts; divides B.

    Returns:
        The numbers, and the gradient.
    """

    def whole(params: Array, batch: Tree) -> tuple[Array, Array]:
        grads, numbers = gradient(params, batch)
        return numbers, grads

    def by_block(params: Array, batch: Tree) -> tuple[Array, Array]:
        parts = jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole, params, batch)
        )

        def add(total: tuple, part: Tree) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, whole(params, part)), None

        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / blocks, total)

    if blocks == 1:
        return whole(params, batch)
    return jax.lax.platform_dependent(params, batch, cpu=by_block, default=whole)


def in_parts(
    gradient: Callable[[Array, Tree], tuple[Array, Array]],
    rows: int,
    widest: int,
    mesh: Mesh | None,
) -> Callable[[Array, Tree], tuple[Array, Array]]:
    """The mean gradient of minibatches, by blocks, and with an equal share for each device.

    Args:
        gradient: See `mean_gradient`.
        rows: In a minibatch.
        widest: Numbers in the widest layer's output for a row.
        mesh: Devices that params and minibatches lie on, whose number divides the rows; None where
            there is one.

    Returns:
        What gives, of params and a minibatch, what `mean_gradient` does.
    """
    shares = 1 if mesh is None else mesh.size
    blocks = count_blocks(rows // shares, widest)
    mean = functools.partial(mean_gradient, gradient, blocks=blocks)
    if mesh is None:
        return mean
    axis = mesh.axis_names[0]

    def of_share(params: Array, batch: Tree) -> tuple[Array, Array]:
        # The mean of the shares' means is the whole's: shares are equally large, and weights have
        # mean 1 in the whole minibatch, so that rows that do not count may be in any of them.
        return jax.lax.pmean(mean(params, batch), axis)

    # With the check, the gradient of params that all devices have is summed up by itself.
    return jax.shard_map(
        of_share, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(), check_vma=False
    )
