"""What is said of a Ray cluster that is open to all, or has no room; without one."""

from __future__ import annotations

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
    monkeypatch.setattr(ray_cluster, "_join", lambda *_: None)
    ray_cluster._connect(None, "10.0.0.5:6379")
    assert ("set RAY_AUTH_MODE to token" in caplog.text) == (mode != "token")


class FullCluster:
    """One where no worker ever finds room: of what Ray does, all that comes before."""

    ray: Any = None

    def check(self) -> None:
        pass

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
        return Future()


def test_workers_that_wait_for_room_are_told_of_again_and_again(monkeypatch, caplog):
    monkeypatch.setattr(ray_pool, "_TELL_AFTER", 0.0)
    cluster = FullCluster()
    pool = ray_pool.RayPool(
        cluster, cluster.new_worker, lambda: None, num_workers=2, cpus_per_worker=1.0,
        num_parts=2, blocking=True, max_policy_lag=0, restarts=0,
    )  # fmt: skip
    assert pool.collect(None, lambda: len(caplog.records) >= 3) is None
    assert {record.getMessage() for record in caplog.records} == {
        "0 of 2 workers have started; the others wait for room in the cluster, which has 4 cores "
        "in all"
    }
