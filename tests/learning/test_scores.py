"""What each preset must reach, in the time that it takes by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from counters import metrics_of

from starling.envs.make import make_env
from starling.errors import UserError
from starling.training.async_ppo import AsyncPPO
from starling.training.dqn import DQN
from starling.training.parallel_ppo import ParallelPPO

EPISODES = 100


@pytest.fixture
def score(tmp_path, no_leaks):
    """Trains with a preset and scores the result, greedy, on fresh episodes."""

    def run(env: str, seed: int, most_steps: int, trainer: Any = ParallelPPO, **settings: Any):
        try:
            make_env(env).close()
        except UserError as error:
            pytest.skip(str(error))
        with trainer(env, seed=seed, log_dir=str(tmp_path), **settings) as agent:
            assert agent.config.preset == env
            result = agent.train(quiet=True)
            assert result.status == "completed"
            assert result.steps <= most_steps + agent.config.batch_size
            if trainer is AsyncPPO:
                lags = [line["async/policy_lag_max"] for line in metrics_of(agent.run)]
                assert max(lags) >= 1
            mean = agent.evaluate(EPISODES, seed=seed + 1).mean_return
        print(f"{env}, {agent.config.algo}, seed {seed}: {mean:.1f} after {result.steps} steps")
        return mean

    return run


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3, 4))]
)
def test_cartpole_is_solved(score, seed):
    assert score("CartPole-v1", seed, 300_000) >= 475


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a2c_solves_cartpole(score, seed):
    assert score("CartPole-v1", seed, 500_000, algo="a2c") >= 475


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("env", "floor"),
    [("Acrobot-v1", -100), ("MountainCarContinuous-v0", 90), ("Pendulum-v1", -200)],
)
def test_classic_control_with_every_seed(score, env, floor, seed):
    assert score(env, seed, 1_000_000) >= floor


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("env", "floor"), [("CartPole-v1", 475), ("Pendulum-v1", -200)])
def test_async_ppo_with_every_seed(score, env, floor, seed):
    assert score(env, seed, 500_000, AsyncPPO) >= floor


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("num_envs", [1, 4, 16])
def test_dqn_solves_cartpole_with_any_number_of_environments(score, num_envs, seed):
    assert score("CartPole-v1", seed, 200_000, DQN, num_envs=num_envs) >= 475


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dqn_swings_up(score, seed):
    assert score("Acrobot-v1", seed, 100_000, DQN) >= -100


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize(
    ("env", "most_steps", "floor"),
    [("MountainCar-v0", 150_000, -130), ("LunarLander-v3", 500_000, 200)],
)
def test_dqn_with_the_mean_of_three_seeds(score, env, most_steps, floor):
    assert np.mean([score(env, seed, most_steps, DQN) for seed in range(3)]) >= floor


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_async_ppo_lands(score):
    assert np.mean([score("LunarLander-v3", seed, 1_000_000, AsyncPPO) for seed in range(3)]) >= 200


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize(
    ("env", "floor"), [("LunarLander-v3", 200), ("HalfCheetah-v5", 2000), ("Hopper-v5", 2000)]
)
def test_mean_of_three_seeds(score, env, floor):
    assert np.mean([score(env, seed, 1_000_000) for seed in range(3)]) >= floor
