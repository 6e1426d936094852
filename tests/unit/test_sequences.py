"""Sequences from a replay, against those that a plain loop over the episodes gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_oracle import Environments, StackedEnvironments
from scipy import stats

from starling.errors import UserError
from starling.storage import replay as replay_module
from starling.storage.replay import Replay
from starling.storage.sequences import Sequences, read_sequences

GAMMA = 0.9


def expected(environments, kept, n_step, length):
    """By the bytes of their first observations: observations, actions, rewards, how it ended."""
    starts = environments.expected(n_step, GAMMA, kept)
    found = {}
    for n, episodes in enumerate(environments.episodes):
        for episode in episodes:
            for i, first in enumerate(episode.steps):
                if first.row * environments.num_envs + n not in starts:
                    continue
                steps, ended = episode.steps[i : i + length], ""
                if i + len(steps) < len(episode.steps):
                    following = episode.steps[i + len(steps)].observation
                elif episode.ended:
                    following, ended = episode.last_observation, episode.ended
                else:
                    following = environments.observations[n]
                numbers = np.array([*(step.observation for step in steps), following])
                actions, rewards = zip(*((s.action, s.reward) for s in steps), strict=True)
                shown = environments.shown(numbers)
                found[shown[0].tobytes()] = (shown, actions, rewards, ended)
    assert len(found) == len(starts)
    return found


def check(drawn: Sequences, known, length) -> None:
    """Compares every array of every sequence."""
    for k in range(len(drawn.valid)):
        observations, actions, rewards, ended = known[drawn.observations[k, 0].tobytes()]
        m = len(actions)
        flags = {"valid": np.arange(length) < m}
        for name in ("terminated", "truncated"):
            flags[name] = (np.arange(length) == m - 1) & (ended == name)
        for name, flag in flags.items():
            assert getattr(drawn, name)[k].tolist() == flag.tolist(), name
        compared = m if ended == "terminated" else m + 1
        np.testing.assert_array_equal(drawn.observations[k, :compared], observations[:compared])
        assert drawn.observations[k].shape == (length + 1, *observations.shape[1:])
        assert drawn.actions[k].tolist() == [*actions, *[0] * (length - m)]
        assert drawn.rewards[k].tolist() == [*rewards, *[0] * (length - m)]
        assert not drawn.observations[k, m + 1 :].any()


def run(environments, rollouts, steps, n_step, length, cut_at=(), spare=0):
    depth = getattr(environments, "depth", None)
    kept, num_envs = steps + n_step + (depth or 1) - 1 + spare, environments.num_envs
    replay = Replay(
        kept * num_envs, num_envs, n_step=n_step, gamma=GAMMA, frame_stack=depth, seed=rollouts
    )
    for i in range(rollouts):
        if i in cut_at:
            environments.begin_anew()
            replay.cut()
        replay.add(environments.rollout(steps))
        known = expected(environments, kept, n_step, length)
        if known:
            drawn = replay.sample_sequences(8 * len(known), length)
            check(drawn, known, length)


@settings(max_examples=50, deadline=None)
@given(
    num_envs=st.integers(1, 4),
    steps=st.integers(1, 7),
    rollouts=st.integers(1, 8),
    n_step=st.integers(1, 3),
    length=st.integers(1, 12),
    spare=st.integers(0, 12),
    seed=st.integers(0, 10**6),
    next_step=st.booleans(),
    masks=st.booleans(),
    cut_at=st.sets(st.integers(1, 7), max_size=2),
)
def test_sequences_are_what_happened(
    num_envs, steps, rollouts, n_step, length, spare, seed, next_step, masks, cut_at
):
    environments = Environments(num_envs, seed, next_step, masks)
    run(environments, rollouts, steps, n_step, length, cut_at, spare)


@pytest.mark.parametrize("next_step", [False, True])
def test_sequences_of_stacked_frames(next_step):
    run(StackedEnvironments(3, (4, 4), 2, 1, next_step), 6, 9, 2, 5, {3})


def one_too_far(rings):
    rings.heads = rings.heads + 1


def one_too_few(rings):
    rings.heads = rings.heads - 1


def ends_late(rings):
    rings.ends = np.roll(rings.ends, 1)


def ends_early(rings):
    rings.ends = np.roll(rings.ends, -1)


def no_final_observations(rings):
    rings.next_observations = lambda last, following, ends: rings.observations.take(following)


@pytest.mark.parametrize(
    "wrong", [one_too_far, one_too_few, ends_late, ends_early, no_final_observations]
)
def test_the_oracle_notices_what_is_off_by_one(monkeypatch, wrong):
    def read(rings, slots, length):
        rings = copy.copy(rings)
        wrong(rings)
        return read_sequences(rings, slots, length)

    run(Environments(3, 5, faults=False), 6, 20, 1, 6)
    monkeypatch.setattr(replay_module, "read_sequences", read)
    with pytest.raises((AssertionError, KeyError)):
        run(Environments(3, 5, faults=False), 6, 20, 1, 6)


@pytest.mark.parametrize("prioritized", [False, True])
def test_all_transitions_are_equally_likely_to_be_the_first(prioritized):
    environments = Environments(4, 1)
    replay = Replay(400, 4, gamma=GAMMA, n_step=3, prioritized=prioritized)
    for _ in range(4):
        replay.add(environments.rollout(40))
    if prioritized:
        batch = replay.sample(200)
        replay.set_priorities(batch.indices, np.full(batch.indices.shape, 9.0))
    sampled = replay.sampled
    drawn = replay.sample_sequences(100_000, 2)
    assert replay.sampled == sampled + drawn.valid.sum()
    _, counts = np.unique(drawn.observations[:, 0], return_counts=True)
    assert len(counts) == len(replay)
    assert stats.chisquare(counts).pvalue > 0.01


def test_what_cannot_be_drawn_is_refused():
    replay = Replay(40, 2)
    with pytest.raises(UserError, match="3 sequences of 5 steps cannot be drawn from the 0"):
        replay.sample_sequences(3, 5)
    replay.add(Environments(2, 0, faults=False).rollout(8))
    for batch_size, length in ((0, 5), (3, 0)):
        with pytest.raises(UserError, match="give numbers above 0"):
            replay.sample_sequences(batch_size, length)
