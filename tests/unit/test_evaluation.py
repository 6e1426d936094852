"""Episodes are counted right, whatever their lengths, on environments whose course is known."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from envs_for_tests import CountingEnv, MaskedEnv
from gymnasium import spaces

from starling.envs.make import make_vec
from starling.errors import WorkerError
from starling.training.evaluation import EvaluationResult, evaluate_policy, evaluation_seed


class SeededLengths(gym.Env):
    """The seed decides how long all its episodes are; the reward is the action."""

    observation_space = spaces.Box(0, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(5)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.length = 1 + seed % 7
        self.steps = 0
        return np.array([self.length], np.float32), {}

    def step(self, action: int):
        self.steps += 1
        return np.array([self.length], np.float32), float(action), self.steps >= self.length, 0, {}


class Scripted:
    """A vector environment that plays back rows of (rewards, ended, valid)."""

    def __init__(self, rows: list[tuple[list[float], list[int], list[int] | None]]):
        self.rows = list(rows)
        self.num_envs = len(rows[0][0])
        self.seeds: list[int] = []

    def heed(self, stop: Any):
        pass

    def reset(self, seed: int):
        self.seeds.append(seed)
        return np.zeros((self.num_envs, 1)), {}

    def step(self, actions: Any):
        rewards, ended, valid = self.rows.pop(0)
        infos = {} if valid is None else {"valid": np.array(valid, bool)}
        terminated = np.array(ended) == 1
        truncated = np.array(ended) == 2
        return np.zeros((self.num_envs, 1)), np.array(rewards), terminated, truncated, infos


class AlwaysInvalid(CountingEnv):
    """Observes NaN in the third step of each episode."""

    def step(self, action):
        observation, *rest = super().step(action)
        return (observation * np.nan if self.steps == 3 else observation), *rest


def no_actions(observations: Any, mask: Any) -> None:
    return None


@pytest.mark.parametrize(("episodes", "num_envs"), [(1, 1), (5, 5), (7, 3), (2, 2), (100, 4)])
def test_plays_exactly_as_many_episodes_as_asked(episodes, num_envs):
    envs = make_vec(SeededLengths, num_envs, backend="serial")
    result = evaluate_policy(lambda obs, mask: np.full(len(obs), 2), envs, episodes, seed=0)
    assert result is not None
    assert result.episodes == len(result.lengths) == episodes
    np.testing.assert_array_equal(result.returns, 2 * result.lengths)
    assert result.lengths.min() >= 1
    envs.close()


def test_short_episodes_are_not_favoured():
    """Taking whichever episodes end first would take nearly all from the shortest."""
    n = 7
    envs = make_vec(SeededLengths, n, backend="serial")
    first, _ = envs.reset(seed=evaluation_seed(3))
    lengths = first[:, 0].astype(int)
    assert lengths.max() > 2 * lengths.min()
    result = evaluate_policy(lambda obs, mask: np.ones(n, int), envs, 3 * n + 2, seed=3)
    assert result is not None
    shares = [4 if i < 2 else 3 for i in range(n)]
    expected = np.repeat(lengths, shares)
    np.testing.assert_array_equal(np.sort(result.lengths), np.sort(expected))
    envs.close()


def test_returns_are_summed_from_end_to_end():
    envs = Scripted(
        [
            ([1.0, 10.0], [0, 2], None),
            ([2.0, 20.0], [1, 0], None),
            ([4.0, 40.0], [0, 1], None),
            ([8.0, 80.0], [2, 0], None),
        ]
    )
    result = evaluate_policy(no_actions, envs, 4, seed=0)  # pyright: ignore
    assert result is not None
    np.testing.assert_array_equal(result.returns, [3, 12, 10, 60])
    np.testing.assert_array_equal(result.lengths, [2, 2, 1, 2])
    assert (result.mean_return, result.median_return, result.mean_length) == (21.25, 11, 1.75)
    assert result.std_return == pytest.approx(np.std([3, 12, 10, 60]))


def test_episodes_beyond_an_environments_share_do_not_count():
    envs = Scripted(
        [([1.0, 5.0], [1, 0], None), ([2.0, 5.0], [1, 0], None), ([3, 5], [1, 1], None)]
    )
    result = evaluate_policy(no_actions, envs, 2, seed=0)  # pyright: ignore
    assert result is not None
    np.testing.assert_array_equal(result.returns, [1, 15])


def test_rows_that_are_no_experience_do_not_count():
    """The reset rows of NEXT_STEP environments."""
    envs = Scripted(
        [
            ([1.0], [1], [1]),
            ([100.0], [0], [0]),
            ([2.0], [0], [1]),
            ([4.0], [1], [1]),
        ]
    )
    result = evaluate_policy(no_actions, envs, 2, seed=0)  # pyright: ignore
    assert result is not None
    np.testing.assert_array_equal(result.returns, [1, 6])
    np.testing.assert_array_equal(result.lengths, [1, 2])


def test_a_lost_episode_is_played_anew():
    envs = Scripted(
        [
            ([1.0, 1.0], [0, 0], [1, 1]),
            ([0.0, 1.0], [2, 0], [0, 1]),  # the first environment failed
            ([2.0, 1.0], [0, 1], [1, 1]),
            ([4.0, 1.0], [1, 0], [1, 1]),
        ]
    )
    result = evaluate_policy(no_actions, envs, 2, seed=0)  # pyright: ignore
    assert result is not None
    np.testing.assert_array_equal(result.returns, [6, 3])
    np.testing.assert_array_equal(result.lengths, [2, 3])


def test_seeds_are_fresh_and_repeatable():
    assert evaluation_seed(1) == evaluation_seed(1)
    seeds = [evaluation_seed(seed) for seed in range(1000)]
    assert len(set(seeds)) == 1000
    assert not set(seeds) & set(range(1000))  # no training with such a seed sees its episodes
    envs = Scripted([([1.0], [1], None)])
    evaluate_policy(no_actions, envs, 1, seed=4)  # pyright: ignore
    assert envs.seeds == [evaluation_seed(4)]


def test_it_can_be_stopped():
    envs = make_vec(CountingEnv, 2, backend="serial")
    answers = iter([False, False, True])
    asked = evaluate_policy(lambda o, m: np.zeros(2, int), envs, 10, 0, stop=lambda: next(answers))
    assert asked is None
    envs.close()


def test_episodes_that_are_all_cut_off_come_to_an_end(no_leaks):
    envs = make_vec(AlwaysInvalid, 2, backend="serial", on_invalid_data="truncate")
    with pytest.raises(WorkerError, match=r"4[12] episodes were .* 0 of 4 came to their end"):
        evaluate_policy(lambda o, m: np.zeros(2, int), envs, 4, 0)
    envs.close()


def test_masks_are_those_of_the_observations_acted_on():
    envs = make_vec(MaskedEnv, 3, backend="serial", copy=False)

    def predict(observations, mask):
        forbidden = observations[:, 1].astype(int) % 3
        np.testing.assert_array_equal(mask, np.arange(3) != forbidden[:, None])
        return np.argmax(mask, -1)

    assert evaluate_policy(predict, envs, 6, seed=0) is not None
    envs.close()


def test_summary_has_the_names_of_the_command():
    result = EvaluationResult(np.array([1.0, 2.0, 6.0]), np.array([1, 2, 3]))
    assert result.summary() == {
        "mean_return": 3.0,
        "std_return": pytest.approx(np.std([1, 2, 6])),
        "median_return": 2.0,
        "mean_length": 2.0,
        "episodes": 3,
    }
