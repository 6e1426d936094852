"""EnvPool inside a program makes the rollouts that it makes for the host."""

from __future__ import annotations

import gymnasium as gym
import jax
import numpy as np
import pytest

pytest.importorskip("envpool")

from starling.envs.compiled_envpool import XlaEnvPool
from starling.envs.compiled_make import make_compiled
from starling.envs.envpool import EnvPoolVectorEnv
from starling.envs.make import make_vec
from starling.envs.spaces import flatten
from starling.envs.stepping_rate import rate_of

pytestmark = pytest.mark.timeout(120)

N, SEED = 3, 7


def actions_of(env, steps):
    """Actions that every step of an environment repeats, so that rows can be left out."""
    env.single_action_space.seed(1)
    row = np.stack([env.single_action_space.sample() for _ in range(env.num_envs)])
    return np.broadcast_to(row, (steps, *row.shape))


def program_rollout(env, actions, key=SEED):
    """First observations, and the steps `[T, N, ...]`, of one program."""
    state, first = env.reset(jax.random.key(key))
    _, made = jax.jit(lambda state: jax.lax.scan(env.step, state, actions))(state)
    return jax.tree.map(np.asarray, (first, made))


def leaves_of(env, observations):
    return flatten(env.single_observation_space, observations)


def assert_same_rollouts(env_id, limit, steps=70, tolerance=0.0):
    """Row by row, for each environment, once the rows that are no experience are left out."""
    kwargs = {"max_episode_steps": limit}
    env = XlaEnvPool(env_id, N, kwargs)
    actions = actions_of(env, steps)
    first, made = program_rollout(env, actions)
    host = EnvPoolVectorEnv(env_id, N, env_kwargs=kwargs, seed=SEED)
    host_first, _ = host.reset()
    host_steps = [host.step(action) for action in actions]
    host.close()
    for ours, theirs in zip(leaves_of(env, first), leaves_of(env, host_first), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)
    ends = np.zeros(2, int)
    for i in range(N):
        rows = np.flatnonzero(made.valid[:, i])
        assert len(rows) < steps, "no episode ended"
        for t, row in enumerate(rows):
            observations, rewards, terminations, truncations, infos = host_steps[t]
            ended = terminations[i] | truncations[i]
            assert made.terminated[row, i] == terminations[i]
            assert made.truncated[row, i] == truncations[i]
            np.testing.assert_allclose(made.reward[row, i], rewards[i], rtol=1e-6)
            ours = [leaf[row, i] for leaf in leaves_of(env, made.observation)]
            one = infos["final_obs"][i] if ended else None
            theirs = leaves_of(env, one) if ended else [x[i] for x in leaves_of(env, observations)]
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, atol=tolerance)
            ends += [terminations[i], truncations[i]]
    assert made.final_observation is None
    return made, ends


@pytest.mark.parametrize(
    ("env_id", "limit", "tolerance"),
    [
        ("CartPole-v1", 9, 0.0),
        ("Pendulum-v1", 9, 0.0),
        ("HalfCheetah-v5", 9, 1e-6),  # float64 for the host
        ("CartpoleBalance-v1", 9, 1e-6),  # nested, and its limit is not counted by Starling
        ("Pong-v5", 9, 0.0),
    ],
)
def test_rollouts_are_those_of_the_host(env_id, limit, tolerance):
    _, (_, truncations) = assert_same_rollouts(env_id, limit, tolerance=tolerance)
    assert truncations > 3 * N


def test_terminations_too():
    made, (terminations, truncations) = assert_same_rollouts("CartPole-v1", 500)
    assert terminations >= N
    assert truncations == 0
    ended = made.terminated | made.truncated
    np.testing.assert_array_equal(made.valid[1:], ~ended[:-1])


def test_a_wrong_seed_is_found_out(monkeypatch):
    monkeypatch.setattr(jax.random, "key_data", lambda key: np.array([0, SEED + 1], np.uint32))
    with pytest.raises(AssertionError, match="Not equal"):
        assert_same_rollouts("CartPole-v1", 9)


def test_two_rows_are_no_experience_where_the_limit_is_counted():
    """EnvPool's limit is one step later: that step and the reset follow a truncation."""
    env = XlaEnvPool("Pendulum-v1", 2, {"max_episode_steps": 3})
    _, made = program_rollout(env, np.zeros((10, 2, 1), np.float32))
    np.testing.assert_array_equal(made.truncated[:, 0], [0, 0, 1, 0, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(made.valid[:, 0], [1, 1, 1, 0, 0, 1, 1, 1, 0, 0])
    assert not made.terminated.any()


def test_a_failure_in_the_very_last_step_is_a_termination():
    """EnvPool itself calls it a truncation, and its value would be bootstrapped."""
    push = np.ones((20, 1), int)
    _, free = program_rollout(XlaEnvPool("CartPole-v1", 1), push, key=3)
    length = int(free.terminated[:, 0].argmax()) + 1
    limited = XlaEnvPool("CartPole-v1", 1, {"max_episode_steps": length})
    _, made = program_rollout(limited, push[: length + 2], key=3)
    assert (made.terminated[length - 1, 0], made.truncated[length - 1, 0]) == (True, True)
    np.testing.assert_array_equal(made.valid[length - 1 :, 0], [True, False, True])


def test_64_bit_arrays_do_no_harm():
    """EnvPool's own `xla()` writes them over the memory behind, which ends the process."""
    env = XlaEnvPool("HalfCheetah-v5", 16)
    _, made = program_rollout(env, actions_of(env, 50))
    assert made.observation.dtype == np.float32
    assert made.reward.dtype == np.float32
    assert not jax.config.jax_enable_x64
    assert 0.1 < np.abs(made.observation).mean() < 10


def test_action_masks():
    env = XlaEnvPool("Play2048-v1", 2)
    state, _ = env.reset(jax.random.key(0))

    @jax.jit
    def step(state):
        action = env.action_mask(state).argmax(axis=1)
        return env.step(state, action)

    host = EnvPoolVectorEnv("Play2048-v1", 2, seed=0)
    _, infos = host.reset()
    for _ in range(10):
        np.testing.assert_array_equal(env.action_mask(state), infos["action_mask"])
        *_, infos = host.step(infos["action_mask"].argmax(axis=1))
        state, made = step(state)
        np.testing.assert_array_equal(made.action_mask, infos["action_mask"])
    assert rate_of("Play2048-v1", 2, "compiled", seconds=0.001).steps_per_second > 0


def test_a_later_reset_starts_episodes_in_the_same_pool():
    """Programs are bound to the pool that they were compiled with."""
    env = XlaEnvPool("Pendulum-v1", 2, {"max_episode_steps": 5})
    step = jax.jit(env.step)
    state, first = env.reset(jax.random.key(0))
    torque = np.zeros((2, 1), np.float32)
    for _ in range(3):
        state, made = step(state, torque)
    state, second = env.reset(jax.random.key(0))
    assert not np.array_equal(first, second)
    for t in range(5):
        state, made = step(state, torque)
        assert made.valid.all()
        assert made.truncated.all() == (t == 4)


def test_the_backend_of_what_only_envpool_has():
    vector = make_vec("HalfCheetah-v5", 2, "compiled", seed=5, infos="all")
    oracle = EnvPoolVectorEnv("HalfCheetah-v5", 2, seed=5, infos="all")
    assert vector.backend == "compiled"
    assert isinstance(vector.compiled, XlaEnvPool)
    assert vector.spec.id == "HalfCheetah-v5"
    np.testing.assert_array_equal(vector.reset()[0], oracle.reset()[0])
    action = np.full((2, 6), 0.5, np.float32)
    ours, theirs = vector.step(action), oracle.step(action)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[-1]["x_position"], theirs[-1]["x_position"])
    _, first = vector.start()
    np.testing.assert_allclose(first, oracle.reset(seed=5)[0], atol=1e-6)
    vector.close()


def test_our_own_versions_come_first():
    assert make_compiled("Pendulum-v1", 2).pure
    assert make_compiled(gym.spec("CartPole-v1"), 2).pure
    assert make_compiled("CartPole", 2).pure
    assert not make_compiled("Acrobot-v1", 2).pure
    assert make_compiled("Acrobot-v1", 2, {"max_episode_steps": 5}).spec.max_episode_steps == 5
