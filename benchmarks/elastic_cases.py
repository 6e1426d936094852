"""DistributedPPO while workers are killed, nodes come and go, and environments crash and stall.

elastic.py tells how these runs fare, and tests/distributed/ holds them to it.
"""

from __future__ import annotations

import collections
import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np

from starling.training.distributed_ppo import DistributedPPO

NODE = {"include_dashboard": False, "object_store_memory": 200 * 2**20}
SOLVED = 475.0  # CartPole-v1's mean return, as Gymnasium has it


@contextlib.contextmanager
def cluster_of(num_cpus: int) -> Iterator[Any]:
    """A Ray cluster of one node on this machine, with so many cores as Ray counts them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, **NODE})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def learner(cluster: Any, env: Any = "CartPole-v1", **settings: Any) -> Iterator[DistributedPPO]:
    """A trainer with three workers in a cluster, which leaves no files."""
    settings = {"num_workers": 3, "backend": "serial", "save_interval": 0, **settings}
    with (
        tempfile.TemporaryDirectory() as logs,
        DistributedPPO(env, address=cluster.address, log_dir=logs, **settings) as agent,
    ):
        yield agent


class Taken:
    """A callback that notes the origins of all rollouts learnt from, or too old for that."""

    def __init__(self):
        self.origins: list[Any] = []

    def __call__(self, iteration: Any) -> Any:
        """Notes those of an iteration."""
        self.origins += [rollout.origin for rollout in iteration.agent._pool.taken]

    def numbers(self) -> dict[int, list[int]]:
        """The rollouts' numbers, by worker."""
        found = collections.defaultdict(list)
        for origin in self.origins:
            found[origin.worker].append(origin.sequence)
        return found

    def missing(self) -> int:
        """How many were left out."""
        return sum(max(own) + 1 - len(set(own)) for own in self.numbers().values())

    def repeated(self) -> int:
        """How many were taken more than once, or after a later one of their worker."""
        return sum((np.diff(own) <= 0).sum().item() for own in self.numbers().values())


class Killed(NamedTuple):
    """What came of a run whose workers were killed."""

    score: float
    """Mean return of 100 greedy episodes."""
    solved_at: float
    """Steps until the last 100 training episodes had `SOLVED` on average; infinite if never."""
    kills: int


def kill_workers(cluster: Any, seed: int, every: float, share: float = 1.0) -> Killed:
    """Trains on CartPole-v1 while one worker of three is killed every so many seconds.

    Args:
        cluster: With room for three workers.
        seed: Of the run.
        every: Seconds; the first is killed after the first update. Infinity: none is.
        share: Of the preset's steps.
    """
    kills, due, solved_at = 0, 0.0 if every < math.inf else math.inf, math.inf

    def look(iteration: Any) -> None:
        nonlocal kills, due, solved_at
        if (iteration.metrics["rollout/ep_rew_mean"] or 0.0) >= SOLVED:
            solved_at = min(solved_at, iteration.step)
        pool = iteration.agent._pool
        ready = [worker for worker in pool.workers if worker.ready]
        if time.monotonic() >= due and ready:
            pool.cluster.kill(ready[kills % len(ready)].handle)
            kills, due = kills + 1, time.monotonic() + every

    with learner(cluster, seed=seed) as agent:
        agent.train(int(share * agent.config.timesteps), callbacks=look, quiet=True)
        return Killed(agent.evaluate(100, seed=seed + 1).mean_return, solved_at, kills)


class Changed(NamedTuple):
    """What came of a run that a node was taken from, and another given to."""

    score: float
    """Mean return of 100 greedy episodes."""
    seconds: float
    """From the start of the new node until a rollout of it was learnt from; infinite if none."""
    updates_between: int
    """That were made without the first node and before anything came from the second."""
    joined: int
    """Workers of the new node whose rollouts were learnt from."""
    lost: int
    """Losses that were counted."""
    missing: int
    repeated: int


def change_nodes(cluster: Any, seed: int, share: float = 1.3) -> Changed:
    """Trains on CartPole-v1; two workers of three go with their node, and come back on another.

    The node leaves after a fifth of the preset's steps, and the other is started after two fifths.

    Args:
        cluster: With room for one worker.
        seed: Of the run.
        share: Of the preset's steps.
    """
    node, taken, updates_between = cluster.add_node(num_cpus=2, **NODE), Taken(), 0
    left, started_at, seconds = False, math.inf, math.inf
    anew: set[int] = set()

    def look(iteration: Any) -> None:
        nonlocal left, started_at, seconds, updates_between
        pool, done = iteration.agent._pool, iteration.step / iteration.agent.config.timesteps
        alone = left and sum(worker.ready for worker in pool.workers) == 1
        updates_between += alone and not anew
        # There was no room for them but on the new node.
        anew.update(x.origin.worker for x in pool.taken if x.origin.restarts)
        if not left and done > 0.2:
            cluster.remove_node(node)
            left = True
        elif started_at == math.inf and alone and done > 0.4:
            started_at = time.monotonic()
            cluster.add_node(num_cpus=2, **NODE)
        elif anew and seconds == math.inf:
            seconds = time.monotonic() - started_at

    with learner(cluster, seed=seed) as agent:
        agent.train(int(share * agent.config.timesteps), callbacks=[taken, look], quiet=True)
        assert agent._pool is not None
        lost = agent._pool.faults["workers_lost"]
        score = agent.evaluate(100, seed=seed + 1).mean_return
    flaws = taken.missing(), taken.repeated()
    return Changed(score, seconds, updates_between, len(anew), lost, *flaws)


class CrashingAndStalling(gymnasium.Wrapper):
    """Crashes with a probability of 1e-4 a step and 1e-3 a reset; stalls with 5e-4 for seconds."""

    def __init__(self):
        super().__init__(gymnasium.make("CartPole-v1"))
        self.chance = np.random.default_rng()

    def reset(self, **kwargs: Any) -> Any:
        """Begins an episode, or crashes."""
        if self.chance.random() < 1e-3:
            raise RuntimeError("crashed at reset")
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        """Steps, perhaps late, or crashes."""
        if self.chance.random() < 1e-4:
            raise RuntimeError("crashed")
        if self.chance.random() < 5e-4:
            time.sleep(self.chance.uniform(2.0, 5.0))
        return super().step(action)


class Survived(NamedTuple):
    """What came of a run whose environments crashed and stalled."""

    score: float
    """Mean return of 20 greedy episodes of CartPole-v1 as it should be."""
    crashes: int
    lost_steps: int
    seconds: float


def crash_and_stall(cluster: Any, seed: int, timesteps: int = 250_000) -> Survived:
    """Trains on CartPole-v1 that crashes and stalls, with six workers that mostly wait.

    Args:
        cluster: With three cores.
        seed: Of the run, but not of when environments fail.
        timesteps: In all.
    """
    settings = {"num_workers": 6, "cpus_per_worker": 0.5, "sync_mode": "non_blocking"}
    settings |= {"num_envs": 8, "num_steps": 64, "buffer_size": 3 * 8 * 64, "backend": "thread"}
    settings |= {"on_env_error": "restart", "max_restarts": 10_000, "preset": "CartPole-v1"}
    settings |= {"seed": seed, "timesteps": timesteps}
    start = time.monotonic()
    with learner(cluster, CrashingAndStalling, **settings) as agent:
        agent.train(quiet=True)
        seconds = time.monotonic() - start
        assert agent._pool is not None
        faults = agent._pool.faults
        score = greedy_return(agent, seed)
    return Survived(score, faults["env_errors"], faults["lost_steps"], seconds)


def greedy_return(agent: DistributedPPO, seed: int) -> float:
    """Mean return of 20 episodes of CartPole-v1."""
    envs = gymnasium.make_vec("CartPole-v1", 20)
    observations, _ = envs.reset(seed=seed)
    total, running = np.zeros(20), np.ones(20, np.bool_)
    while running.any():
        observations, rewards, ended, cut, _ = envs.step(agent.predict(observations))
        total, running = total + rewards * running, running & ~(ended | cut)
    return total.mean().item()


def numbers_learnt(cluster: Any, seed: int, timesteps: int = 30_000) -> np.ndarray:
    """All parameters, and the optimiser's and the normalisers' numbers, after a blocking run."""
    settings = {"normalize_observations": True, "normalize_rewards": True, "timesteps": timesteps}
    with learner(cluster, seed=seed, sync_mode="blocking", **settings) as agent:
        agent.train(quiet=True)
        return numbers_of(agent)


def numbers_of(agent: DistributedPPO) -> np.ndarray:
    """What a trainer has learnt, in one row: all of its state but the keys of its noise."""
    leaves = jax.tree.leaves(agent.state[:5])
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])
