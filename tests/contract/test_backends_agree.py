"""For one seed, serial, thread and process stepping give the same to the last bit."""

from __future__ import annotations

import functools

import envs_for_tests as envs
import gymnasium as gym
import pytest
from any_spaces import SPACES
from comparing import actions_for, assert_same, rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends import BACKENDS

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("no_leaks")]


def assert_backends_agree(factory, n, workers, seed, steps, names=tuple(BACKENDS), **options):
    oracle = BACKENDS["serial"]([factory] * n, seed=seed, **options)
    actions = actions_for(oracle, steps, seed)
    expected = rollout(oracle, actions)
    oracle.close()
    for name in names:
        vector = BACKENDS[name]([factory] * n, seed=seed, num_workers=workers, **options)
        try:
            assert vector.num_workers == min(workers, n)
            for ours, theirs in zip(rollout(vector, actions), expected, strict=True):
                assert_same(ours, theirs)
        finally:
            vector.close()


@pytest.mark.parametrize("options", [{}, {"infos": "all"}, {"episode_seeds": True}])
def test_on_cart_pole_over_many_episodes(options):
    assert_backends_agree(lambda: gym.make("CartPole-v1"), 7, 3, 0, 400, **options)


def test_on_pendulum_truncated():
    assert_backends_agree(lambda: gym.make("Pendulum-v1", max_episode_steps=20), 4, 2, 1, 100)


@settings(max_examples=40, deadline=None)
@given(
    space=SPACES, action_space=SPACES, n=st.integers(1, 5), w=st.integers(1, 3), seed=st.integers(0)
)
def test_on_any_spaces_in_threads(space, action_space, n, w, seed):
    factory = functools.partial(envs.SampleEnv, space, action_space)
    seed %= 2**32
    assert_backends_agree(factory, n, w, seed, 25, ("serial", "thread"), infos="all")


@settings(max_examples=8, deadline=None)
@given(space=SPACES, action_space=SPACES, n=st.integers(1, 5), seed=st.integers(0, 1000))
def test_on_any_spaces_in_processes(space, action_space, n, seed):
    factory = functools.partial(envs.SampleEnv, space, action_space)
    assert_backends_agree(factory, n, 2, seed, 25, ("process",), infos="all")
