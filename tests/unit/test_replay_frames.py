"""Stacks of frames, kept frame by frame and read as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_oracle import Environments, StackedEnvironments, check_all

from starling.errors import UserError
from starling.storage import replay_columns
from starling.storage.replay import Replay

GAMMA = 0.9


def run(environments, rollouts, steps, n_step, spare, cut_at=()):
    num_envs, depth = environments.num_envs, environments.depth
    kept = steps + n_step + depth - 1 + spare
    options = {"n_step": n_step, "gamma": GAMMA, "frame_stack": depth}
    replay = Replay(kept * num_envs, num_envs, **options)
    for i in range(rollouts):
        if i in cut_at:
            environments.begin_anew()
            replay.cut()
        replay.add(environments.rollout(steps))
        check_all(replay, environments.expected(n_step, GAMMA, kept), environments)
    restored = Replay(kept * num_envs, num_envs, **options)
    restored.restore(replay.state())
    restored.add(environments.rollout(steps))
    check_all(restored, environments.expected(n_step, GAMMA, kept), environments)


@settings(max_examples=50, deadline=None)
@given(
    depth=st.integers(2, 5),
    shape=st.sampled_from([(2, 4), (3, 3), (2, 2, 3)]),
    num_envs=st.integers(1, 3),
    steps=st.integers(4, 9),
    rollouts=st.integers(1, 8),
    n_step=st.integers(1, 4),
    spare=st.integers(0, 10),
    seed=st.integers(0, 10**6),
    next_step=st.booleans(),
    cut_at=st.sets(st.integers(1, 7), max_size=2),
)
def test_stacks_come_back_as_they_were(
    depth, shape, num_envs, steps, rollouts, n_step, spare, seed, next_step, cut_at
):
    environments = StackedEnvironments(depth, shape, num_envs, seed, next_step)
    run(environments, rollouts, steps, n_step, spare, cut_at)


@pytest.mark.parametrize("wrong", ["unreadable", "continues"])
def test_the_oracle_notices_what_is_wrong(monkeypatch, wrong):
    if wrong == "unreadable":
        patch = (replay_columns.StackedColumn, "unreadable", lambda self, slots: slots < 0)
    else:
        patch = (replay_columns, "continues", lambda x: np.ones((len(x) - 1, x.shape[1]), bool))
    with monkeypatch.context() as changed:
        changed.setattr(*patch)
        with pytest.raises(AssertionError):
            run(StackedEnvironments(4, (2, 4), 2, 1), 8, 10, 2, 3)
    run(StackedEnvironments(4, (2, 4), 2, 1), 8, 10, 2, 3)


def test_frames_are_kept_once():
    environments = StackedEnvironments(4, (40, 40), 2, 0)
    replay = Replay(2000, 2, frame_stack=4)
    replay.add(environments.rollout(20)._replace(valid=None))
    assert replay.nbytes < 2100 * 1600 + 100_000 + 40 * 4 * 1600


def test_images_beside_other_leaves():
    environments = StackedEnvironments(3, (2, 2), 2, 3, faults=False)
    rollout = environments.rollout(30)
    numbers = np.arange(31 * 2 * 3, dtype=np.float32).reshape(31, 2, 3)
    tree = {"image": rollout.observations, "number": numbers}
    final = {"image": rollout.final_observations, "number": np.zeros((99, 3), np.float32)}
    replay = Replay(100, 2, frame_stack=3)
    replay.add(rollout._replace(observations=tree, final_observations=final))
    batch = replay.sample(40)
    t, n = np.divmod(batch.indices, 2)
    np.testing.assert_array_equal(batch.observations["image"], rollout.observations[t, n])
    np.testing.assert_array_equal(batch.observations["number"], numbers[t, n])


def test_what_is_no_stack_is_refused():
    with pytest.raises(UserError, match=r"needs images \[4, height, width\], but .* \[\]"):
        Replay(100, 2, frame_stack=4).add(Environments(2, 0).rollout(5))
    with pytest.raises(UserError, match=r"needs images \[4, height, width\], but .* \[4, 3\]"):
        Replay(100, 2, frame_stack=4).check_memory(np.zeros((1, 2, 4, 3)), np.zeros((1, 2)))
    rollout = StackedEnvironments(4, (2, 2), 2, 0).rollout(9)
    shuffled = rollout._replace(observations=rollout.observations[:, :, ::-1].copy())
    with pytest.raises(UserError, match="repeats the newer frames of the one before"):
        Replay(100, 2, frame_stack=4).add(shuffled)
    with pytest.raises(UserError, match=r"frame_stack 4 need 14"):
        Replay(2 * 13, 2, frame_stack=4, n_step=2).add(rollout)
