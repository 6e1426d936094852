"""Advantages from the environments to the update, however episodes end and are reset."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advantages_by_hand import table
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from programs import shared

from starling.algorithms.ppo import PPO
from starling.envs.serial import SerialVectorEnv
from starling.training.parallel_ppo import ParallelPPO

GAMMA = GAE_LAMBDA = 0.5

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]


class Watched(PPO):
    """Shows the advantages and value targets that its updates learn from."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seen: list[list[np.ndarray]] = []

    def _advantages(self, *args: Any) -> Any:
        found = super()._advantages(*args)
        jax.debug.callback(lambda *arrays: self.seen.append([*map(np.array, arrays)]), *found)
        return found


class Learnt(NamedTuple):
    """What an update learnt from, and what the environments gave: `[T, N]` each."""

    advantages: np.ndarray
    targets: np.ndarray
    valid: np.ndarray | None
    given: list[tuple[Any, ...]]


@pytest.fixture
def learn(monkeypatch):
    """Collects a rollout and learns from it; V is the sum of an observation's numbers."""
    monkeypatch.setattr(ParallelPPO, "algorithm_class", staticmethod(shared(Watched)))

    def run(env: Any, num_envs: int, num_steps: int, **settings: Any) -> Learnt:
        own = {"num_envs": num_envs, "num_steps": num_steps, "timesteps": num_envs * num_steps}
        own |= {"mini_batch_size": None, "epochs": 1, "hidden_sizes": (), "preset": "none"}
        own |= {"gamma": GAMMA, "gae_lambda": GAE_LAMBDA}
        with ParallelPPO(env, **own, **settings) as agent:
            policy = agent.algorithm.policy
            named = policy.named(agent.state.params)
            named["value/kernel"][:], named["value/bias"][:] = 1.0, 0.0
            agent.state = agent.state._replace(params=jnp.asarray(policy.ravel(named)))
            given = record(agent.envs, monkeypatch)
            collector = agent.make_collector()
            collector.reset(0)
            rollout = collector.collect(agent, lambda: False)
            valid = None if rollout.valid is None else np.array(rollout.valid)
            agent.update(rollout)
            jax.effects_barrier()
            advantages, targets = agent.algorithm.seen.pop()
            assert not agent.algorithm.seen
        return Learnt(advantages, targets, valid, given)

    return run


def record(envs: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Keeps what a vector environment gives to whoever steps it, the first observations first."""
    reset, step, given = envs.reset, envs.step, []

    def noted(result: tuple[Any, ...]) -> tuple[Any, ...]:
        *arrays, infos = result
        finals = [None if x is None else np.array(x) for x in infos.get("final_obs", ())]
        given.append((*map(np.array, arrays), finals))
        return result

    monkeypatch.setattr(envs, "reset", lambda **options: noted(reset(**options)))
    monkeypatch.setattr(envs, "step", lambda actions: noted(step(actions)))
    return given


# --- by hand -----------------------------------------------------------------------------------

(REWARDS, _, _, TERMINATED, TRUNCATED), EXPECTED = table()
STEPS, ENVS = EXPECTED.shape


class Scripted(gym.Env):
    """Column n of the table: observes V itself, and 20 where an episode ends."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, n: int):
        self.n, self.t = n, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: int):
        now = (self.t, self.n)
        self.t += 1
        ends = bool(TERMINATED[now]), bool(TRUNCATED[now])
        observation = np.array([20.0], np.float32) if any(ends) else self._observation()
        return observation, float(REWARDS[now]), *ends, {}

    def _observation(self) -> np.ndarray:
        return np.array([2.0 * (self.t + 1)], np.float32)


def factories(columns: range) -> list[Any]:
    return [lambda n=n: Scripted(n) for n in columns]


def sync(columns: range, mode: AutoresetMode) -> SyncVectorEnv:
    return SyncVectorEnv(factories(columns), autoreset_mode=mode)


@pytest.mark.parametrize("kind", ["serial", "SAME_STEP", "DISABLED"])
def test_advantages_are_those_computed_by_hand(learn, kind):
    own = kind == "serial"
    columns = range(ENVS)
    envs = SerialVectorEnv(factories(columns)) if own else sync(columns, AutoresetMode[kind])
    learnt = learn(envs, ENVS, STEPS)
    assert learnt.valid is None
    np.testing.assert_array_equal(learnt.advantages, EXPECTED)
    values = 2.0 * np.arange(1, STEPS + 1)[:, None]
    np.testing.assert_array_equal(learnt.targets, EXPECTED + values)


@pytest.mark.parametrize("n", range(ENVS))
def test_advantages_are_those_computed_by_hand_where_a_reset_takes_a_step(learn, n):
    resets = int((TERMINATED | TRUNCATED)[:-1, n].sum())  # the last step has none after it
    envs = sync(range(n, n + 1), AutoresetMode.NEXT_STEP)
    learnt = learn(envs, 1, STEPS + resets)
    assert (~learnt.valid).sum() == resets
    np.testing.assert_array_equal(learnt.advantages[learnt.valid], EXPECTED[:, n])


# --- in EnvPool --------------------------------------------------------------------------------


def plain_advantages(given: list[tuple[Any, ...]]) -> np.ndarray:
    """The definition as a loop over what the environments gave, in float64."""
    steps, num_envs = given[1:], len(given[0][0])
    advantages = np.zeros((len(steps), num_envs))
    for n in range(num_envs):
        later = 0.0
        for t in reversed(range(len(steps))):
            observations, rewards, terminated, truncated, finals = steps[t]
            ended = terminated[n] or truncated[n]
            after = finals[n] if ended else observations[n]
            follow = 0.0 if terminated[n] else float(after.sum())
            delta = rewards[n] + GAMMA * follow - float(given[t][0][n].sum())
            later = delta + (0.0 if ended else GAMMA * GAE_LAMBDA * later)
            advantages[t, n] = later
    return advantages


@pytest.mark.skipif(sys.platform != "linux", reason="EnvPool is for Linux")
@pytest.mark.parametrize(("env", "limit"), [("CartPole-v1", 12), ("Pendulum-v1", 8)])
def test_advantages_in_envpool_are_those_of_a_plain_loop(learn, env, limit):
    learnt = learn(env, 4, 24, backend="envpool", env_kwargs={"max_episode_steps": limit})
    terminated, truncated = (np.array([step[i] for step in learnt.given[1:]]) for i in (2, 3))
    assert truncated.any()
    assert terminated.any() == (env == "CartPole-v1")
    assert truncated[-1].any()  # by the last step of the rollout
    expected = plain_advantages(learnt.given)
    np.testing.assert_allclose(learnt.advantages, expected, rtol=1e-5, atol=1e-5)
