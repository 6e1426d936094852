"""A replay that workers on a Ray cluster fill, with the learner or in shards on the cluster."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from tests.counters import count_what_is_learnt_from
from tests.replay_records import contents, rollout, torn

from starling.errors import CheckpointError, UserError
from starling.storage.replay import Replay
from starling.storage.replay_shard import ReplayShard
from starling.training.distributed_agent import spread
from starling.training.distributed_dqn import DistributedDQN
from starling.training.ray_cluster import Cluster
from starling.training.sharded_replay import ShardedReplay

WORKERS, N, T = 2, 2, 8
ROWS = N * T
SETTINGS = {
    "num_workers": WORKERS,
    "num_envs": N,
    "num_steps": T,
    "mini_batch_size": 8,
    "hidden_sizes": (8,),
    "learning_starts": 4 * ROWS,
    "buffer_size": 40 * ROWS,
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 30 * ROWS,
    "save_interval": 0,
}
pytestmark = pytest.mark.timeout(240)


def test_workers_fill_the_replay_and_their_loss_costs_what_they_had_under_way(cluster, tmp_path):
    agent = DistributedDQN(
        "CartPole-v1", address=cluster.address, log_dir=str(tmp_path), **SETTINGS
    )
    writers: set[int] = set()
    learnt_from = count_what_is_learnt_from(agent)

    def kill_once(iteration) -> bool:
        pool = agent._pool
        origin = pool.taken[0].origin
        writers.add(origin.worker)
        assert (pool.taken[0].priorities > 0).all()
        if iteration.iteration == 8:
            pool.cluster.kill(pool.workers[1].handle)
        return not (origin.worker == 1 and origin.restarts)

    try:
        result = agent.train(10**6, callbacks=kill_once, quiet=True)
        assert result.status == "callback"
        replay, updates = agent.replay, int(agent.state.updates)
    finally:
        agent.close()
    assert writers == {0, 1}
    assert replay.duplicates == 0
    assert replay.sampled == 8 * updates
    assert updates == sum(learnt_from) // 4 > 0
    assert agent.epsilon.shape == (WORKERS * N,)
    np.testing.assert_array_less(agent.last_epsilon[1:], agent.last_epsilon[:-1])


def test_a_replay_cannot_follow_the_cluster():
    with pytest.raises(UserError, match="num_workers all does not go with distributed_dqn"):
        DistributedDQN("CartPole-v1", **{**SETTINGS, "num_workers": "all"})


def test_more_shards_than_workers_are_refused():
    with pytest.raises(UserError, match=r"replay_shards 3 is more than num_workers 2, .* use 2 at"):
        DistributedDQN("CartPole-v1", **{**SETTINGS, "replay_shards": 3})


def test_shards_take_what_is_in_the_object_store_and_nothing_is_lost_or_torn(cluster):
    connection = Cluster(cluster.address)
    ray, writers, rows = connection.ray, 3, 1000
    actor = spread(ray, ReplayShard, 0)

    def settings(n: int) -> dict[str, Any]:
        return {"capacity": rows * N * n, "num_envs": N * n, "prioritized": True}

    def new_shard(of: range) -> Any:
        return actor.remote(of.start, len(of), settings(len(of)))

    replay = ShardedReplay(connection, new_shard, Replay(**settings(writers)), 2, writers, 1)
    try:
        for sequence in range(10):
            for writer in range(writers):
                made = rollout(writer, sequence, T, N)
                content = ray.put(made)
                assert replay.add(made._replace(observations=None), content=content) == ROWS
                assert replay.add(made._replace(observations=None), content=content) == 0
        assert (len(replay), replay.duplicates) == (30 * ROWS, 30)
        found = contents(replay.state())
        assert len(found) == len(np.unique(found, axis=0)) == len(replay)
        changed: set[int] = set()
        for count in (3, 1, 4):
            batch = replay.sample(20, count)
            assert batch is not None
            assert torn(batch) == 0
            replay.set_priorities(batch.indices, np.full(batch.indices.shape, 0.5))
            changed.update(batch.indices.ravel().tolist())
        assert (replay.state()["weights"] < 1).sum() == len(changed) > 0
        state = replay.state()
        ray.kill(replay._shards[1].handle)
        while not replay.faults:  # what was drawn before its death is still good
            batch = replay.sample(20, 60)  # more than there is without it
            assert batch is not None
        assert replay.faults == {"replay_shards_lost": 1}
        replay.set_priorities(batch.indices, np.full(batch.indices.shape, 0.5))
        assert len(contents(replay.state())) == len(replay) == 10 * ROWS
    finally:
        replay.close()
        connection.close()
    one = Replay(**settings(writers))
    one.restore(state)
    assert torn(one.sample(20, 10)) == 0


@pytest.mark.slow
def test_a_run_whose_shard_hangs_can_be_stopped_and_is_saved(cluster, tmp_path):
    agent = DistributedDQN(
        "CartPole-v1", address=cluster.address, log_dir=str(tmp_path), replay_shards=2, **SETTINGS
    )
    asked = threading.Event()
    later = threading.Timer(2.0, asked.set)

    def hang(iteration: Any) -> None:
        if iteration.iteration == 12:
            agent.replay._shards[0].handle.__ray_call__.remote(lambda _: time.sleep(1000))
            later.start()

    try:
        result = agent.train(10**6, callbacks=hang, stop=asked.is_set, quiet=True)
        assert (result.status, result.steps) == ("stopped", 13 * ROWS)
        run, left = agent.run, len(agent.replay)
    finally:
        later.cancel()
        agent.close()
    with DistributedDQN(resume=run, address=cluster.address) as other:
        assert len(other.replay) == left > 0


def test_training_goes_on_although_a_shard_is_lost_and_in_another_number_of_shards(
    cluster, tmp_path
):
    settings = {**SETTINGS, "normalize_observations": True, "log_interval": 1}
    agent = DistributedDQN(
        "CartPole-v1", address=cluster.address, log_dir=str(tmp_path), replay_shards=2, **settings
    )
    learnt_from = count_what_is_learnt_from(agent)
    seen: list[Any] = []
    since: list[int] = []

    def kill_once(iteration: Any) -> bool:
        pool, replay = agent._pool, agent.replay
        assert pool.taken[0].observations is None
        seen.append(float(agent.state.observation_statistics.seen))
        if iteration.iteration == 12:
            pool.cluster.kill(replay._shards[0].handle)
        if replay.faults:
            since.append(iteration.iteration)
        # The first may have noticed it after what it logs, and a worker may have been slow.
        enough = int(agent.state.updates) > 60 and len(replay) > 8 * ROWS
        return not (len(since) > 1 and enough)

    try:
        result = agent.train(10**6, callbacks=kill_once, quiet=True)
        assert result.status == "callback"
        replay, updates = agent.replay, int(agent.state.updates)
        assert (replay.duplicates, replay.faults) == (0, {"replay_shards_lost": 1})
        assert replay.sampled == 8 * updates
        assert updates == sum(learnt_from) // 4
        assert replay.inserted > len(replay) > 8 * ROWS
        size, run, inserted = len(replay), agent.run, replay.inserted
    finally:
        agent.close()
    assert seen == [(i + 1) * ROWS for i in range(len(seen))]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["faults/replay_shards_lost"] == 1
    assert last["replay/size"] == size
    for shards in (0, 1):
        with DistributedDQN(resume=run, replay_shards=shards, address=cluster.address) as other:
            assert (len(other.replay), other.replay.inserted) == (size, inserted)
            batch = other.replay.sample(8, 4)
            assert batch.observations.shape == (4, 8, 4)
    other_workers: dict[str, Any] = {"num_workers": 1, "replay_shards": 0, "resume": run}
    other_workers["address"] = cluster.address
    with pytest.raises(CheckpointError, match=r"num_envs 4 there and 2 here; .*save_replay False"):
        DistributedDQN(**other_workers)
    with DistributedDQN(**other_workers, save_replay=False) as other:
        assert len(other.replay) == 0
        before = other.step
        assert other.train(before + 8 * ROWS, quiet=True).steps == before + 8 * ROWS
        assert 4 * ROWS < len(other.replay) <= 8 * ROWS
