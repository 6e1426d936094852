"""Nested spaces as leaves and batches, with Gymnasium's own functions as the oracle."""

from __future__ import annotations

import envs_for_tests as envs
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, create_empty_array, iterate

from starling.envs import spaces as ours
from starling.errors import UserError


def batch(space, n, seed=0):
    batched = batch_space(space, n)
    batched.seed(seed)
    return batched.sample()


def test_leaves_have_names_shapes_and_dtypes_in_gymnasiums_order():
    leaves = ours.leaves(envs.NESTED)
    assert [leaf.name for leaf in leaves] == [
        "camera", "inner/0", "inner/1/bits", "joints", "scalar", "which",
    ]  # fmt: skip
    assert [leaf.shape for leaf in leaves] == [(3, 2), (), (2, 2), (4,), (), (2,)]
    assert [leaf.dtype for leaf in leaves] == [
        np.uint8, np.int64, np.int8, np.float32, np.float64, np.int64,
    ]  # fmt: skip
    assert leaves[1].path == ("inner", 0)
    assert leaves[1].space == spaces.Discrete(5)


def test_a_plain_space_is_one_nameless_leaf():
    (leaf,) = ours.leaves(spaces.Discrete(3))
    assert (leaf.path, leaf.name, leaf.shape) == ((), "", ())


def test_flatten_and_unflatten_are_inverse():
    value = batch(envs.NESTED, 3)
    flat = ours.flatten(envs.NESTED, value)
    assert [array.shape[1:] for array in flat] == [leaf.shape for leaf in ours.leaves(envs.NESTED)]
    again = ours.unflatten(envs.NESTED, flat)
    assert again["inner"][1]["bits"] is value["inner"][1]["bits"]
    assert list(again) == list(value)


def test_zeros_are_gymnasiums_empty_array():
    zeros, expected = ours.zeros(envs.NESTED, 4), create_empty_array(envs.NESTED, 4)
    pairs = zip(ours.flatten(envs.NESTED, zeros), ours.flatten(envs.NESTED, expected), strict=True)
    for array, other in pairs:
        np.testing.assert_array_equal(array, other)
        assert array.dtype == other.dtype


@pytest.mark.parametrize(
    "space",
    [envs.NESTED, spaces.Discrete(4, start=-2), spaces.Tuple((spaces.Box(0, 1, (2,)),))],
    ids=["nested", "Discrete", "Tuple"],
)
def test_samples_are_what_an_environment_expects(space):
    batched = batch(space, 5)
    samples = ours.samples(space, batched)
    assert len(samples) == 5
    for sample, expected in zip(samples, iterate(batch_space(space, 5), batched), strict=True):
        assert space.contains(sample)
        pairs = zip(ours.flatten(space, sample), ours.flatten(space, expected), strict=True)
        for leaf, other in pairs:
            np.testing.assert_array_equal(leaf, other)


def test_samples_are_copies():
    space = spaces.Dict({"a": spaces.Box(0, 1, (2,)), "b": spaces.Discrete(3)})
    batched = batch(space, 2)
    before = batched["a"].copy()
    for sample in ours.samples(space, batched):
        sample["a"][:] = 7
    np.testing.assert_array_equal(batched["a"], before)


def test_select_takes_rows():
    value = batch(envs.NESTED, 5)
    part = ours.select(envs.NESTED, value, np.array([3, 1]))
    np.testing.assert_array_equal(part["camera"], value["camera"][[3, 1]])
    np.testing.assert_array_equal(part["inner"][0], value["inner"][0][[3, 1]])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Box(0, 1, (2,)), None),
        spaces.OneOf([spaces.Discrete(2)]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_spaces_without_arrays_are_refused_by_name_and_place(space):
    with pytest.raises(UserError, match=f"space {type(space).__name__} has no array"):
        ours.leaves(space)
    with pytest.raises(UserError, match=f"{type(space).__name__} at 'a/1' has no array"):
        ours.leaves(spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2), space))}))


def test_users_own_subclasses_are_leaves():
    class MyBox(spaces.Box):
        pass

    assert ours.leaves(MyBox(0, 1, (2,)))[0].shape == (2,)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.array([1.0, 2.0]), np.int64),
        (np.array([True, False]), np.int8),
        (np.array([255]), np.uint8),
        (np.array([0.1, np.nan, np.inf]), np.float32),
        (np.array([2**40]), np.float32),
    ],
)
def test_casts_that_lose_precision_at_most(value, dtype):
    result = ours.cast(value, np.dtype(dtype), "action")
    assert result.dtype == dtype
    np.testing.assert_allclose(result, value, rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.array([1e300]), np.float32),
        (np.array([-1e39]), np.float32),
        (np.array([0.5]), np.int64),
        (np.array([np.nan]), np.int64),
        (np.array([256]), np.uint8),
        (np.array([-1]), np.uint8),
        (np.array([1 + 2j]), np.float64),
        (np.array([None]), np.float32),
    ],
)
def test_casts_that_lose_a_value_are_refused(value, dtype):
    with pytest.raises(UserError, match=r"action: .* (fit|convert)"):
        ours.cast(value, np.dtype(dtype), "action")


def test_store_batch_takes_lists_and_refuses_broadcasting():
    space = spaces.Dict({"a": spaces.Box(0, 1, (2,)), "b": spaces.Discrete(3)})
    out = ours.flatten(space, ours.zeros(space, 2))
    ours.store_batch(space, {"a": [[0, 1], [1, 0]], "b": [2, 1]}, out, "actions")
    np.testing.assert_array_equal(out[0], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(out[1], [2, 1])
    with pytest.raises(UserError, match=r"actions 'a': shape \(1, 2\) given, \(2, 2\) expected"):
        ours.store_batch(space, {"a": [[0, 1]], "b": [2, 1]}, out, "actions")
    with pytest.raises(UserError, match="nested like"):
        ours.store_batch(space, {"a": [[0, 1]]}, out, "actions")


def test_dict_order_without_sorting_is_kept():
    space = gym.spaces.Dict({"z": spaces.Discrete(2), "a": spaces.Discrete(3)}, sort_keys=False)
    assert [leaf.name for leaf in ours.leaves(space)] == ["z", "a"]
    assert list(ours.zeros(space, 1)) == ["z", "a"]
