"""gymnax's and Brax's environments, the packages' own where they are installed."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from starling.envs.compiled import BatchedEnv
from starling.envs.compiled_brax import BraxEnv
from starling.envs.compiled_gymnax import GymnaxEnv
from starling.envs.make import make_env, make_vec
from starling.errors import MissingExtraError, UserError

pytestmark = pytest.mark.timeout(300)


def run(env, n, steps, action):
    """The steps `[T, N, ...]` of a program that repeats an action."""
    batch = BatchedEnv(env, n)
    actions = jnp.broadcast_to(jnp.asarray(action), (n, *jnp.shape(action)))

    @jax.jit
    def program(key):
        state, first = batch.reset(key)
        step = lambda state, _: batch.step(state, actions)  # noqa: E731
        return first, jax.lax.scan(step, state, None, steps)[1]

    return jax.tree.map(np.asarray, program(jax.random.key(0)))


# ---- gymnax


@dataclasses.dataclass(frozen=True)
class Params:
    goal: float = 3.0
    max_steps_in_episode: int = 5


class WalkState(NamedTuple):
    place: Any
    time: Any


class Walk:
    """Interface of gymnax: walks to a goal, with noise, in a limited number of steps."""

    default_params = Params()

    def __init__(self, wind=0.0):
        self.wind = wind

    def reset_env(self, key, params):
        state = WalkState(jax.random.uniform(key), 0)
        return self._observe(state), state

    def step_env(self, key, state, action, params):
        moved = state.place + action + self.wind + 1e-3 * jax.random.uniform(key)
        state = WalkState(moved, state.time + 1)
        terminated = state.place >= params.goal
        return self._observe(state), state, terminated.astype(float), terminated, {}

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode

    def step(self, key, state, action, params=None):
        raise AssertionError("it resets in every step")

    def _observe(self, state):
        return {"place": state.place[None], "time": jnp.asarray(state.time)}

    def observation_space(self, params):
        place = SimpleNamespace(low=-9.0, high=jnp.full(1, 9.0), shape=(1,), dtype=jnp.float32)
        return SimpleNamespace(spaces={"place": place, "time": SimpleNamespace(n=100)})

    def action_space(self, params):
        return SimpleNamespace(n=2)


@pytest.fixture
def fake_gymnax(monkeypatch):
    """A package of one environment in gymnax's place."""
    module: Any = ModuleType("gymnax")
    module.registered_envs = ["Walk-v0"]
    module.make = lambda env_id, **kwargs: (Walk(**kwargs), Params())
    monkeypatch.setitem(sys.modules, "gymnax", module)


def test_gymnax_spaces():
    env = GymnaxEnv(Walk())
    assert env.observation_space == spaces.Dict(
        {"place": spaces.Box(-9, 9, (1,), np.float32), "time": spaces.Discrete(100)}
    )
    assert env.action_space == spaces.Discrete(2)
    walk = Walk()
    walk.action_space = lambda params: SimpleNamespace(spaces=[SimpleNamespace(n=3)])
    assert GymnaxEnv(walk).action_space == spaces.Tuple([spaces.Discrete(3)])
    walk.action_space = lambda params: object()
    with pytest.raises(UserError, match="has no counterpart"):
        GymnaxEnv(walk)


def test_gymnax_episodes_end_both_ways():
    first, walking = run(GymnaxEnv(Walk()), 3, 12, 1)
    ended = walking.terminated
    np.testing.assert_array_equal(ended, walking.final_observation["place"][..., 0] >= 3)
    np.testing.assert_array_equal(walking.reward, ended)
    assert ended.any()
    assert not walking.truncated.any()
    assert walking.observation["time"][ended].max() == 0
    moved = walking.final_observation["place"][0, :, 0] - first["place"][:, 0]
    assert len(np.unique(moved)) == 3, "each environment has keys of its own"
    _, standing = run(GymnaxEnv(Walk()), 2, 12, 0)
    np.testing.assert_array_equal(np.flatnonzero(standing.truncated[:, 0]), [4, 9])
    assert not standing.terminated.any()
    steps = np.diff(standing.final_observation["place"][:5, 0, 0])
    assert len(np.unique(steps)) == 4, "each step has a key of its own"


def test_gymnax_by_name(fake_gymnax):
    vector = make_vec("gymnax:Walk-v0", 2, "compiled", seed=0, env_kwargs={"max_episode_steps": 2})
    vector.reset()
    assert [vector.step(np.zeros(2, int))[3].all() for _ in range(4)] == [False, True] * 2
    kwargs = {"goal": 2.5, "wind": 1.0}
    env = make_env("gymnax:Walk-v0", kwargs)
    env.reset(seed=0)
    assert [env.step(1)[2] for _ in range(2)] == [False, True]
    assert make_vec("gymnax:Walk-v0", 2).backend == "compiled"
    with pytest.raises(UserError, match="no environment 'Walk-v1': did you mean Walk-v0"):
        make_vec("gymnax:Walk-v1", 2, "compiled")
    with pytest.raises(UserError, match="takes no argument 'gaol': did you mean goal"):
        make_vec("gymnax:Walk-v0", 2, "compiled", env_kwargs={"gaol": 1.0})


def test_gymnaxs_own():
    """Also that it is its CartPole: one step from each state, as ours makes it."""
    pytest.importorskip("gymnax")
    from starling.envs.jax_cartpole import CartPole, CartPoleState

    env = make_vec("gymnax:CartPole-v1", 4, "compiled", seed=0)
    assert env.single_action_space == gym.spaces.Discrete(2)
    ours = jax.jit(jax.vmap(CartPole().step))
    before, _ = env.reset()
    for t in range(60):
        actions = np.full(4, t % 3 > 0)
        after, _, terminations, _, infos = env.step(actions)
        state = CartPoleState(*before.T, np.zeros(4, np.int32))
        _, expected, _, ended, _ = ours(state, actions)
        np.testing.assert_array_equal(terminations, ended)
        for i in range(4):
            own = infos["final_obs"][i] if terminations[i] else after[i]
            np.testing.assert_allclose(own, expected[i], atol=1e-5)
        before = after
    breakout = make_vec("gymnax:Breakout-MinAtar", 2, "compiled", seed=0)
    observations, _ = breakout.reset()
    assert breakout.observation_space.contains(observations)
    assert breakout.observation_space.contains(breakout.step(breakout.action_space.sample())[0])


# ---- Brax


class BraxState(NamedTuple):
    pipeline_state: Any
    obs: Any
    reward: Any
    done: Any
    metrics: dict


class Slide:
    """Interface of Brax: slides by the action, and is done beyond 2."""

    action_size = 2

    def __init__(self, nested=False):
        self.nested = nested

    def reset(self, rng):
        place = jax.random.uniform(rng, (2,), minval=-0.1, maxval=0.1)
        zero = jnp.zeros(())
        return BraxState(place, self._observe(place), zero, zero, {"moved": zero})

    def step(self, state, action):
        place = state.pipeline_state + action
        state.metrics.update(moved=1.0)  # as Brax's own do it
        done = jnp.where(jnp.abs(place).max() > 2, 1.0, 0.0)
        return state._replace(
            pipeline_state=place, obs=self._observe(place), reward=place.sum(), done=done
        )

    def _observe(self, place):
        return {"state": place, "speed": place[:1]} if self.nested else place


def test_brax_spaces():
    env = BraxEnv(Slide())
    assert env.action_space == spaces.Box(-1, 1, (2,), np.float32)
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (2,), np.float32)
    nested = BraxEnv(Slide(nested=True)).observation_space
    assert nested["speed"] == spaces.Box(-np.inf, np.inf, (1,), np.float32)


def test_brax_episodes_end_both_ways():
    first, sliding = run(BraxEnv(Slide(), 50), 3, 12, np.array([0.5, 0.0], np.float32))
    final = sliding.final_observation
    np.testing.assert_allclose(final[0], first + np.array([0.5, 0.0]), atol=1e-6)
    np.testing.assert_array_equal(sliding.terminated, np.abs(final).max(-1) > 2)
    np.testing.assert_allclose(sliding.reward, final.sum(-1), atol=1e-6)
    assert sliding.terminated.any()
    assert np.abs(sliding.observation[sliding.terminated]).max() <= 0.1
    assert not sliding.truncated.any()
    _, still = run(BraxEnv(Slide(nested=True), 4), 2, 9, np.zeros(2, np.float32))
    np.testing.assert_array_equal(np.flatnonzero(still.truncated[:, 0]), [3, 7])
    assert not still.terminated.any()


def test_brax_by_name(monkeypatch):
    def get_environment(name, **kwargs):
        return {"slide": Slide}[name](**kwargs)

    module: Any = ModuleType("brax")
    module.envs = SimpleNamespace(get_environment=get_environment, _envs={"slide": Slide})
    monkeypatch.setitem(sys.modules, "brax", module)
    kwargs = {"max_episode_steps": 2, "nested": True}
    vector = make_vec("brax:slide", 2, "compiled", seed=0, env_kwargs=kwargs)
    observations, _ = vector.reset()
    assert set(observations) == {"state", "speed"}
    still = np.zeros((2, 2), np.float32)
    assert [vector.step(still)[3].all() for _ in range(4)] == [False, True] * 2
    with pytest.raises(UserError, match="no environment 'slid': did you mean slide"):
        make_vec("brax:slid", 2, "compiled")
    with pytest.raises(UserError, match=r"cannot make slide with \{'mass': 1\}"):
        make_vec("brax:slide", 2, "compiled", env_kwargs={"mass": 1})


def test_braxs_own():
    pytest.importorskip("brax")
    vector = make_vec("brax:fast", 2, "compiled", seed=0, env_kwargs={"max_episode_steps": 3})
    observations, _ = vector.reset()
    assert vector.observation_space.contains(observations)
    actions = [vector.action_space.sample() for _ in range(6)]
    assert [vector.step(action)[3].all() for action in actions] == [False, False, True] * 2


# ---- neither


@pytest.mark.parametrize("name", ["gymnax", "brax"])
def test_what_is_not_installed_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'starling-rl\[{name}\]'"):
        make_vec(f"{name}:ant", 2, "compiled")
