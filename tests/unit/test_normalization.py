"""Running statistics against NumPy over all data at once."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.networks.normalization import initial_statistics, update_statistics

BATCH, SHAPE = 6, (3,)


@pytest.fixture(scope="module")
def update():
    return jax.jit(update_statistics)


def test_nothing_seen_changes_nothing():
    statistics = initial_statistics(SHAPE)
    np.testing.assert_array_equal(statistics.mean, np.zeros(SHAPE))
    np.testing.assert_array_equal(statistics.std, np.ones(SHAPE))


@given(seed=st.integers(0, 2**32 - 1), batches=st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_merged_batches_have_the_statistics_of_all(update, seed, batches):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-2, 3, SHAPE)
    data = rng.normal(rng.normal(size=SHAPE) * scale, scale, (batches, BATCH, *SHAPE))
    weights = (rng.random((batches, BATCH)) < 0.7).astype(np.float32)
    statistics = initial_statistics(SHAPE)
    for batch, weight in zip(data.astype(np.float32), weights, strict=True):
        statistics = update(statistics, batch, weight)
    counted = data[weights == 1]
    assert statistics.seen == len(counted)
    if len(counted):
        np.testing.assert_allclose(statistics.mean / scale, counted.mean(0) / scale, atol=1e-5)
        expected = np.sqrt(counted.var(0) + 1e-8)
        np.testing.assert_allclose(statistics.std, expected, rtol=1e-3)


def test_without_weights_all_rows_count(update):
    batch = np.random.default_rng(0).normal(size=(BATCH, *SHAPE)).astype(np.float32)
    statistics = update(initial_statistics(SHAPE), batch)
    assert statistics.seen == BATCH
    np.testing.assert_allclose(statistics.mean, batch.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.std, batch.std(0), rtol=1e-5)


def test_content_of_rows_that_do_not_count_is_not_read(update):
    batch = np.random.default_rng(0).normal(size=(BATCH, *SHAPE)).astype(np.float32)
    weights = np.array([1, 0, 1, 1, 0, 1], np.float32)
    first = update(initial_statistics(SHAPE), batch, weights)
    batch[[1, 4]] = 1e6
    second = update(initial_statistics(SHAPE), batch, weights)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_batch_of_which_nothing_counts_leaves_everything(update):
    batch = np.random.default_rng(0).normal(size=(BATCH, *SHAPE)).astype(np.float32)
    before = update(initial_statistics(SHAPE), batch, np.ones(BATCH, np.float32))
    after = update(before, batch * 100, np.zeros(BATCH, np.float32))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_large_means_leave_the_variance_intact():
    """E[x^2] - E[x]^2, in float32, would be off by hundreds of variances here."""
    rng = np.random.default_rng(0)
    data = rng.normal(10_000, 1, (50, 2048, 1)).astype(np.float32)
    merge = jax.jit(update_statistics)
    statistics = initial_statistics((1,))
    for batch in data:
        statistics = merge(statistics, batch)
    assert statistics.mean[0] == pytest.approx(data.astype(float).mean(), abs=5e-3)
    assert statistics.std[0] == pytest.approx(data.astype(float).std(), rel=1e-2)
    naive = np.mean(data**2) - np.mean(data) ** 2
    assert abs(naive - 1) > 0.5


def test_constant_data_have_a_standard_deviation_above_0(update):
    statistics = update(initial_statistics(SHAPE), np.full((BATCH, *SHAPE), 7, np.float32))
    np.testing.assert_array_equal(statistics.mean, np.full(SHAPE, 7))
    assert (statistics.std > 0).all()
