"""Spaces go through JSON unchanged, and damaged descriptions are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces

from starling.errors import CheckpointError
from starling.storage.space_format import space_from_json, space_to_json

SPACES = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    spaces.Box(np.array([0.1, -np.inf]), np.array([1e300, 1 / 3]), dtype=np.float64),
    spaces.Box(0.1, 0.3, (1,)),
    spaces.Box(np.array([1e-42, -1e-42], np.float32), np.float32(np.finfo(np.float32).max), (2,)),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64),
    spaces.Box(-2, 7, (), np.float16),
    spaces.Box(0, 1, (0,)),
    spaces.Discrete(5),
    spaces.Discrete(5, start=-3),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [-2, 3]]),
    spaces.MultiDiscrete([2, 3], dtype=np.int32),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 3)),
    spaces.Dict({}),
    spaces.Dict({"z": spaces.Discrete(2), "a": spaces.Tuple((spaces.Box(0, 1), spaces.Tuple(())))}),
]


def through_json(space):
    return space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_comes_back_equal(space):
    again = through_json(space)
    assert again == space
    assert again.dtype == space.dtype
    assert again.shape == space.shape
    if isinstance(space, spaces.MultiDiscrete):
        np.testing.assert_array_equal(again.start, space.start)
    assert space.contains(again.sample())


def test_the_order_of_keys_is_kept():
    """Features and outputs follow it."""
    ordered = spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Discrete(3))])
    assert list(through_json(ordered).spaces) == list(ordered.spaces)


def test_a_box_with_equal_bounds_is_short():
    assert len(json.dumps(space_to_json(spaces.Box(0, 255, (84, 84, 4), np.uint8)))) < 200


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Tuple((spaces.Text(3),))], ids=str)
def test_other_spaces_cannot_be_described(space):
    with pytest.raises(TypeError, match="Text"):
        space_to_json(space)


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        [],
        None,
        "Box",
        {"type": "Text"},
        {"type": ["Box"]},
        {"type": "Box"},
        {"type": "Box", "low": "0", "high": "1", "shape": [2], "dtype": "no such type"},
        {"type": "Box", "low": "0", "high": "1", "shape": [2], "dtype": "object"},
        {"type": "Box", "low": "0", "high": "x", "shape": [2], "dtype": "float32"},
        {"type": "Box", "low": ["0"], "high": "1", "shape": [2], "dtype": "float32"},
        {"type": "Box", "low": "2", "high": "1", "shape": [2], "dtype": "float32"},
        {"type": "Box", "low": "0", "high": "1", "shape": 2, "dtype": "float32"},
        {"type": "Box", "low": "0", "high": "1", "shape": [-2], "dtype": "float32"},
        {"type": "Discrete", "n": 0, "start": 0},
        {"type": "Discrete", "n": "2", "start": 0},
        {"type": "Discrete", "n": None, "start": 0},
        {"type": "MultiDiscrete", "nvec": [0, -1], "start": [0, 0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [2, 2], "start": [0], "dtype": "int64"},
        {"type": "MultiBinary", "shape": None},
        {"type": "MultiBinary", "shape": [-1]},
        {"type": "Tuple", "spaces": 5},
        {"type": "Tuple", "spaces": [5]},
        {"type": "Dict", "spaces": {"a": {"type": "Discrete", "n": 2, "start": 0}}},
        {"type": "Dict", "spaces": [["a"]]},
    ],
    ids=json.dumps,
)
def test_damaged_descriptions_are_refused(damaged):
    with pytest.raises(CheckpointError, match="space"):
        space_from_json(damaged)
