"""Compiled environments: the dynamics are Gymnasium's, and episodes follow one another."""

from __future__ import annotations

import functools
from typing import NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from starling.envs.compiled import BatchedEnv
from starling.envs.jax_cartpole import CartPole
from starling.envs.jax_pendulum import Pendulum

pytestmark = pytest.mark.timeout(120)

N, STEPS = 8, 300


# ---- the same dynamics as Gymnasium's


def cart_pole_actions(observations, step, generator):
    balanced = (observations @ np.array([0.05, 0.1, 3.0, 1.0]) > 0).astype(int)
    noise = generator.random(N) < np.linspace(0, 1, N)  # some fall, some last
    return np.where(noise, generator.integers(0, 2, N), balanced)


def pendulum_actions(observations, step, generator):
    whirled = np.where(observations[:, 2] >= 0, 2.5, -2.5)  # up to the top speed, and too strong
    chosen = np.where(np.arange(N) < N // 2, whirled, generator.uniform(-2, 2, N))
    return chosen.astype(np.float32)[:, None]


def pendulum_state(observation):
    cosine, sine, speed = observation.astype(np.float64)
    return np.array([np.arctan2(sine, cosine), speed])


TASKS = {
    "CartPole-v1": (CartPole, cart_pole_actions, lambda row: row.astype(np.float64)),
    "Pendulum-v1": (Pendulum, pendulum_actions, pendulum_state),
}


def deviation(env_id, env, limit, steps=STEPS, seed=0):
    """How far `env`, cut off at `limit`, is from Gymnasium's: one step from each state it visits.

    Returns the largest differences of observations and rewards, whether the ends were all the
    same, and the numbers of terminations and truncations.
    """
    _, actions_of, state_of = TASKS[env_id]
    batch = BatchedEnv(env, N)
    reset, step = jax.jit(batch.reset), jax.jit(batch.step)
    oracle, generator = gym.make(env_id).unwrapped, np.random.default_rng(seed)
    oracle.reset(seed=0)
    state, before = reset(jax.random.key(seed))
    before, lengths = np.asarray(before), np.zeros(N, int)
    worst, same_ends, ends = np.zeros(2), True, np.zeros(2, int)
    for t in range(steps):
        actions = actions_of(before, t, generator)
        state, result = step(state, actions)
        result = jax.tree.map(np.asarray, result)
        lengths += 1
        for i in range(N):
            oracle.state, oracle.steps_beyond_terminated = state_of(before[i]), None
            observation, reward, terminated, _, _ = oracle.step(actions[i])
            off = np.abs(result.final_observation[i] - observation).max()
            worst = np.maximum(worst, [off, abs(result.reward[i] - reward)])
            same_ends &= bool(result.terminated[i]) == terminated
            same_ends &= bool(result.truncated[i]) == (lengths[i] == limit)
        ended = result.terminated | result.truncated
        ends += [result.terminated.sum(), result.truncated.sum()]
        lengths[ended] = 0
        np.testing.assert_array_equal(
            result.observation[~ended], result.final_observation[~ended], strict=True
        )
        before = result.observation
    return worst, same_ends, ends


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("short", [False, True])
def test_dynamics_and_ends_are_gymnasiums(env_id, short):
    limit = 60 if short else gym.spec(env_id).max_episode_steps
    worst, same_ends, (terminations, truncations) = deviation(
        env_id, TASKS[env_id][0](limit), limit, steps=STEPS if short else limit + 20
    )
    assert worst.max() < 1e-5, "observations, rewards"
    assert same_ends
    assert truncations > 0
    assert terminations > 0 or env_id == "Pendulum-v1"


@pytest.mark.parametrize("env_id", TASKS)
def test_spaces_and_limits_are_gymnasiums(env_id):
    ours, theirs = BatchedEnv(TASKS[env_id][0](), N), gym.make(env_id)
    assert ours.single_observation_space == theirs.observation_space
    assert ours.single_action_space == theirs.action_space
    assert ours.spec == gym.spec(env_id)
    assert TASKS[env_id][0](7).spec.max_episode_steps == 7


class SemiImplicit(CartPole):
    """Moves by the new speed: Euler's other method."""

    def step(self, state, action):
        after, _, *rest = super().step(state, action)
        after = after._replace(
            x=state.x + 0.02 * after.speed, angle=state.angle + 0.02 * after.turning
        )
        return after, jnp.stack(after[:4]), *rest


class Unlimited(Pendulum):
    """Moves by the speed before it is limited, as EnvPool's does."""

    def step(self, state, action):
        after, _, *rest = super().step(state, action)
        pull = 15 * jnp.sin(state.angle) + 3 * jnp.clip(action[0], -2, 2)
        angle = state.angle + 0.05 * (state.speed + 0.05 * pull)
        after = after._replace(angle=angle)
        return after, jnp.stack([jnp.cos(angle), jnp.sin(angle), after.speed]), *rest


class NeverFalls(CartPole):
    def step(self, state, action):
        *rest, terminated, truncated = super().step(state, action)
        return *rest, jnp.zeros_like(terminated), truncated


@pytest.mark.parametrize(
    ("env_id", "wrong", "limit"),
    [
        ("CartPole-v1", SemiImplicit(500), 500),
        ("CartPole-v1", NeverFalls(500), 500),
        ("CartPole-v1", CartPole(61), 60),
        ("Pendulum-v1", Unlimited(200), 200),
        ("Pendulum-v1", Pendulum(199), 200),
    ],
    ids=["integration", "termination", "limit", "top speed", "limit of Pendulum"],
)
def test_a_wrong_variant_is_found_out(env_id, wrong, limit):
    worst, same_ends, _ = deviation(env_id, wrong, limit, steps=210)
    assert worst.max() > 1e-5 or not same_ends


@pytest.mark.parametrize(("env_id", "high"), [("CartPole-v1", 0.05), ("Pendulum-v1", np.pi)])
def test_first_states_are_spread_as_gymnasiums(env_id, high):
    n = 4000
    batch = BatchedEnv(TASKS[env_id][0](), n)
    state, observations = jax.jit(batch.reset)(jax.random.key(0))
    oracle = gym.make(env_id).unwrapped
    first = np.array([oracle.reset(seed=seed)[0] for seed in range(n)])
    quantiles = np.linspace(0, 1, 9)
    assert np.asarray(observations) == pytest.approx(observations)
    difference = np.quantile(observations, quantiles, 0) - np.quantile(first, quantiles, 0)
    assert np.abs(difference).max() < 0.06 * first.max()
    if env_id == "Pendulum-v1":
        assert np.abs(state.envs.angle).max() == pytest.approx(high, rel=1e-2)
    else:
        assert np.abs(observations).max() == pytest.approx(high, rel=1e-2)


# ---- episodes


class CountState(NamedTuple):
    key: jax.Array
    length: jax.Array
    steps: jax.Array


class Count:
    """Counts its steps; an episode's length is drawn, and every third ends by termination."""

    observation_space = spaces.Dict(
        {"key": spaces.Box(0, 1, (), np.float32), "steps": spaces.Box(0, 9, (1,), np.int8)}
    )
    action_space = spaces.Discrete(3)

    def reset(self, key):
        state = CountState(key, jax.random.randint(key, (), 2, 6), 0)
        return state, self.observe(state)

    def step(self, state, action):
        state = state._replace(steps=state.steps + 1)
        ended = state.steps == state.length
        return state, self.observe(state), action, ended & (state.length % 3 == 0), ended

    def observe(self, state):
        return {"key": jax.random.uniform(state.key), "steps": jnp.atleast_1d(state.steps)}

    def action_mask(self, state):
        return jnp.arange(3) != state.steps % 3


def count_rollout(n, steps=40, seed=3, transform=jax.jit):
    batch = BatchedEnv(Count(), n)
    action = jnp.arange(n) % 3

    def step(state, _):
        return batch.step(state, action)

    def run(key):
        state, first = batch.reset(key)
        return first, batch.action_mask(state), jax.lax.scan(step, state, None, steps)[1]

    return jax.tree.map(np.asarray, transform(run)(jax.random.key(seed)))


def test_the_next_episode_starts_in_the_same_step():
    first, mask, steps = count_rollout(40)
    np.testing.assert_array_equal(first["steps"], 0)
    np.testing.assert_array_equal(mask, [[False, True, True]] * 40)
    ended = steps.terminated | steps.truncated
    assert steps.terminated.any()
    assert (ended & ~steps.terminated).any()
    seen = np.concatenate([first["steps"][None], steps.observation["steps"]])[..., 0]
    keys = np.concatenate([first["key"][None], steps.observation["key"]])
    final = steps.final_observation
    np.testing.assert_array_equal(final["steps"][..., 0], seen[:-1] + 1)
    np.testing.assert_array_equal(final["key"], keys[:-1])
    np.testing.assert_array_equal(seen[1:], np.where(ended, 0, seen[:-1] + 1))
    assert (keys[1:][ended] != keys[:-1][ended]).all(), "the next episode has a key of its own"
    assert len(np.unique(keys)) == 40 + ended.sum(), "no two episodes have the same"
    np.testing.assert_array_equal(steps.action_mask, np.arange(3) != seen[1:, :, None] % 3)
    np.testing.assert_array_equal(steps.reward, np.broadcast_to(np.arange(40) % 3, (40, 40)))
    assert steps.reward.dtype == np.float32
    assert steps.observation["steps"].dtype == np.int8
    assert steps.valid is None


def test_an_environment_does_not_depend_on_how_many_there_are():
    few, many = count_rollout(5), count_rollout(37)
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        rows = a.shape[: 1 if a.ndim < 2 or a.shape[1] != 5 else 2]
        np.testing.assert_array_equal(a, b[:5] if len(rows) == 1 else b[:, :5])


def test_resetting_in_groups_gives_what_resetting_all_gives(monkeypatch):
    groups = count_rollout(40)
    from starling.envs.compiled import BatchedEnv

    monkeypatch.setattr(BatchedEnv, "_restart_in_groups", BatchedEnv._restart_at_once)
    whole = count_rollout(40)
    jax.tree.map(np.testing.assert_array_equal, groups, whole)


def test_many_rollouts_at_once():
    keys = jnp.arange(3)

    def several(run):
        return lambda key: jax.jit(jax.vmap(lambda i: run(jax.random.fold_in(key, i))))(keys)

    def one(run, i):
        return lambda key: jax.jit(run)(jax.random.fold_in(key, i))

    together = count_rollout(6, transform=several)
    for i in range(3):
        alone = count_rollout(6, transform=functools.partial(lambda run, i: one(run, i), i=i))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), together, alone)
