"""Compiled environments give, to the bit, what the host gives that steps them one by one."""

from __future__ import annotations

import functools

import gymnasium as gym
import jax
import numpy as np
import pytest
from any_spaces import SPACES
from comparing import actions_for, assert_same, rollout
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.envs.compiled import BatchedEnv
from starling.envs.compiled_vector import CompiledVectorEnv
from starling.envs.serial import SerialVectorEnv
from starling.envs.spaces import flatten, leaves, unflatten

_PRIME = 32749  # numbers below it are mixed without an overflow of 32 bits


class Drawn:
    """Any spaces and lengths: all follows from a number that is drawn, and from the actions.

    It is written in operators only, so that numbers of JAX and of NumPy will do.
    """

    def __init__(self, observation_space, action_space, longest):
        self.observation_space, self.action_space = observation_space, action_space
        self.longest = longest

    def reset(self, key):
        return self.begin(jax.random.randint(key, (), 0, _PRIME))

    def begin(self, number):
        state = number, 1 + number % self.longest
        return state, self.observe(state)

    def step(self, state, action):
        number, left = state
        for leaf in flatten(self.action_space, action):
            number = (31 * number + 17 * leaf.sum() + 7) % _PRIME
        state = number, left - 1
        over = state[1] == 0
        ends = over & (number % 3 != 0), over & (number % 3 != 1)  # or both
        return state, self.observe(state), (number % 17) / 8, *ends

    def observe(self, state):
        values = []
        for k, leaf in enumerate(leaves(self.observation_space)):
            numbers = state[0] + 13 * k + 29 * np.arange(int(np.prod(leaf.shape)))
            start = getattr(leaf.space, "start", 0)
            choices = getattr(leaf.space, "nvec", getattr(leaf.space, "n", 10))
            if isinstance(leaf.space, spaces.MultiBinary):
                choices = 2
            values.append(start + numbers.reshape(leaf.shape) % choices)
        return unflatten(self.observation_space, values)


class Masked(Drawn):
    """The same; an action is forbidden."""

    def action_mask(self, state):
        return np.arange(self.action_space.n) != state[0] % self.action_space.n


class OnHost(gym.Env):
    """One of them, stepped in NumPy: environment i of those that begin with a key."""

    def __init__(self, env, key, i):
        self.env, self.key = env, jax.random.fold_in(key, i)
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def reset(self, *, seed=None, options=None):
        self.key, first = jax.random.split(self.key)
        number = np.asarray(jax.random.randint(first, (), 0, _PRIME), np.int64)
        self.state, observation = self.env.begin(number)
        return self.cast(observation), self.info()

    def step(self, action):
        self.state, observation, reward, *ends = self.env.step(self.state, action)
        # Programs do not tell what would be allowed after the end.
        return self.cast(observation), reward, *ends, {} if any(ends) else self.info()

    def cast(self, observation):
        space = self.observation_space
        values = zip(leaves(space), flatten(space, observation), strict=True)
        return unflatten(space, [np.asarray(value, leaf.dtype) for leaf, value in values])

    def info(self):
        mask = getattr(self.env, "action_mask", None)
        return {} if mask is None else {"action_mask": mask(self.state)}


def assert_compiled_agrees(observation_space, action_space, masked, longest, n, seed, steps=30):
    kind = Masked if masked and isinstance(action_space, spaces.Discrete) else Drawn
    env, key = kind(observation_space, action_space, longest), jax.random.key(seed)
    compiled = CompiledVectorEnv(BatchedEnv(env, n), seed=seed)
    host = SerialVectorEnv([functools.partial(OnHost, env, key, i) for i in range(n)], seed=seed)
    actions = actions_for(compiled, steps, seed)
    try:
        for ours, theirs in zip(rollout(compiled, actions), rollout(host, actions), strict=True):
            assert_same(ours, theirs)
    finally:
        compiled.close()
        host.close()


CASES = given(
    observation_space=SPACES,
    action_space=st.sampled_from(
        [
            spaces.Discrete(3),
            spaces.MultiDiscrete([2, 3]),
            spaces.Dict({"a": spaces.MultiBinary(2), "b": spaces.Tuple([spaces.Discrete(4)])}),
        ]
    ),
    masked=st.booleans(),
    longest=st.integers(1, 12),
    n=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.timeout(120)
@settings(max_examples=5, deadline=None)
@CASES
def test_on_any_spaces_and_lengths(**case):
    assert_compiled_agrees(**case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=300, deadline=None)
@CASES
def test_on_many_spaces_and_lengths(**case):
    assert_compiled_agrees(**case)
