"""Collection inside a program: the rollouts of the host path, and rows that count for nothing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import shared

from starling.algorithms.ppo import PPO
from starling.config import PPOConfig
from starling.envs.compiled import CompiledStep
from starling.envs.make import make_vec
from starling.errors import UserError
from starling.storage.rollout import Rollout
from starling.training.agent import Agent
from starling.training.collector import HostCollector
from starling.training.compiled_collector import CompiledCollector

N, T = 4, 32


class SharedAgent(Agent):
    algorithm_class: Any = staticmethod(shared(PPO))


def make_agent(observations: gym.Space, actions: gym.Space, **settings: Any) -> SharedAgent:
    sizes = {"num_envs": N, "num_steps": T, "mini_batch_size": 32, "epochs": 2}
    config = PPOConfig(env="any", preset="none", **{**sizes, "hidden_sizes": (8,), **settings})
    return SharedAgent(config, observations, actions)


def never() -> bool:
    return False


# --- as from the host --------------------------------------------------------------------------


def collected(env_id: str, kwargs: dict[str, Any], inside: bool, skip: int = 0) -> list[Rollout]:
    """Three rollouts with an update between, from within a program or from the host.

    `skip` makes the compiled ones take the noise of so many steps later.
    """
    envs = make_vec(env_id, N, backend="compiled", env_kwargs=kwargs, copy=False)
    agent = make_agent(envs.single_observation_space, envs.single_action_space)
    if inside:
        collector: Any = CompiledCollector(envs, T, agent.algorithm, agent.device)
        draw = agent.sampler.new_table
        agent.sampler.new_table = lambda n: jax.tree.map(lambda x: jnp.roll(x, -skip, 0), draw(n))
    else:
        collector = HostCollector(envs, T)
    collector.reset(7)
    rollouts = []
    for _ in range(3):
        rollout = collector.collect(agent, never)
        assert rollout is not None
        assert rollout.origin.version == agent.version
        rollouts.append(jax.tree.map(np.array, rollout))
        agent.update(rollout)
    envs.close()
    return rollouts


def finals(rollout: Rollout) -> dict[int, np.ndarray]:
    """True final observations by the place of their step."""
    pairs = zip(rollout.final_index.tolist(), rollout.final_observations, strict=True)
    return {index: final for index, final in pairs if index < T * N}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_program_collects_what_the_host_does(env_id):
    kwargs = {"max_episode_steps": 9}  # both kinds of end
    for ours, theirs in zip(
        collected(env_id, kwargs, inside=True),
        collected(env_id, kwargs, inside=False),
        strict=True,
    ):
        np.testing.assert_allclose(ours.observations, theirs.observations, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(ours.actions, theirs.actions, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(ours.rewards, theirs.rewards, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(ours.terminated, theirs.terminated)
        np.testing.assert_array_equal(ours.truncated, theirs.truncated)
        assert finals(ours).keys() == finals(theirs).keys() != set()
        for index, final in finals(theirs).items():
            np.testing.assert_allclose(finals(ours)[index], final, rtol=2e-5, atol=2e-5)
        assert ours.origin == theirs.origin
        assert ours.valid is None


def test_noise_of_another_step_gives_other_actions():
    right = collected("Pendulum-v1", {}, inside=True)[0]
    late = collected("Pendulum-v1", {}, inside=True, skip=1)[0]
    assert np.abs(right.actions - late.actions).max() > 0.1


def test_a_rollout_is_not_begun_once_it_is_to_stop():
    envs = make_vec("CartPole-v1", N, backend="compiled")
    agent = make_agent(envs.single_observation_space, envs.single_action_space)
    collector = CompiledCollector(envs, T, agent.algorithm, agent.device)
    collector.reset(0)
    assert collector.collect(agent, lambda: True) is None
    with pytest.raises(UserError, match="exact_resume"):
        collector.restore([])
    envs.close()


# --- environments that reset one step later ----------------------------------------------------


class LateReset:
    """Counts its steps; truncated at `limit` (one more for each environment), reset a step later.

    A reset row is worth 100, which nobody should ever see.
    """

    pure = True
    spec = None
    single_observation_space = gym.spaces.Box(-1, 100, (1,), np.float32)
    single_action_space = gym.spaces.Discrete(2)

    def __init__(self, num_envs: int, limit: int = 4):
        self.num_envs = num_envs
        self.limit = limit + np.arange(num_envs)

    def reset(self, key: jax.Array) -> tuple[Any, jax.Array]:
        count = jnp.zeros(self.num_envs, jnp.int32)
        return count, self._observation(count)

    def step(self, state: jax.Array, action: jax.Array) -> tuple[Any, CompiledStep]:
        resets = state >= self.limit
        count = jnp.where(resets, 0, state + 1)
        reward = jnp.where(resets, 100.0, 1.0 + action)
        truncated = count >= self.limit
        ends = (jnp.zeros(self.num_envs, bool), truncated)
        return count, CompiledStep(self._observation(count), reward, *ends, valid=~resets)

    def _observation(self, count: jax.Array) -> jax.Array:
        return count[:, None].astype(jnp.float32)

    def action_mask(self, state: Any) -> None:
        return None


class LateResetEnvs:
    """What a collector needs of vector environments."""

    def __init__(self, num_envs: int):
        self.compiled = LateReset(num_envs)

    def start(self, seed: Any) -> tuple[Any, jax.Array]:
        return self.compiled.reset(jax.random.key(0))


@pytest.fixture(scope="module")
def late() -> tuple[SharedAgent, Rollout]:
    space = LateReset.single_observation_space
    agent = make_agent(
        space,
        LateReset.single_action_space,
        normalize_observations=True,
        normalize_rewards=True,
    )
    collector = CompiledCollector(LateResetEnvs(N), T, agent.algorithm, agent.device)
    collector.reset(0)
    rollout = collector.collect(agent, never)
    assert rollout is not None
    return agent, rollout


def test_reset_rows_are_marked(late):
    _, rollout = late
    assert rollout.final_index is None
    valid, truncated = np.asarray(rollout.valid), np.asarray(rollout.truncated)
    np.testing.assert_array_equal(~valid[1:], truncated[:-1])
    assert 0 < valid.sum() < valid.size
    assert (np.asarray(rollout.rewards)[valid] < 100).all()


def rows_of(agent: Agent, rollout: Rollout) -> Any:
    """What the update makes of a rollout: the new state, and the rows."""
    ppo: PPO = agent.algorithm
    state, rows, _ = ppo._prepare(agent.algorithm.init(0), rollout, None)
    return state, rows


def test_the_value_of_a_truncated_step_is_that_of_the_next_observation(late):
    agent, rollout = late
    state, rows = rows_of(agent, rollout)
    options, before = agent.config, agent.algorithm.init(0)
    out = agent.algorithm.policy(
        before.params,
        agent.algorithm.policy.features(rollout.observations),
        before.observation_statistics,
    )
    values = np.asarray(out.value)
    rewards = np.asarray(rollout.rewards) / np.asarray(state.reward_statistics.std)
    advantages = np.asarray(rows.advantage).reshape(T, N)
    for n in range(N):
        advantage = 0.0
        for t in reversed(range(T)):
            if rollout.truncated[t, n] or not rollout.valid[t, n]:
                advantage = 0.0
            delta = rewards[t, n] + options.gamma * values[t + 1, n] - values[t, n]
            advantage = delta + options.gamma * options.gae_lambda * advantage
            if rollout.valid[t, n]:
                assert advantages[t, n] == pytest.approx(advantage, abs=1e-4)


def test_reset_rows_enter_neither_loss_nor_statistics(late):
    agent, rollout = late
    actions = jnp.where(rollout.valid, rollout.actions, 1 - rollout.actions)
    rewards = jnp.where(rollout.valid, rollout.rewards, -55.0)
    other = rollout._replace(actions=actions, rewards=rewards)
    ppo = agent.algorithm
    (one, numbers), (two, same) = (ppo.update(ppo.init(0), r) for r in (rollout, other))
    jax.tree.map(np.testing.assert_array_equal, one._replace(key=0), two._replace(key=0))
    assert numbers == same
    assert one.observation_statistics is not None
    assert one.observation_statistics.seen == np.sum(rollout.valid)
    # Without the marks they would:
    wrong, _ = ppo.update(ppo.init(0), other._replace(valid=None))
    assert not np.allclose(wrong.params, one.params)
