"""What workers take of memory and descriptors, and what cannot travel to them."""

from __future__ import annotations

import functools
import os
import resource
import sys
import threading
import types
from pathlib import Path

import envs_for_tests as envs
import numpy as np
import pytest
from failing import steps
from leaks import descriptors

from starling.envs.process import ProcessVectorEnv
from starling.errors import UserError, WorkerError
from starling.training import ray_cluster
from starling.training.distributed_ppo import DistributedPPO

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]


def test_nothing_is_left_after_some_starts():
    files = len(descriptors())
    for _ in range(6):
        vector = ProcessVectorEnv([envs.CountingEnv] * 2, num_workers=1)
        vector.reset()
        steps(vector, 1)
        vector.close()
        del vector
        assert len(descriptors()) == files


def test_shared_memory_has_no_name():
    def named(pid):
        return [line for line in Path(f"/proc/{pid}/maps").open() if "/dev/shm" in line]

    others = named("self")  # of libraries that other tests use
    vector = ProcessVectorEnv([envs.CountingEnv] * 2, num_workers=2)
    workers = [worker.process.pid for worker in vector._workers._crew]
    assert [named("self"), *map(named, workers)] == [others, [], []]
    for pid in workers:
        assert "memfd:starling-envs" in Path(f"/proc/{pid}/maps").read_text()
    vector.close()


def test_without_memfd_an_unlinked_file_serves(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    vector = ProcessVectorEnv([envs.CountingEnv] * 2, num_workers=2)
    assert not list(tmp_path.iterdir())
    vector.reset()
    observations, *_ = vector.step([0, 0])
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    vector.close()


def test_workers_are_small_and_import_no_jax():
    def cart_pole():
        import gymnasium as gym

        return gym.make("CartPole-v1")

    vector = ProcessVectorEnv([cart_pole] * 64, num_workers=2)
    vector.reset()
    steps(vector, 5)
    for worker in vector._workers._crew:
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0])
        assert peak < 120_000, f"{peak} kB"
        libraries = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert "jax" not in libraries
        environment = Path(f"/proc/{worker.process.pid}/environ").read_text()
        assert "OMP_NUM_THREADS=1\0" in environment
    vector.close()


def test_too_few_file_descriptors_are_refused_with_the_numbers():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        with pytest.raises(UserError, match=r"100 worker processes need 216 file desc.* 128 all"):
            ProcessVectorEnv([envs.CountingEnv] * 100, num_workers=100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_little_memory_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr("starling.envs.process.available_memory", lambda: 50 << 20)
    with pytest.raises(UserError, match=r"2 worker processes need at least 80 MB.*50 MB are avail"):
        ProcessVectorEnv([envs.CountingEnv] * 2, num_workers=2)
    large = envs.spaces.Box(0, 255, (1024, 1024), np.uint8)
    factory = functools.partial(envs.ObservingEnv, None, large)
    with pytest.raises(UserError, match=r"60 MB of shared memory.*50 MB are available"):
        ProcessVectorEnv([factory] * 30, num_workers=1)


def test_a_factory_that_cannot_travel_is_refused():
    lock = threading.Lock()
    with pytest.raises(UserError, match=r"cannot be sent to a worker process.*backend='serial'"):
        ProcessVectorEnv([lambda: envs.CountingEnv(lock)] * 2)


def test_a_factory_that_cannot_travel_to_a_cluster_is_refused_before_ray_starts(monkeypatch):
    monkeypatch.setattr(ray_cluster.Connection, "join", lambda _: pytest.fail("Ray was started"))
    lock = threading.Lock()
    message = r"cannot be sent to a worker on a cluster \(.*lock.*\); .*, or use algo ppo$"
    with pytest.raises(UserError, match=message):
        DistributedPPO(lambda: envs.CountingEnv(lock), backend="serial", preset="none")


def test_a_factory_that_cannot_be_found_says_why(monkeypatch, tmp_path):
    (tmp_path / "gone_in_the_worker.py").write_text("from envs_for_tests import CountingEnv")
    monkeypatch.syspath_prepend(str(tmp_path))
    import gone_in_the_worker as module

    class Elsewhere(module.CountingEnv):
        pass

    Elsewhere.__module__ = "gone_in_the_worker"
    Elsewhere.__qualname__ = "Elsewhere"
    module.Elsewhere = Elsewhere
    with pytest.raises(WorkerError, match=r"could not start: AttributeError.*Elsewhere"):
        ProcessVectorEnv([Elsewhere] * 2)


def test_infos_that_cannot_travel_are_left_out():
    vector = ProcessVectorEnv([envs.LockedInfoEnv] * 2, infos="all")
    _, infos = vector.reset()
    assert infos.keys() == {"fine", "_fine"}
    *_, infos = vector.step([0, 0])
    assert infos.keys() == {"fine", "_fine"}
    np.testing.assert_array_equal(infos["fine"], [1, 1])
    vector.close()


def test_an_answer_that_cannot_be_read_is_an_error_and_no_later_one_suffers():
    class Elsewhere(envs.CountingEnv):
        """Gives an info of a class that is known in the worker only."""

        def step(self, action):
            module = sys.modules["only_there"] = types.ModuleType("only_there")
            module.Thing = type("Thing", (), {"__module__": "only_there"})
            info = {"thing": module.Thing()} if self.episodes == 1 else {}
            return *super().step(action)[:4], info

    vector = ProcessVectorEnv([envs.CountingEnv, lambda: Elsewhere()], num_workers=2, infos="all")
    vector.reset()
    pid = vector._workers._crew[1].process.pid
    with pytest.raises(
        WorkerError, match=rf"environments 1 to 1 \(worker pid {pid}\).*'only_there'"
    ):
        vector.step([0, 0])
    vector.reset()
    observations, *_ = vector.step([0, 0])
    np.testing.assert_array_equal(observations, [[2, 1], [2, 1]])
    vector.close()
