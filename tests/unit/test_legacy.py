"""Environments of older Gym interfaces work without anything being said about them."""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from starling.envs.legacy import LegacyEnv, modern_space, modernize
from starling.envs.make import make_env, make_vec
from starling.errors import UserError

LENGTH = 4


class _Old:
    """Gym before 0.26: four values, one of them `done`; a truncation is told in the info."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    truncates = False

    def seed(self, seed=None):
        self.rng = np.random.default_rng(seed)
        return [seed]

    def reset(self):
        self.steps = 0
        return self._observe()

    def step(self, action):
        self.steps += 1
        done = self.steps == LENGTH
        info = {"TimeLimit.truncated": True} if done and self.truncates else {}
        return self._observe(), float(action), done, info

    def _observe(self):
        return self.rng.uniform(-1, 1, 2).astype(np.float32)


class OldTruncating(_Old):
    truncates = True


class OldGymnasium(gym.Env):
    """Half converted: Gymnasium's base class, and returns as before."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe()

    def step(self, action):
        self.steps += 1
        return self._observe(), float(action), self.steps == LENGTH, {}

    def _observe(self):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


class OldWithoutSeed(OldGymnasium):
    """Its `reset` takes nothing, and it draws from Gymnasium's generator."""

    def reset(self):
        self.steps = 0
        return self._observe()


class ReturnsInfo(OldGymnasium):
    """Gym 0.22 to 0.25: the info of a reset has to be asked for."""

    def reset(self, *, seed=None, return_info=False, options=None):
        observation = super().reset(seed=seed)
        return (observation, {}) if return_info else observation


class Modern(OldGymnasium):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed), {"modern": True}

    def step(self, action):
        observation, reward, done, info = super().step(action)
        return observation, reward, done, False, info


OLD = [_Old, OldTruncating, OldGymnasium, OldWithoutSeed, ReturnsInfo]


def episode(env, seed):
    observations = [env.reset(seed=seed)[0]]
    while True:
        observation, _, terminated, truncated, info = env.step(1)
        observations.append(observation)
        assert (type(terminated), type(truncated), type(info)) == (bool, bool, dict)
        if terminated or truncated:
            return np.array(observations), terminated, truncated


@pytest.mark.parametrize("old", OLD)
def test_answers_as_gymnasium_does_and_obeys_the_seed(old):
    env = modernize(old())
    assert isinstance(env, gym.Env)
    first, terminated, truncated = episode(env, seed=3)
    again, _, _ = episode(env, seed=3)
    other, _, _ = episode(env, seed=4)
    assert len(first) == LENGTH + 1
    assert (terminated, truncated) == (not getattr(old, "truncates", False), old is OldTruncating)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("old", OLD)
def test_in_a_vector_environment(old):
    envs = make_vec(old, 3, backend="serial", seed=0)
    observations, _ = envs.reset()
    assert len(np.unique(observations, axis=0)) == 3, "environments share a random stream"
    for _ in range(LENGTH):
        observations, rewards, terminations, truncations, infos = envs.step(np.ones(3, int))
    assert terminations.all() == (old is not OldTruncating)
    assert truncations.all() == (old is OldTruncating)
    assert infos["_final_obs"].all()
    np.testing.assert_array_equal(rewards, np.ones(3))
    envs.close()


@pytest.mark.parametrize("old", [_Old, OldGymnasium, OldWithoutSeed])
def test_registered_in_gymnasium_with_a_time_limit(old, monkeypatch):
    """`gymnasium.make` puts its own wrappers around, which expect the present interface."""
    spec = gym.envs.registration.EnvSpec("Old-v0", entry_point=old, max_episode_steps=2)
    monkeypatch.setitem(gym.registry, "Old-v0", spec)
    observations, terminated, truncated = episode(make_env("Old-v0"), seed=0)
    assert (len(observations), terminated, truncated) == (3, False, True)


def test_a_wrapper_of_the_older_kind_around_an_older_environment():
    class Doubled(gym.Wrapper):
        def step(self, action):
            observation, reward, done, info = self.env.step(action)
            return observation, 2 * reward, done, info

    env = modernize(gym.wrappers.TimeLimit(Doubled(OldGymnasium()), 3))
    env.reset(seed=0)
    assert env.step(1)[1:4] == (2.0, False, False)
    env.step(1)
    assert env.step(1)[1:4] == (2.0, False, True)


def test_a_modern_environment_is_left_as_it_was():
    env = Modern()
    assert modernize(env) is env
    assert env.reset(seed=0)[1] == {"modern": True}
    env.step(0)
    assert "reset" not in vars(env)
    assert "step" not in vars(env)


def test_nothing_is_before_the_steps_of_a_modern_environment_in_a_vector_environment():
    vector = make_vec(Modern, 1, backend="serial")
    vector.reset(seed=0)
    for _ in range(LENGTH):
        vector.step([0])
    (shard,) = vector._workers._shards
    assert shard._steps[0].__func__ is Modern.step
    vector.close()


def test_methods_that_an_instance_has_of_its_own_stay():
    env = Modern()
    calls = []
    inner = env.step
    env.step = lambda action: calls.append(action) or inner(action)
    modernize(env)
    env.reset(seed=0)
    env.step(0)
    env.step(1)
    assert calls == [0, 1]


def test_gymnasiums_own_environments_are_not_touched():
    env = gym.make("CartPole-v1")
    assert modernize(env) is env
    assert "step" not in vars(env.unwrapped)


def test_an_observation_that_looks_like_observation_and_info():
    class Pair(OldGymnasium):
        observation_space = spaces.Tuple(
            (spaces.Discrete(3), spaces.Dict({"x": spaces.Discrete(2)}))
        )

        def _observe(self):
            return 1, {"x": 0}

    assert modernize(Pair()).reset(seed=0) == ((1, {"x": 0}), {})


# ---- what is not Gymnasium's at all


class Box:
    """As `gym.spaces.Box`, of which only the name and the attributes matter."""

    def __init__(self, low, high, dtype):
        self.low, self.high, self.dtype, self.shape = low, high, dtype, low.shape


class Discrete:
    def __init__(self, n):
        self.n = n


class Dict:
    def __init__(self, **parts):
        self.spaces = parts


def test_older_spaces_become_gymnasiums():
    box = Box(np.zeros(2, np.float32), np.ones(2, np.float32), np.dtype("float32"))
    assert modern_space(Dict(a=box, b=Discrete(3))) == spaces.Dict(
        {"a": spaces.Box(0, 1, (2,), np.float32), "b": spaces.Discrete(3)}
    )
    multi = type("MultiDiscrete", (), {"nvec": np.array([2, 3])})()
    assert modern_space(multi) == spaces.MultiDiscrete([2, 3])
    binary = type("MultiBinary", (), {"n": 4})()
    assert modern_space(binary) == spaces.MultiBinary(4)
    pair = type("Tuple", (), {"spaces": [Discrete(2), box]})()
    assert modern_space(pair)[0] == spaces.Discrete(2)


def test_a_space_without_counterpart_is_named():
    with pytest.raises(UserError, match="SimpleNamespace is no space"):
        modern_space(SimpleNamespace())


def test_what_is_no_environment_is_refused():
    with pytest.raises(UserError, match=r"no action_space"):
        modernize(SimpleNamespace(reset=None, step=None, observation_space=spaces.Discrete(2)))


def test_render_close_and_attributes_reach_the_environment():
    closed = []

    class Rendering(_Old):
        gravity = 9.81

        def render(self, mode="human"):
            return mode

        def close(self):
            closed.append(True)

    env = modernize(Rendering())
    assert isinstance(env, LegacyEnv)
    assert env.render() == "rgb_array"
    assert env.get_wrapper_attr("gravity") == 9.81
    env.close()
    assert closed == [True]
    LegacyEnv(_Old()).close()  # has none


@pytest.mark.parametrize(
    ("result", "words"), [((0, 1.0, False), "3 values"), (None, "a NoneType"), ("abcde", "a str")]
)
def test_what_no_interface_returns_is_refused(result, words):
    class Wrong(gym.Env):
        observation_space = action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return result

    env = modernize(Wrong())
    env.reset()
    with pytest.raises(UserError, match=rf"step\(\) returned {words}; return \(observation, "):
        env.step(0)
