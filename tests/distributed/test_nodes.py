"""Nodes that leave and join a cluster, and clusters that end, while a run goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from commands import starling, wait_for
from elastic_cases import Taken, cluster_of
from replay_records import contents

from starling.training.distributed_dqn import DistributedDQN
from starling.training.distributed_ppo import DistributedPPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SETTINGS = {
    "num_envs": 2,
    "num_steps": 32,
    "mini_batch_size": 32,
    "epochs": 1,
    "hidden_sizes": (8,),
    "preset": "none",
    "backend": "serial",
    "timesteps": 10**9,
    "log_interval": 1,
    "save_interval": 0,
}


class Located(gym.Env):
    """Shows which of the cluster's nodes it is on."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        import ray

        super().reset(seed=seed)
        self.shown = np.array([mark_of(ray.get_runtime_context().get_node_id())], np.float32)
        return self.shown, {}

    def step(self, action: Any) -> Any:
        return self.shown, 1.0, self.np_random.random() < 0.05, False, {}


def mark_of(node_id: str) -> float:
    """A number in [0, 1) that float32 has, of a node."""
    return int(node_id[:6], 16) / 2**24


@pytest.mark.parametrize("sync_mode", ["blocking", "non_blocking"])
def test_workers_follow_the_nodes(head, tmp_path, sync_mode):
    """Two cores more, then gone with their node, then there again on another."""
    node: Any = head.add_node(num_cpus=2)
    agent = DistributedPPO(
        Located, num_workers="all", address=head.address, sync_mode=sync_mode,
        log_dir=str(tmp_path), **SETTINGS,
    )  # fmt: skip
    taken = Taken()
    stages: list[str] = []
    joined_at, last = 0.0, 10**9

    def look(iteration: Any) -> bool:
        nonlocal node, joined_at, last
        pool = iteration.agent._pool
        learnt_from = {report.rollout.observations.item(0) for report in pool.reports}
        there = sum(worker.ready for worker in pool.workers)
        if not stages and there == 2 and mark_of(node.node_id) in learnt_from:
            stages.append("two")
            head.remove_node(node)
        elif stages == ["two"] and there == 1 and pool.losses.counts:
            stages.append("one")
            node, joined_at = head.add_node(num_cpus=2), time.monotonic()
        elif stages == ["two", "one"] and mark_of(node.node_id) in learnt_from:
            assert there == 2
            assert time.monotonic() - joined_at < 30.0
            stages.append("two again")
            last = iteration.iteration + 20
        return iteration.iteration < last

    try:
        assert agent.train(callbacks=[taken, look], quiet=True).status == "callback"
    finally:
        agent.close()
    assert set(taken.numbers()) == {0, 1}
    assert (taken.missing(), taken.repeated()) == (0, 0)


class Noise(gym.Env):
    """Shows pixels, so that a rollout is too large to be told the learner with its answer."""

    observation_space = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._shown(), {}

    def step(self, action: Any) -> Any:
        return self._shown(), 1.0, self.np_random.random() < 0.05, False, {}

    def _shown(self) -> np.ndarray:
        return self.np_random.integers(0, 256, (40, 40, 3), np.uint8)


@pytest.mark.parametrize("abruptly", [False, True])
def test_a_node_is_lost_with_its_worker_its_shard_and_rollouts(head, tmp_path, abruptly):
    """Abruptly, Ray says for ten seconds that they are out of reach, and then that they died."""
    node: Any = head.add_node(num_cpus=2)
    settings = {**SETTINGS, "num_steps": 16, "mini_batch_size": 8, "timesteps": 10**7}
    settings.pop("epochs")
    agent = DistributedDQN(
        Noise, num_workers=2, replay_shards=2, address=head.address, log_dir=str(tmp_path),
        buffer_size=4000, learning_starts=500, updates_per_transition=0.05, **settings,
    )  # fmt: skip
    last = 10**9

    def lose_it(iteration: Any) -> bool:
        nonlocal last
        replay, pool = agent.replay, agent._pool
        if iteration.iteration == 40:
            head.remove_node(node, allow_graceful=not abruptly)
        if last == 10**9 and replay.faults and pool.losses.counts:
            last = iteration.iteration + 40
        return iteration.iteration < last

    try:
        assert agent.train(callbacks=lose_it, quiet=True).status == "callback"
        replay = agent.replay
        assert replay.sampled == 8 * int(agent.state.updates) > 0
        assert len(contents(replay.state())) == len(replay) > 500
        assert replay.duplicates == 0
    finally:
        agent.close()


@pytest.mark.parametrize("workers", ["1", "all"])
def test_the_end_of_the_cluster_is_told_and_the_run_goes_on_in_another(tmp_path, workers):
    run = tmp_path / "run"
    words = [
        *("train", "--distributed", "--env", "CartPole-v1", "--log_dir", str(tmp_path)),
        *("--run_name", "run", "--num_envs", "2", "--num_steps", "32", "--mini_batch_size", "32"),
        *("--num_workers", workers, "--backend", "serial", "--preset", "none"),
        *("--log_interval", "1", "--timesteps", "1_000_000_000", "--save_interval", "0"),
    ]
    with cluster_of(1) as first, starling(*words, "--address", first.address) as process:
        wait_for(process, run / "metrics.jsonl")
        _kill(first, "gcs_server")
        output, errors = process.communicate(timeout=45)  # after 60 s Ray would end it
    assert process.returncode == 1, errors
    assert "head node does not answer any more" in errors
    assert "Traceback" not in errors
    step = _last_step(run)
    assert step > 0

    words = ["train", "--resume", str(run), "--json", "--timesteps", str(step + 1000)]
    with cluster_of(1) as second, starling(*words, "--address", second.address) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["steps"] >= step + 1000


SLOW = """
import time
from pathlib import Path
from starling import DistributedPPO

class Slow(DistributedPPO):
    def update(self, rollout, progress=0.0):
        metrics = super().update(rollout, progress)
        if self.version == 3:
            Path("updating").write_text("now")
            while not Path("go_on").exists():
                time.sleep(0.01)
        return metrics
"""


@pytest.mark.parametrize(
    ("killed", "seconds", "told"),
    [
        # Ray's own processes are gone by then, and would end ours after a minute.
        ("gcs_server", 70, "head node does not answer any more"),
        ("raylet", 0, "process here (raylet) does not answer any more"),
    ],
)
def test_what_ends_during_an_update_is_told_and_the_run_saved(
    head, tmp_path, killed, seconds, told
):
    (tmp_path / "slow.py").write_text(SLOW)
    words = [
        *("train", "--algo", "slow:Slow", "--env", "CartPole-v1", "--run_name", "run"),
        *("--num_envs", "2", "--num_steps", "32", "--mini_batch_size", "32", "--num_workers", "1"),
        *("--backend", "serial", "--preset", "none", "--save_interval", "0"),
        *("--address", head.address),
    ]
    with starling(*words, folder=tmp_path) as process:
        wait_for(process, tmp_path / "updating")
        _kill(head, killed)
        time.sleep(seconds)
        (tmp_path / "go_on").write_text("now")
        _, errors = process.communicate(timeout=50)
    assert process.returncode == 1, errors
    assert told in errors
    assert "Traceback" not in errors
    assert _last_step(tmp_path / "logs" / "run") == 3 * 64


def _kill(cluster: Any, name: str) -> None:
    for process in cluster.head_node.all_processes[name]:
        os.kill(process.process.pid, signal.SIGKILL)


def _last_step(run: Path) -> int:
    checkpoints = sorted((run / "checkpoints").glob("step_*"))
    return int(checkpoints[-1].name.removeprefix("step_"))
