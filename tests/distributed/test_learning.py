"""What is learnt although workers are killed, and environments crash and stall."""

from __future__ import annotations

import pytest
from elastic_cases import SOLVED, change_nodes, crash_and_stall, kill_workers

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


def test_cartpole_is_solved_although_workers_are_killed(cluster):
    """One of three every few seconds, with at most 1.3 times the preset's steps."""
    run = kill_workers(cluster, seed=1, every=4.0, share=1.3)
    assert run.score >= SOLVED
    assert run.kills >= 2


def test_cartpole_is_solved_although_a_node_leaves_and_another_joins(head):
    run = change_nodes(head, seed=1)
    assert run.score >= SOLVED
    assert run.updates_between > 0
    assert run.joined == 2
    assert run.lost == 1, "a node counts once"
    assert (run.missing, run.repeated) == (0, 0)


@pytest.mark.timeout(2400)
def test_crashing_and_stalling_cartpole_is_learnt(cluster):
    run = crash_and_stall(cluster, seed=1)
    assert run.crashes > 5
    assert run.score >= 400
