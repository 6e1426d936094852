import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starling.algorithms.minibatches import count_blocks, mean_gradient, shuffled

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


@pytest.mark.parametrize(
    ("rows", "widest", "blocks"),
    [(64, 64, 1), (1024, 64, 1), (2048, 64, 2), (16384, 64, 16), (3000, 64, 3), (16384, 256, 64)],
)
def test_blocks_divide_a_minibatch_and_fit_into_the_cache(rows, widest, blocks):
    assert count_blocks(rows, widest) == blocks


def test_rows_that_hardly_anything_divides_stay_whole():
    assert count_blocks(2 * 8191, 64) == 1  # twice a prime: blocks of 2 rows would be left


def test_wide_layers_do_not_make_tiny_blocks():
    assert count_blocks(512, 84 * 84 * 4) == 2


def test_the_gradient_of_blocks_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal((24, 3)).astype(np.float32) for name in "xy"}
    params = rng.standard_normal(3).astype(np.float32)

    def loss(params, rows):
        errors = jnp.square(rows["x"] @ params - rows["y"].sum(1))
        return errors.mean(), jnp.stack([errors.mean(), rows["x"].mean()])

    gradient = jax.grad(loss, has_aux=True)
    whole = mean_gradient(gradient, params, batch, 1)
    for blocks in (2, 8):
        for a, b in zip(mean_gradient(gradient, params, batch, blocks), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
