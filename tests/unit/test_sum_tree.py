"""The sum tree against running sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.storage.sum_tree import SumTree


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 10**6), zeros=st.sampled_from([0, 0.5, 0.99]))
def test_targets_fall_on_the_leaf_that_running_sums_say(size, seed, zeros):
    random = np.random.default_rng(seed)
    tree, weights = SumTree(size), np.zeros(size)
    for _ in range(5):
        leaves = random.integers(0, size, random.integers(1, 50))
        # Whole numbers, so that sums are exact in any order.
        given = random.integers(1, 9, len(leaves)) * (random.random(len(leaves)) >= zeros)
        tree.set(leaves, given)
        for leaf, weight in zip(leaves, given, strict=True):
            weights[leaf] = weight
        np.testing.assert_array_equal(tree.get(np.arange(size)), weights)
        assert tree.total == weights.sum()
        if weights.any():
            targets = random.random(200) * weights.sum()
            expected = np.searchsorted(weights.cumsum(), targets, side="right")
            np.testing.assert_array_equal(tree.find(targets), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_no_draw_falls_on_a_weight_of_zero(size):
    random = np.random.default_rng(size)
    weights = np.where(random.random(size) < 0.3, random.random(size) ** 40, 0.0)
    weights[size // 2] = 1e-300
    tree = SumTree(size)
    tree.set(np.arange(size), weights)
    total = tree.total
    edges = np.clip(weights.cumsum()[:, None] + [-1e-16, 0, 1e-16], 0, np.nextafter(total, 0))
    targets = np.concatenate([edges.ravel(), [0.0, total, np.nextafter(total, 1)]])
    assert (weights[tree.find(targets)] > 0).all()


def test_sums_do_not_drift():
    random = np.random.default_rng(0)
    tree = SumTree(100)
    for _ in range(2000):
        tree.set(random.integers(0, 100, 30), random.random(30) * 10.0 ** random.integers(-9, 9))
    rebuilt = SumTree(100)
    rebuilt.set(np.arange(100)[::-1], tree.get(np.arange(100))[::-1])
    assert rebuilt.total == tree.total
    tree.set(np.arange(100), 0.0)
    assert tree.total == 0.0
