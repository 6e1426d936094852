"""Merged infos are Gymnasium's wherever Gymnasium's can be made."""

from __future__ import annotations

import numpy as np
import pytest
from comparing import assert_same
from gymnasium.vector import VectorEnv

from starling.envs.infos import merge_infos


def gymnasiums(infos, n):
    oracle = VectorEnv()
    oracle.num_envs = n
    merged = {}
    for i, info in infos:
        merged = oracle._add_info(merged, info, i)
    return merged


@pytest.mark.parametrize(
    "infos",
    [
        [],
        [(0, {"x": 1}), (2, {"x": 3})],
        [(1, {"x": 1.5, "y": True}), (2, {"z": "text"})],
        [(0, {"a": np.arange(3), "b": np.float32(2)}), (1, {"a": np.ones(3, int)})],
        [(0, {"deep": {"er": {"x": 1}}, "none": None}), (2, {"deep": {"y": [1, 2]}})],
    ],
)
def test_the_same_as_gymnasium(infos):
    assert_same(merge_infos(infos, 3), gymnasiums(infos, 3))


def test_values_that_fit_no_array_are_kept_as_they_are():
    first, second = np.zeros(2), np.zeros(3)
    merged = merge_infos([(0, {"x": first, "y": 1}), (2, {"x": second, "y": 0.5})], 3)
    assert merged["x"][0] is first
    assert merged["x"][1] is None
    assert merged["x"][2] is second
    assert merged["y"].tolist() == [1, None, 0.5]


def test_a_key_that_is_a_dictionary_only_at_times():
    merged = merge_infos([(0, {"x": {"y": 1}}), (1, {"x": 2})], 2)
    assert merged["x"].tolist() == [{"y": 1}, 2]
