"""Rollouts, and whether two of them are the same to the last bit."""

from __future__ import annotations

import numpy as np


def assert_same(a, b):
    """Equal to the bit, in structure, types, dtypes and values."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray) and a.dtype == object:
        assert_same(list(a), list(b))
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


def actions_for(vector, steps, seed=1):
    vector.action_space.seed(seed)
    return [vector.action_space.sample() for _ in range(steps)]


def rollout(vector, actions, **reset):
    return [vector.reset(**reset), *(vector.step(action) for action in actions)]
