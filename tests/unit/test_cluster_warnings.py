"""What is said of a Ray cluster that is open to all, starts, or has no room; without one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from starling.training import ray_cluster, ray_pool


@pytest.mark.parametrize("mode", [None, "disabled", "token"])
def test_a_cluster_without_tokens_is_warned_of(monkeypatch, caplog, mode):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(ray_cluster, "_answers", lambda *_: True)
    monkeypatch.setattr(ray_cluster, "_init", lambda *_: None)
    ray_cluster._connect(None, "10.0.0.5:6379", threading.Event())
    assert ("set RAY_AUTH_MODE to token" in caplog.text) == (mode != "token")


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
        ray_cluster._connect(TakesSigtermOver(), None, over)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
        over.set()
    assert came == [signal.SIGTERM]


class FullCluster:
    """One where only some workers find room: of what Ray does, all that comes before."""

    ray: Any = None

    def __init__(self, room: int):
        self.room, self.asked = room, 0

    def check(self) -> None:
        pass

    def call(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def cores(self) -> int:
        return 4

    def new_worker(self, index: int) -> Any:
        return self

    @property
    def start(self) -> Any:
        return self

    def remote(self) -> Any:
        return self

    def future(self) -> Future:
        self.asked += 1
        answer = Future()
        if self.asked <= self.room:
            answer.set_result("a node")
        return answer


def pool_of(cluster: FullCluster, blocking: bool) -> ray_pool.RayPool:
    return ray_pool.RayPool(
        cluster, cluster.new_worker, lambda: None, num_workers=2, cpus_per_worker=1.0,
        num_parts=2, blocking=blocking, max_policy_lag=0, restarts=0,
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
    monkeypatch.setattr(pool, "_counted_at", float("-inf"))
    pool._tend()
    assert [worker.handle is not None for worker in pool.workers] == [False, False, True, True]
