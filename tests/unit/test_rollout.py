"""The rollout buffer: what goes where, what is copied, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from starling.storage.rollout import Origin, RolloutBuffer, join_rollouts, map_tree

T, N = 3, 4
NO_ENDS = np.zeros(N, bool)


def ends(*rows: int) -> np.ndarray:
    return np.isin(np.arange(N), rows)


def finals(values: dict[int, Any]) -> dict[str, Any]:
    """Infos as a SAME_STEP environment gives them."""
    array = np.full(N, None, object)
    for row, value in values.items():
        array[row] = value
    return {"final_obs": array, "_final_obs": ends(*values)}


def observation(t: int) -> np.ndarray:
    return np.full((N, 2), 10 * t, np.float32) + np.arange(N, dtype=np.float32)[:, None]


def add(buffer: RolloutBuffer, t: int, **changes: Any) -> None:
    """Adds step t, which led to observation t + 1."""
    step = {
        "actions": np.arange(N, dtype=np.int32) + 100 * t,
        "next_observations": observation(t + 1),
        "rewards": np.arange(N) + 0.5 + t,
        "terminated": NO_ENDS,
        "truncated": NO_ENDS,
        "infos": {},
    }
    buffer.add(**{**step, **changes})


def filled(**changes_of_last: Any):
    buffer = RolloutBuffer(T, N)
    buffer.begin(observation(0))
    for t in range(T):
        add(buffer, t, **(changes_of_last if t == T - 1 else {}))
    return buffer.finish()


def test_steps_lie_where_they_belong():
    rollout = filled(terminated=ends(1), truncated=ends(2), infos=finals({1: [0, 0], 2: [7, 8]}))
    assert rollout.observations.shape == (T + 1, N, 2)
    for t in range(T + 1):
        np.testing.assert_array_equal(rollout.observations[t], observation(t))
    for t in range(T):
        np.testing.assert_array_equal(rollout.actions[t], np.arange(N) + 100 * t)
        np.testing.assert_array_equal(rollout.rewards[t], np.arange(N) + 0.5 + t)
    assert rollout.rewards.dtype == np.float32
    assert rollout.actions.dtype == np.int32
    np.testing.assert_array_equal(rollout.terminated, [NO_ENDS, NO_ENDS, ends(1)])
    np.testing.assert_array_equal(rollout.truncated, [NO_ENDS, NO_ENDS, ends(2)])
    assert rollout.valid is None
    assert rollout.action_masks is None


def test_native_types_are_kept():
    buffer = RolloutBuffer(1, N)
    buffer.begin(np.zeros((N, 3), np.uint8))
    add(buffer, 0, next_observations=np.full((N, 3), 255, np.uint8))
    rollout = buffer.finish()
    assert rollout.observations.dtype == np.uint8
    assert rollout.observations[1].max() == 255


def test_final_observations_only_where_truncated_and_not_terminated():
    buffer = RolloutBuffer(T, N)
    buffer.begin(observation(0))
    add(buffer, 0, truncated=ends(3), infos=finals({3: np.array([3, 30])}))
    add(buffer, 1, terminated=ends(0), infos=finals({0: np.array([-1, -1])}))
    both = finals({1: np.array([1, 10]), 2: np.array([2, 20])})
    add(buffer, 2, terminated=ends(2), truncated=ends(1, 2), infos=both)
    rollout = buffer.finish()
    assert rollout.final_index.tolist() == [0 * N + 3, 2 * N + 1] + [T * N] * 14
    np.testing.assert_array_equal(rollout.final_observations[:2], [[3, 30], [1, 10]])
    assert not rollout.final_observations[2:].any()
    assert rollout.final_observations.dtype == np.float32


@pytest.mark.parametrize(("count", "rows"), [(0, 16), (16, 16), (17, 64), (64, 64), (65, 256)])
def test_final_observations_are_padded_to_few_sizes(count, rows):
    envs = 100
    buffer = RolloutBuffer(1, envs)
    buffer.begin(np.zeros((envs, 1)))
    truncated = np.arange(envs) < count
    infos = {"final_obs": np.array([np.array([float(i)]) for i in range(envs)], object)}
    buffer.add(np.zeros(envs), np.zeros((envs, 1)), np.zeros(envs), ~truncated, truncated, infos)
    rollout = buffer.finish()
    assert rollout.final_observations.shape == (rows, 1)
    assert rollout.final_index.dtype == np.int32
    np.testing.assert_array_equal(rollout.final_index[:count], np.arange(count))
    assert (rollout.final_index[count:] == envs).all()
    np.testing.assert_array_equal(rollout.final_observations[:count, 0], np.arange(count))


def nested(t: int) -> dict:
    return {
        "pixels": np.full((N, 2, 2), t, np.uint8),
        "rest": (np.full(N, 10 + t), {"deep": np.full((N, 1), 20 + t, np.float64)}),
    }


def test_nested_observations_and_actions():
    buffer = RolloutBuffer(2, N)
    buffer.begin(nested(0))
    actions = {"a": np.arange(N), "b": (np.ones((N, 2)),)}
    final = map_tree(lambda x: x[0], nested(9))
    add(buffer, 0, next_observations=nested(1), actions=actions)
    add(
        buffer,
        1,
        next_observations=nested(2),
        actions=map_tree(lambda x: 2 * x, actions),
        truncated=ends(2),
        infos=finals({2: final}),
    )
    rollout = buffer.finish()
    pixels, (count, deeper) = rollout.observations["pixels"], rollout.observations["rest"]
    assert pixels.dtype == np.uint8
    for t in range(3):
        assert (pixels[t] == t).all()
        assert (count[t] == 10 + t).all()
        assert (deeper["deep"][t] == 20 + t).all()
    np.testing.assert_array_equal(rollout.actions["a"], [np.arange(N), 2 * np.arange(N)])
    assert rollout.actions["b"][0].shape == (2, N, 2)
    assert (rollout.final_observations["pixels"][0] == 9).all()
    assert rollout.final_observations["rest"][1]["deep"][0] == 29
    assert rollout.final_index[0] == 1 * N + 2


def test_what_is_added_is_copied():
    """Environments write the next step into the same arrays."""
    buffer = RolloutBuffer(T, N)
    reused = {"actions": np.zeros(N), "next_observations": observation(0), "rewards": np.zeros(N)}
    buffer.begin(reused["next_observations"])
    mask, valid = np.ones((N, 2)), np.ones(N, bool)
    final = np.array([5.0, 6.0])
    for t in range(T):
        for array in reused.values():
            array[...] = t + 1
        truncated = ends(0) if t == 0 else NO_ENDS
        infos = {**finals({0: final}), "valid": valid}
        add(buffer, t, **reused, truncated=truncated, infos=infos, action_masks=mask)
        mask[...], valid[...], final[...] = 0, False, -1
    rollout = buffer.finish()
    for t in range(T):
        assert (rollout.observations[t + 1] == t + 1).all()
        assert (rollout.actions[t] == t + 1).all()
        assert (rollout.rewards[t] == t + 1).all()
    np.testing.assert_array_equal(rollout.observations[0], observation(0))
    assert rollout.action_masks is not None
    assert rollout.valid is not None
    assert rollout.action_masks[0].all()
    assert rollout.valid[0].all()
    assert not rollout.action_masks[1:].any()
    assert not rollout.valid[1:].any()
    np.testing.assert_array_equal(rollout.final_observations[0], [5, 6])


def test_a_second_rollout_knows_nothing_of_the_first():
    buffer = RolloutBuffer(2, N)
    buffer.begin(observation(0))
    add(buffer, 0, truncated=ends(0), infos={**finals({0: np.ones(2)}), "valid": ends(1)})
    add(buffer, 1)
    first = buffer.finish()
    assert first.valid is not None
    np.testing.assert_array_equal(first.valid, [ends(1), ends(0, 1, 2, 3)])
    buffer.begin(observation(5))
    add(buffer, 0)
    add(buffer, 1)
    second = buffer.finish()
    assert (second.final_index == 2 * N).all()
    assert not second.truncated.any()
    assert second.valid is None or second.valid.all()
    np.testing.assert_array_equal(second.observations[0], observation(5))


def test_steps_before_the_first_lost_one_are_valid():
    buffer = RolloutBuffer(T, N)
    buffer.begin(observation(0))
    add(buffer, 0)
    lost = {**finals({2: np.ones(2)}), "valid": ends(0, 1, 3)}
    add(buffer, 1, truncated=ends(2), infos=lost)
    add(buffer, 2)
    rollout = buffer.finish()
    every = np.ones(N, bool)
    assert rollout.valid is not None
    np.testing.assert_array_equal(rollout.valid, [every, ends(0, 1, 3), every])
    before = filled()
    assert before.valid is None
    for pair in ([before, rollout], [rollout, before]):
        joined = join_rollouts(pair)
        sides = [np.ones((T, N), bool) if x is before else rollout.valid for x in pair]
        np.testing.assert_array_equal(joined.valid, np.hstack(sides))


def test_too_many_steps_are_refused():
    buffer = RolloutBuffer(T, N)
    with pytest.raises(IndexError, match="begin"):
        add(buffer, 0)
    buffer.begin(observation(0))
    for t in range(T):
        add(buffer, t)
    with pytest.raises(IndexError, match="takes 3 steps"):
        add(buffer, T)
    buffer.finish()
    with pytest.raises(IndexError, match="begin"):
        add(buffer, 0)


def test_too_few_steps_are_refused():
    buffer = RolloutBuffer(T, N)
    with pytest.raises(ValueError, match="has 0 of its 3 steps"):
        buffer.finish()
    buffer.begin(observation(0))
    add(buffer, 0)
    with pytest.raises(ValueError, match="has 1 of its 3 steps"):
        buffer.finish()
    buffer.begin(observation(0))  # what was half full can be begun again
    for t in range(T):
        add(buffer, t)
    assert buffer.finish().rewards.shape == (T, N)


def test_a_step_of_another_shape_is_refused():
    buffer = RolloutBuffer(T, N)
    buffer.begin(observation(0))
    with pytest.raises(ValueError, match="broadcast"):
        add(buffer, 0, next_observations=np.zeros((N + 1, 2)))


def test_origin_goes_along():
    buffer = RolloutBuffer(1, N)
    buffer.begin(observation(0))
    add(buffer, 0)
    assert buffer.finish(Origin(3, 1, 7)).origin == Origin(version=3, worker=1, sequence=7)


def test_map_tree_walks_several_trees_at_once():
    tree = {"a": 1, "b": (2, [3])}
    assert map_tree(lambda x, y: x + y, tree, tree) == {"a": 2, "b": (4, (6,))}
