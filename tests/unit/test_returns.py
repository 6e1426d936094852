"""Advantages against a table computed by hand and an oracle that sums the definition."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from advantages_by_hand import table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from starling.algorithms.returns import discounted_sums, generalized_advantages

T, N = 7, 3
FAST = settings(deadline=None, derandomize=True, max_examples=150)


@pytest.fixture(scope="module")
def advantages_of():
    return jax.jit(generalized_advantages)


def oracle(
    rewards,
    values,
    final_values,
    terminated,
    truncated,
    gamma,
    gae_lambda,
    valid=None,
    mistake=None,
) -> np.ndarray:
    """Sums of deltas as eq. 16 of the paper writes them, one by one, in float64.

    `mistake` names a bug that other implementations have had.
    """
    steps, envs = rewards.shape
    valid = np.ones((steps, envs), bool) if valid is None else valid
    advantages = np.zeros((steps, envs))
    for n in range(envs):
        for start in range(steps):
            factor = 1.0
            for t in range(start, steps):
                if not valid[t, n]:
                    break
                follow = values[t + 1, n]
                if truncated[t, n] and mistake != "next episode's value":
                    follow = final_values[t, n]
                ends_return = terminated[t, n]
                if mistake == "truncation terminates":
                    ends_return = ends_return or truncated[t, n]
                if ends_return:
                    follow = 0.0
                delta = rewards[t, n] + gamma * follow - values[t, n]
                advantages[start, n] += factor * delta
                factor *= gamma * gae_lambda
                if terminated[t, n] and mistake != "not cut at termination":
                    break
                if truncated[t, n] and mistake != "not cut at truncation":
                    break
    return advantages


def test_advantages_are_those_computed_by_hand(advantages_of):
    data, expected = table()
    advantages, targets = advantages_of(*data, 0.5, 0.5)
    np.testing.assert_array_equal(advantages, expected)  # halves and quarters: exact in float32
    np.testing.assert_array_equal(targets, expected + data[1][:-1])


def test_oracle_agrees_with_the_table_by_hand():
    data, expected = table()
    np.testing.assert_array_equal(oracle(*data, 0.5, 0.5), expected)


@pytest.mark.parametrize(
    ("mistake", "where"),
    [
        ("truncation terminates", [(0, 0), (1, 0), (4, 2)]),
        ("next episode's value", [(1, 0), (4, 2)]),
        ("not cut at truncation", [(1, 0)]),
        ("not cut at termination", [(3, 0), (2, 0)]),
    ],
)
def test_table_tells_known_mistakes(mistake, where):
    data, expected = table()
    wrong = oracle(*data, 0.5, 0.5, mistake=mistake)
    for t, n in where:
        assert abs(wrong[t, n] - expected[t, n]) > 0.05


numbers = st.floats(-10, 10, width=32)


@given(
    rewards=arrays(np.float32, (T, N), elements=numbers),
    values=arrays(np.float32, (T + 1, N), elements=numbers),
    final_values=arrays(np.float32, (T, N), elements=numbers),
    ends=arrays(np.int8, (T, N), elements=st.sampled_from([0, 0, 0, 1, 2, 3])),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
)
@FAST
def test_advantages_equal_the_definition(
    advantages_of, rewards, values, final_values, ends, gamma, gae_lambda
):
    terminated, truncated = (ends & 1) != 0, (ends & 2) != 0
    data = (rewards, values, final_values, terminated, truncated)
    advantages, targets = advantages_of(*data, gamma, gae_lambda)
    expected = oracle(*(x.astype(float) for x in data[:3]), *data[3:], gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(targets, expected + values[:-1], rtol=1e-4, atol=1e-4)


@given(
    seed=st.integers(0, 2**32 - 1),
    gamma=st.floats(0.5, 1),
)
@FAST
def test_lambda_1_is_the_discounted_return(advantages_of, seed, gamma):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(T, N)).astype(np.float32)
    values = rng.normal(size=(T + 1, N)).astype(np.float32)
    final_values = rng.normal(size=(T, N)).astype(np.float32)
    terminated, truncated = rng.random((2, T, N)) < 0.2
    data = (rewards, values, final_values, terminated, truncated)
    targets = np.asarray(advantages_of(*data, gamma, 1.0)[1])
    for n in range(N):
        for start in range(T):
            total, factor, t = 0.0, 1.0, start
            while True:  # the rewards up to the end, and what is expected after it
                total += factor * rewards[t, n]
                factor *= gamma
                if terminated[t, n]:
                    break
                if truncated[t, n]:
                    total += factor * final_values[t, n]
                    break
                t += 1
                if t == T:
                    total += factor * values[T, n]
                    break
            assert targets[start, n] == pytest.approx(total, abs=1e-4)


def test_lambda_0_is_the_temporal_difference(advantages_of):
    data, _ = table()
    rewards, values, final_values, terminated, truncated = data
    advantages, _ = advantages_of(*data, 0.9, 0.0)
    follow = np.where(truncated, final_values, values[1:])
    expected = rewards + 0.9 * follow * ~terminated - values[:-1]
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)


def test_values_after_an_end_do_not_matter(advantages_of):
    """Not even infinite ones: what is masked out must not come back as NaN."""
    data, expected = table()
    rewards, values, final_values, terminated, truncated = (x.copy() for x in data)
    final_values[~(truncated & ~terminated)] = np.nan
    advantages, _ = advantages_of(rewards, values, final_values, terminated, truncated, 0.5, 0.5)
    np.testing.assert_array_equal(advantages, expected)


# --- rows that are no experience ---------------------------------------------------------------


def lost():
    """Two environments with gamma = lambda = 1/2, whose step t=2 was lost.

    All deltas are 1, as in environment 3 of the table, but for those that the gap makes.
    """
    (rewards, values, final_values, terminated, truncated), _ = table()
    data = [x[:, 2:].copy() for x in (rewards, values, final_values, terminated, truncated)]
    rewards, _, final_values, _, truncated = data
    rewards[2], truncated[4, 0] = 0, False
    # 0: the episode is lost and another one begins. 1: the environment is dropped.
    final_values[2], truncated[2] = 20, [True, True]
    valid = np.ones((5, 2), bool)
    valid[2, 0], valid[2:, 1] = False, False
    return data, valid, np.array([[1 + 1 / 4, 1 + 1 / 4], [1, 1], [0, 0], [1 + 1 / 4, 0], [1, 0]])


def test_advantages_at_a_gap_are_those_computed_by_hand(advantages_of):
    """The step before it bootstraps from V of its own next observation, and nothing crosses."""
    data, valid, expected = lost()
    advantages, targets = advantages_of(*data, 0.5, 0.5, valid)
    np.testing.assert_array_equal(advantages, expected)
    np.testing.assert_array_equal(targets, expected + data[1][:-1])


def test_a_gap_is_no_ordinary_truncation(advantages_of):
    """That would credit the step before it with 1/4 of 0 + 20/2 - 6, of an action never made."""
    data, _, expected = lost()
    wrong, _ = advantages_of(*data, 0.5, 0.5)
    np.testing.assert_array_equal(wrong[:3, 0], [1 + 2 / 4, 1 + 4 / 4, 4])
    assert (np.abs(wrong[:2] - expected[:2]) >= 0.25).all()


def test_what_a_lost_row_holds_does_not_matter(advantages_of):
    data, valid, expected = lost()
    for array in (data[0], data[2]):
        array[~valid] = np.nan
    np.testing.assert_array_equal(advantages_of(*data, 0.5, 0.5, valid)[0], expected)


@given(
    seed=st.integers(0, 2**32 - 1),
    rates=st.tuples(st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
)
@FAST
def test_advantages_with_gaps_equal_the_definition(advantages_of, seed, rates):
    rng = np.random.default_rng(seed)
    rewards, final_values = rng.normal(size=(2, T, N)).astype(np.float32)
    values = rng.normal(size=(T + 1, N)).astype(np.float32)
    terminated, truncated = rng.random((2, T, N)) < rates[0]
    valid = rng.random((T, N)) >= rates[1]
    data = (rewards, values, final_values, terminated, truncated)
    expected = oracle(*data, 0.9, 0.8, valid)
    np.testing.assert_allclose(advantages_of(*data, 0.9, 0.8, valid)[0], expected, atol=1e-5)


def test_discounted_sums_begin_anew_after_a_gap(discounted):
    rewards = np.array([[1.0, 1.0], [2.0, np.nan], [np.nan, np.nan], [4.0, np.nan], [8.0, 8.0]])
    ended, valid = np.zeros((5, 2), bool), np.isfinite(rewards)
    ended[2, 0] = True  # a lost episode; the other environment was dropped and is heard again
    carry = np.array([16.0, 16.0])
    sums, after = map(np.asarray, discounted(rewards, ended, carry, 0.5, valid))
    np.testing.assert_array_equal(sums[valid[:, 0], 0], [9, 6.5, 4, 10])
    np.testing.assert_array_equal(sums[valid[:, 1], 1], [9, 8])
    np.testing.assert_array_equal(after, [10, 8])


# --- discounted sums ---------------------------------------------------------------------------


@given(
    rewards=arrays(np.float32, (T, N), elements=numbers),
    ended=arrays(np.bool_, (T, N)),
    carry=arrays(np.float32, N, elements=numbers),
    gamma=st.floats(0, 1),
)
@FAST
def test_discounted_sums_restart_after_an_end(discounted, rewards, ended, carry, gamma):
    sums, after = map(np.asarray, discounted(rewards, ended, carry, gamma))
    for n in range(N):
        total = float(carry[n])
        for t in range(T):
            total = total * gamma + rewards[t, n]
            assert sums[t, n] == pytest.approx(total, rel=1e-4, abs=1e-4)
            total = 0.0 if ended[t, n] else total
        assert after[n] == pytest.approx(total, rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def discounted():
    return jax.jit(discounted_sums)


def test_discounted_sums_in_two_parts_are_those_in_one(discounted):
    rng = np.random.default_rng(0)
    rewards, ended = rng.normal(size=(2 * T, N)).astype(np.float32), rng.random((2 * T, N)) < 0.3
    whole, end = discounted(rewards, ended, np.zeros(N, np.float32), 0.9)
    first, carry = discounted(rewards[:T], ended[:T], np.zeros(N, np.float32), 0.9)
    second, carry = discounted(rewards[T:], ended[T:], carry, 0.9)
    np.testing.assert_array_equal(whole, np.concatenate([first, second]))
    np.testing.assert_array_equal(end, carry)
