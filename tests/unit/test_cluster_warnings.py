"""What is said of a Ray cluster that is open to all, starts, or has no room; without one."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from starling.configs import DistributedPPOConfig
from starling.errors import UserError, WorkerDiedError, WorkerError
from starling.training import ray_connection, ray_pool, worker_view
from starling.training.distributed_agent import DistributedAgent, spread
from starling.training.ray_cluster import ActorLostError
from starling.training.ray_worker import Failure, Started
from starling.training.worker_view import Losses, Worker


@pytest.mark.parametrize("mode", [None, "disabled", "token"])
def test_a_cluster_without_tokens_is_warned_of(monkeypatch, caplog, mode):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(ray_connection, "answers", lambda *_: True)
    monkeypatch.setattr(ray_connection, "_init", lambda *_: None)
    ray_connection._connect(None, "10.0.0.5:6379", threading.Event())
    assert ("set RAY_AUTH_MODE to token" in caplog.text) == (mode != "token")


def test_a_cluster_that_lets_nobody_in_is_not_said_to_be_open(monkeypatch, caplog):
    def refuse(*_: Any) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray_connection, "answers", lambda *_: True)
    monkeypatch.setattr(ray_connection, "_init", refuse)
    with pytest.raises(UserError, match=r"Failed to connect; .* here, with RAY_AUTH_MODE=token$"):
        ray_connection._connect(None, "10.0.0.5:6379", threading.Event())
    assert not caplog.text


class TakesSigtermOver:
    """What Ray does of that where it starts a cluster: whatever it may."""

    def init(self, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_sigterm_while_ray_starts_comes_to_whoever_handles_it():
    over, came = threading.Event(), []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray_connection._connect(TakesSigtermOver(), None, over)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
        over.set()
    assert came == [signal.SIGTERM]


class FullCluster:
    """One where only some workers find room: of what Ray does, all that comes before.

    Args:
        room: Requests that are answered.
        failure: What the last of them is answered with, or raises.
    """

    ray: Any = None

    def __init__(self, room: int, failure: Failure | Exception | None = None):
        self.nodes = [4.0]
        self.room, self.failure, self.asked = room, failure, 0

    def check(self) -> None:
        pass

    def call(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def cores(self) -> list[float]:
        return self.nodes

    def new_worker(self, index: int) -> Any:
        return self

    def put(self, value: Any) -> Any:
        return value

    def kill(self, handle: Any) -> None:
        self.room += 1  # and whoever takes its place is answered, too

    @property
    def start(self) -> Any:
        return self

    collect = start

    def remote(self, *told: Any) -> Any:
        return self

    def future(self) -> Future:
        self.asked += 1
        answer = Future()
        if self.asked <= self.room:
            last = self.failure if self.asked == self.room else None
            if isinstance(last, Exception):
                answer.set_exception(last)
            else:
                answer.set_result(last or Started("a node", "a"))
        return answer


def pool_of(cluster: FullCluster, blocking: bool, num_workers: int = 2) -> ray_pool.RayPool:
    return ray_pool.RayPool(
        cluster, cluster.new_worker, lambda: None, num_workers=num_workers, cpus_per_worker=1.0,
        num_parts=2, blocking=blocking, max_policy_lag=0, restarts=100,
    )  # fmt: skip


@pytest.mark.parametrize("room", [0, 1])
def test_workers_that_wait_for_room_are_told_of_again_and_again(monkeypatch, caplog, room):
    """A blocking run waits for all: what comes out of it depends on their number."""
    monkeypatch.setattr(ray_pool, "_TELL_AFTER", 0.0)
    pool = pool_of(FullCluster(room), blocking=True)
    assert pool.collect(None, lambda: len(caplog.records) >= 3) is None
    assert caplog.records[-1].getMessage() == (
        f"{room} of 2 workers have started; the others wait for room in the cluster, which has 4 "
        "cores in all"
    )


@pytest.mark.parametrize("blocking", [False, True])
def test_a_run_that_has_lost_all_workers_says_what_it_waits_for(monkeypatch, caplog, blocking):
    """Whose nodes are gone, say."""
    monkeypatch.setattr(ray_pool, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(ray_pool, "_FIRST_PAUSE", 0.0)
    cluster = FullCluster(room=2)
    pool = pool_of(cluster, blocking)
    policy = SimpleNamespace(version=0)
    assert pool.collect(policy, lambda: len(pool._ready()) == 2) is None
    assert not caplog.records
    for worker in pool.workers:
        worker.gave = True
        pool._lose(worker, ActorLostError("its node has died", of_node=True))
    cluster.room = 0
    caplog.clear()
    monkeypatch.setattr(ray_pool, "_TELL_AFTER", 0.0)
    assert pool.collect(policy, lambda: len(caplog.records) >= 2) is None
    assert {record.getMessage() for record in caplog.records} == {
        "none of the workers is left, and the run waits for room for others in the cluster, which "
        "has 4 cores in all"
    }


def test_a_run_that_does_not_wait_goes_on_with_those_that_there_are(monkeypatch, caplog):
    monkeypatch.setattr(ray_pool, "_TELL_AFTER", 0.0)
    pool = pool_of(FullCluster(room=1), blocking=False)
    while not pool._wait_for_all(lambda: False):
        pass
    assert "1 of 2 workers have started, and the run goes on with them" in caplog.text


def test_no_more_workers_are_made_than_there_is_room_for(monkeypatch):
    """Of four, the first two are lost with their node, and there is room for two."""
    cluster = FullCluster(room=4)
    pool = pool_of(cluster, blocking=True)
    pool.num_workers = 4
    pool._tend()
    for worker in pool.workers[:2]:
        worker.handle = None
    pool.num_workers = 2
    monkeypatch.setattr(pool, "_looked_at", float("-inf"))
    pool._tend()
    assert [worker.handle is not None for worker in pool.workers] == [False, False, True, True]


@pytest.mark.parametrize(
    ("nodes", "cpus", "workers"),
    [([4, 4], 1, 7), ([3, 3, 3], 2, 3), ([1], 1, 1), ([3, 1], 2, 1), ([7], 0.14, 42)],
)
def test_all_is_as_many_workers_as_fit_on_the_nodes(nodes, cpus, workers):
    """No worker is on two, and one core is the learner's: others would be waited for in vain."""
    cluster = FullCluster(room=99)
    cluster.nodes = nodes
    pool = pool_of(cluster, blocking=True)
    pool.num_workers, pool.cpus_per_worker = None, cpus
    pool._tend()
    assert len(pool.workers) == workers


def test_a_worker_that_hangs_is_told_of_once(monkeypatch, caplog):
    monkeypatch.setattr(worker_view, "_TELL_AFTER", 0.0)
    monkeypatch.setattr(ray_pool, "_LOOK_EVERY", 0.0)
    pool = pool_of(FullCluster(room=1), blocking=False, num_workers=1)
    looks = iter([False] * 5)
    assert pool.collect(SimpleNamespace(version=0), lambda: next(looks, True)) is None
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == (
        "worker 0 (a node) has been at one rollout for 0 s: if an environment hangs, step_timeout "
        "ends it in worker processes only (backend process)"
    )


def test_a_worker_that_waits_for_the_learner_does_not_hang(monkeypatch, caplog):
    """Its rollout came while the learner was at an update, say."""
    monkeypatch.setattr(worker_view, "_TELL_AFTER", 0.0)
    pool = pool_of(FullCluster(room=3), blocking=False, num_workers=1)
    assert pool.collect(SimpleNamespace(version=0), lambda: True) is None
    pool._ask_for_rollouts(1)
    assert all(asked.first.done() for request, asked in pool._requests.items())
    worker_view.tell_of_silence(pool.workers, pool._requests)
    assert not caplog.records


def test_what_a_worker_warns_of_is_told_here(caplog):
    warned = [(logging.WARNING, "starling.envs.recovery", "environment 3 begins anew")]
    failure = Failure("pid 7 on node b", "ValueError: worn out", "Traceback", False, warned)
    pool = pool_of(FullCluster(room=2, failure=failure), blocking=True, num_workers=1)
    with pytest.raises(WorkerError, match=r"worker 0 \(pid 7 on node b\) failed: .* worn out"):
        pool.collect(SimpleNamespace(version=0), lambda: False)
    (record,) = caplog.records
    assert record.name == "starling.envs.recovery"
    assert record.getMessage() == "in worker 0 (a node): environment 3 begins anew"


def test_a_worker_that_is_lost_at_each_start_ends_the_run(monkeypatch):
    monkeypatch.setattr(ray_pool, "_FIRST_PAUSE", 0.0)
    cluster = FullCluster(room=1, failure=ActorLostError("no memory left on its node"))
    pool = pool_of(cluster, blocking=True, num_workers=1)
    message = "worker 0 was lost 6 times in a row before it gave a rollout, .* no memory left"
    with pytest.raises(WorkerDiedError, match=message):
        pool.collect(None, lambda: False)
    assert pool.faults == {"worker_starts_failed": 6}
    assert cluster.asked == 6


def test_a_worker_that_cannot_start_for_days_is_tried_again_every_30_seconds():
    pool = pool_of(FullCluster(room=4), blocking=False)
    pool._tend()
    failing, other = pool.workers
    failing.losses, other.gave = 2000, True
    before = time.monotonic()
    pool._lose(failing, ActorLostError("no memory left on its node"))
    assert 0 <= failing.retry_at - before - 30.0 < 5.0


def agent_on(*nodes: float, **settings: Any) -> Any:
    """What of an agent settles on its workers, in a cluster whose nodes have so many cores."""
    config = DistributedPPOConfig(env="CartPole-v1", **settings)
    cluster = SimpleNamespace(on_nodes=lambda resource: list(nodes))
    return SimpleNamespace(config=config, _cluster=cluster)


def test_no_worker_is_on_two_nodes():
    """Of 20 cores, 16 would do for five workers of three, but each node has room for one."""
    agent = agent_on(5.0, 5.0, 5.0, 5.0, cpus_per_worker=3)
    DistributedAgent._fit_to_cluster(agent)
    assert agent.config.num_workers == 4
    agent = agent_on(5.0, 5.0, 5.0, 5.0, cpus_per_worker=3, num_workers=5)
    told = "5 x cpus_per_worker 3 = 15 cores, and the cluster has 20, on nodes with room for 4 such"
    with pytest.raises(UserError, match=f"{told} workers: use num_workers 4"):
        DistributedAgent._fit_to_cluster(agent)


def test_shares_of_a_core_fill_it():
    DistributedAgent._fit_to_cluster(agent_on(7.0, cpus_per_worker=0.14, num_workers=50))


@pytest.mark.parametrize(("share", "of", "cores"), [(1 / 3, 3, 1), (2 / 3, 3, 2), (0.25, 4, 1)])
def test_ray_gets_shares_of_a_core_in_digits_that_it_takes(share, of, cores):
    """It takes four; and as many workers have to fit as were counted."""
    given: dict[str, Any] = {}
    ray = SimpleNamespace(remote=lambda _: SimpleNamespace(options=lambda **o: given.update(o)))
    spread(ray, object, share)
    assert given["num_cpus"] == round(given["num_cpus"], 4)
    assert 0.999 * cores < of * given["num_cpus"] <= cores


def started(*nodes: str) -> list[Worker]:
    """A worker on each of these nodes that has given something."""
    workers = [Worker(index) for index in range(len(nodes))]
    for worker, node in zip(workers, nodes, strict=True):
        worker.ready, worker.gave, worker.node = True, True, node
    return workers


def test_a_worker_that_cannot_start_ends_no_run_that_others_go_on_with():
    workers, losses = started("a", "b"), Losses(restarts=3)
    workers[0].gave = False
    for _ in range(50):
        losses.take(workers[0], workers, ActorLostError("no memory left"))
    assert losses.counts == {"worker_starts_failed": 50}
    workers[1].gave = False
    with pytest.raises(WorkerDiedError, match="lost 51 times in a row"):
        losses.take(workers[0], workers, ActorLostError("no memory left"))


def test_a_node_that_is_lost_counts_once():
    workers, losses = started("a", "a", "a", "b", "a"), Losses(restarts=3)
    with_node = ActorLostError("its node has died", of_node=True)
    for worker in workers[:4]:
        losses.take(worker, workers, with_node)
    assert losses.counts == {"workers_lost": 2}
    losses.take(workers[4], workers, ActorLostError("killed"))
    with pytest.raises(WorkerDiedError, match=r"4 workers .* worker_restarts is 3; .* worker 4 "):
        losses.take(workers[4], workers, ActorLostError("killed"))
