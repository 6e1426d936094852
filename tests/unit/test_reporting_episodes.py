"""EpisodeStatistics against a loop that steps one environment at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.reporting.episodes import EpisodeStatistics


class NaiveCounter:
    """The oracle: one step of one environment after another."""

    def __init__(self, num_envs):
        self.returns = [0.0] * num_envs
        self.lengths = [0] * num_envs
        self.made = 0
        self.finished = []

    def update(self, rewards, terminated, truncated, valid):
        new = []
        for t in range(len(rewards)):
            ended = []
            for n in range(len(rewards[t])):
                if not valid[t][n]:
                    if terminated[t][n] or truncated[t][n]:  # lost
                        self.returns[n], self.lengths[n] = 0.0, 0
                    continue
                self.made += 1
                self.returns[n] += float(rewards[t][n])
                self.lengths[n] += 1
                if terminated[t][n] or truncated[t][n]:
                    ended.append((self.returns[n], self.lengths[n]))
                    self.returns[n], self.lengths[n] = 0.0, 0
            new += [(ret, length, self.made) for ret, length in ended]
        self.finished += new
        return new


@st.composite
def rollouts(draw):
    num_envs = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    end_rate = draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
    valid_rate = draw(st.sampled_from([None, 0.0, 0.5, 0.9]))
    rng = np.random.default_rng(seed)
    made = []
    for steps in draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        shape = (steps, num_envs)
        made.append(
            (
                rng.integers(-8, 9, shape).astype(np.float32) / 4,  # sums are exact
                rng.random(shape) < end_rate,
                rng.random(shape) < end_rate,
                None if valid_rate is None else rng.random(shape) < valid_rate,
            )
        )
    return num_envs, made


@settings(max_examples=200, deadline=None)
@given(rollouts(), st.integers(1, 6))
def test_equals_a_loop_over_steps_and_environments(case, window):
    num_envs, batches = case
    statistics = EpisodeStatistics(num_envs, window=window)
    naive = NaiveCounter(num_envs)
    for rewards, terminated, truncated, valid in batches:
        got = statistics.update(rewards, terminated, truncated, valid, first_step=naive.made)
        every = np.ones(rewards.shape, bool) if valid is None else valid
        expected = naive.update(rewards, terminated, truncated, every)
        assert list(zip(got.returns, got.lengths, got.end_steps, strict=True)) == expected
        assert statistics.episodes == len(naive.finished)
        if naive.finished:
            last = naive.finished[-window:]
            assert statistics.return_mean == pytest.approx(np.mean([e[0] for e in last]))
            assert statistics.length_mean == pytest.approx(np.mean([e[1] for e in last]))
        else:
            assert statistics.return_mean is None
            assert statistics.length_mean is None


@pytest.mark.parametrize(("together", "ends"), [(None, [8, 12]), (4, [8, 12]), (2, [4, 8])])
def test_groups_of_environments_step_together_or_one_after_the_other(together, ends):
    statistics = EpisodeStatistics(4)
    for group, end in zip((slice(0, 2), slice(2, 4)), ends, strict=True):
        done = np.array([[False, False], [False, True]])
        first_step = end - ends[0]
        got = statistics.update(
            np.ones((2, 2)), done, done, first_step=first_step, envs=group, together=together
        )
        assert list(got.end_steps) == [end]


def test_hand_computed_episode_over_two_rollouts():
    statistics = EpisodeStatistics(2)
    no = np.zeros((2, 2), bool)
    end = np.array([[False, True], [False, False]])
    first = statistics.update([[1, 10], [2, 20]], end, no, first_step=100)
    assert [list(x) for x in first] == [[10], [1], [102]]
    second = statistics.update([[3, 30], [4, 40]], no, end[::-1] | end[:, ::-1], first_step=104)
    assert [list(x) for x in second] == [[6, 90], [3, 3], [106, 108]]


def test_a_lost_episode_is_dropped_and_the_next_one_counted_from_its_beginning():
    statistics = EpisodeStatistics(2)
    no = np.zeros((3, 2), bool)
    cut = np.array([[0, 0], [1, 0], [0, 0]], bool)
    valid = np.array([[1, 1], [0, 1], [1, 0]], bool)  # the second environment is dropped
    first = statistics.update([[1, 10], [99, 20], [4, 99]], no, cut, valid, first_step=0)
    assert first.returns.size == statistics.episodes == 0
    end = np.array([[0, 0], [0, 0], [1, 0]], bool)
    valid = np.array([[1, 0], [1, 0], [1, 0]], bool)
    second = statistics.update([[8, 0], [16, 0], [32, 0]], end, no, valid, first_step=4)
    assert [list(x) for x in second] == [[4 + 8 + 16 + 32], [4], [7]]
    assert statistics.episodes == 1


def test_a_nan_or_infinite_reward_stays_in_its_episode():
    statistics = EpisodeStatistics(1)
    rewards = np.array([[1.0], [np.inf], [np.nan], [2.0], [3.0]])
    ends = np.array([[True], [True], [True], [False], [True]])
    returns = statistics.update(rewards, ends, np.zeros_like(ends), first_step=0).returns
    np.testing.assert_array_equal(returns, [1, np.inf, np.nan, 5])


def test_rewards_are_summed_in_double_precision():
    statistics = EpisodeStatistics(1)
    rewards = np.full((1000, 1), 0.1, np.float32)
    ends = np.zeros((1000, 1), bool)
    statistics.update(rewards, ends, ends, first_step=0)
    ends[-1] = True
    (got,) = statistics.update(rewards, ends, ends, first_step=1000).returns
    assert got == pytest.approx(2000 * float(np.float32(0.1)), rel=1e-12)


def test_state_goes_on_exactly():
    rng = np.random.default_rng(0)
    whole, before, after = (EpisodeStatistics(3, window=4) for _ in range(3))
    batches = [(rng.random((7, 3)), rng.random((7, 3)) < 0.2, np.zeros((7, 3))) for _ in range(4)]
    for i, batch in enumerate(batches):
        whole.update(*batch, first_step=21 * i)
    for i in (0, 1):
        before.update(*batches[i], first_step=21 * i)
    saved = before.state()
    before.update(*batches[2], first_step=42)  # must not reach into what was saved
    after.restore(saved, unfinished=True)
    for i in (2, 3):
        after.update(*batches[i], first_step=21 * i)
    for name, value in whole.state().items():
        np.testing.assert_array_equal(after.state()[name], value)


def test_restoring_after_a_reset_forgets_unfinished_episodes_only():
    statistics = EpisodeStatistics(2)
    ends = np.array([[True, False]])
    statistics.update([[5.0, 7.0]], ends, ends, first_step=0)
    resumed = EpisodeStatistics(3)
    resumed.restore(statistics.state(), unfinished=False)
    assert (resumed.return_mean, resumed.length_mean, resumed.episodes) == (5.0, 1.0, 1)
    every = np.ones((1, 3), bool)
    assert list(resumed.update([[1.0, 2.0, 3.0]], every, every, first_step=2).returns) == [1, 2, 3]
    with pytest.raises(ValueError, match="2 environments, these are 3"):
        resumed.restore(statistics.state(), unfinished=True)
