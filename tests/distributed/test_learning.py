"""What is learnt although workers are killed, and environments crash and stall."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from starling.training.distributed_dqn import DistributedDQN
from starling.training.distributed_ppo import DistributedPPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("sync_mode", ["blocking", "non_blocking"])
@pytest.mark.parametrize(("env", "floor"), [("CartPole-v1", 475), ("Pendulum-v1", -200)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_presets_reach_their_scores(cluster, tmp_path, env, floor, sync_mode, seed):
    with DistributedPPO(
        env, num_workers=2, sync_mode=sync_mode, seed=seed, address=cluster.address,
        log_dir=str(tmp_path),
    ) as agent:  # fmt: skip
        agent.train(quiet=True)
        assert agent.evaluate(100, seed=seed + 1).mean_return >= floor


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dqn_reaches_its_score_from_a_replay_in_shards(cluster, tmp_path, seed):
    with DistributedDQN(
        "CartPole-v1", num_workers=2, replay_shards=2, seed=seed, address=cluster.address,
        log_dir=str(tmp_path),
    ) as agent:  # fmt: skip
        agent.train(quiet=True)
        assert agent.evaluate(100, seed=seed + 1).mean_return >= 475


def test_cartpole_is_solved_although_workers_are_killed(cluster, tmp_path):
    """One of three every few seconds, with at most 1.3 times the preset's steps."""
    kills = 0

    def kill(iteration: Any) -> None:
        nonlocal kills, due
        if time.monotonic() > due:
            pool = iteration.agent._pool
            ready = [worker for worker in pool.workers if worker.ready]
            pool.cluster.kill(ready[kills % len(ready)].handle)
            kills, due = kills + 1, time.monotonic() + 4.0

    with DistributedPPO(
        "CartPole-v1", num_workers=3, backend="serial", seed=1, address=cluster.address,
        log_dir=str(tmp_path),
    ) as agent:  # fmt: skip
        due = time.monotonic() + 2.0
        agent.train(int(1.3 * agent.config.timesteps), callbacks=kill, quiet=True)
        assert agent.evaluate(100, seed=2).mean_return >= 475
    assert kills >= 2


def test_cartpole_is_solved_although_a_node_leaves_and_another_joins(head, tmp_path):
    """Two of three workers go with their node, and come back on another."""
    node: Any = head.add_node(num_cpus=2)
    changes: list[str] = []
    learnt_from: set[tuple[int, int]] = set()

    def change(iteration: Any) -> None:
        pool, done = iteration.agent._pool, iteration.step / iteration.agent.config.timesteps
        learnt_from.update(
            (part.rollout.origin[1], part.rollout.origin[3]) for part in pool.reports
        )
        if not changes and done > 0.2:
            head.remove_node(node)
            changes.append("left")
        elif changes == ["left"] and done > 0.4:
            head.add_node(num_cpus=2)
            changes.append("joined")

    with DistributedPPO(
        "CartPole-v1", num_workers=3, backend="serial", seed=1, address=head.address,
        log_dir=str(tmp_path),
    ) as agent:  # fmt: skip
        agent.train(int(1.3 * agent.config.timesteps), callbacks=change, quiet=True)
        assert agent._pool.losses.counts["workers_lost"] == 1, "a node counts once"
        assert agent.evaluate(100, seed=2).mean_return >= 475
    assert changes == ["left", "joined"]
    assert sum(restarts > 0 for _, restarts in learnt_from) >= 2, "of the new node's workers"


class CrashingAndStalling(gym.Wrapper):
    """Crashes with a probability of 1e-4 a step and 1e-3 a reset; stalls with 5e-4 for seconds."""

    def __init__(self):
        super().__init__(gym.make("CartPole-v1"))
        self.chance = np.random.default_rng()

    def reset(self, **kwargs: Any) -> Any:
        if self.chance.random() < 1e-3:
            raise RuntimeError("crashed at reset")
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        if self.chance.random() < 1e-4:
            raise RuntimeError("crashed")
        if self.chance.random() < 5e-4:
            time.sleep(self.chance.uniform(2.0, 5.0))
        return super().step(action)


@pytest.mark.timeout(2400)
def test_crashing_and_stalling_cartpole_is_learnt(cluster, tmp_path):
    with DistributedPPO(
        CrashingAndStalling, num_workers=3, num_envs=8, backend="thread", sync_mode="non_blocking",
        preset="CartPole-v1", on_env_error="restart", max_restarts=10_000, timesteps=250_000,
        address=cluster.address, log_dir=str(tmp_path), seed=1,
    ) as agent:  # fmt: skip
        agent.train(quiet=True)
        faults = dict(agent._pool.faults)
        observations, _ = (envs := gym.make_vec("CartPole-v1", 20)).reset(seed=1)
        total, running = np.zeros(20), np.ones(20, bool)
        for _ in range(500):
            observations, rewards, ended, cut, _ = envs.step(agent.predict(observations))
            total, running = total + rewards * running, running & ~(ended | cut)
    assert faults["env_errors"] > 5
    assert total.mean() >= 400
