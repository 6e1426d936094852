import jax
import numpy as np
import pytest

from starling.algorithms.minibatches import shuffled

_permutation = jax.jit(shuffled, static_argnums=1)


@pytest.mark.parametrize("n", [2**14, 2**17 + 3, 2**20])
def test_a_minibatch_comes_from_everywhere(n):
    """Its mean index varies as that of a random draw: stretches of time would vary far more."""
    order = np.asarray(_permutation(jax.random.key(1), n))
    assert np.array_equal(np.sort(order), np.arange(n))
    size = 64
    batches = order[: n // size * size].reshape(-1, size) / n
    expected = np.sqrt(1 / 12 / size)
    assert batches.mean(1).std() == pytest.approx(expected, rel=0.15)
    assert np.ptp(batches, axis=1).mean() == pytest.approx((size - 1) / (size + 1), abs=0.02)


def test_sorting_once_by_few_random_bits_would_keep_stretches_together():
    n, size = 2**20, 64
    bits = np.random.default_rng(0).integers(0, 2**12, n)
    order = np.argsort(bits, kind="stable")
    batches = order.reshape(-1, size) / n
    assert batches.mean(1).std() > 3 * np.sqrt(1 / 12 / size)
