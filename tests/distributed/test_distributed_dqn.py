"""A replay that workers on a Ray cluster fill."""

from __future__ import annotations

import numpy as np
import pytest
from tests.counters import count_what_is_learnt_from

from starling.errors import UserError
from starling.training.distributed_dqn import DistributedDQN

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
            pool.ray.kill(pool.workers[1].handle)
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
