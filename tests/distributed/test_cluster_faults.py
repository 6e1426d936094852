"""Clusters that cannot be joined, that lack a module, or whose object store is too small."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import sys
import time
import types
import zlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from commands import starling
from elastic_cases import cluster_of

from starling import cli
from starling.errors import UserError
from starling.training import ray_cluster, ray_connection
from starling.training.distributed_agent import spread
from starling.training.distributed_ppo import DistributedPPO

SMALL = {
    "num_workers": 1,
    "num_envs": 2,
    "num_steps": 16,
    "mini_batch_size": 16,
    "epochs": 1,
    "hidden_sizes": (8,),
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "save_interval": 0,
}
COMMAND = ["train", "--distributed", "--env", "CartPole-v1", "--backend", "serial", "--address"]
pytestmark = pytest.mark.timeout(240)


@contextlib.contextmanager
def said_to_run(cluster: Any, **versions: str) -> Iterator[None]:
    """Writes other versions into what the head node tells of the cluster."""
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray._raylet import GcsClient

    client = GcsClient(address=cluster.address)
    told = client.internal_kv_get(CLUSTER_METADATA_KEY, namespace=KV_NAMESPACE_CLUSTER)

    def tell(what: bytes) -> None:
        client.internal_kv_put(CLUSTER_METADATA_KEY, what, True, KV_NAMESPACE_CLUSTER)

    tell(json.dumps({**json.loads(told), **versions}).encode())
    try:
        yield
    finally:
        tell(told)


def test_a_cluster_of_other_versions_is_refused_with_both(cluster, tmp_path, capsys):
    import ray

    with said_to_run(cluster, ray_version="2.54.9", python_version="3.12.99"):
        assert cli.main([*COMMAND, cluster.address, "--log_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert (
        f"has Ray 2.54.9 and Python 3.12.99, but Ray {ray.__version__} and Python "
        f"{platform.python_version()} are here"
    ) in error
    assert "train with Python 3.12.99 and `pip install ray==2.54.9`, or install" in error
    assert len(error.splitlines()) == 1
    # Nothing of the attempt is left that would stand in the way of the next.
    ray_cluster.Cluster(cluster.address).close()
    assert not ray.is_initialized()


def test_another_cluster_than_the_connected_one_is_refused(cluster):
    connected = ray_cluster.Cluster(cluster.address)
    try:
        host, port = cluster.address.split(":")
        for other in (f"{host}:{int(port) - 1}", "192.0.2.1:6379"):
            told = f"connected to the Ray cluster at {cluster.address}, not to {other}: leave"
            with pytest.raises(UserError, match=re.escape(told)):
                ray_cluster.Cluster(other)
        with pytest.raises(UserError, match="address 'here' is not HOST:PORT"):
            ray_cluster.Cluster("here")
        for same in (cluster.address, None):
            ray_cluster.Cluster(same).close()
        assert connected.ray.is_initialized()
        last = ray_cluster.Cluster(None)
    finally:
        connected.close()
    connected.close()  # which says nothing of the others
    last.check()
    assert last.ray.get(last.put(1)) == 1
    last.close()
    assert not last.ray.is_initialized()


@pytest.mark.slow
def test_a_cluster_is_not_taken_for_the_one_before():
    import ray

    for _ in range(2):  # each has this process as its first driver
        with cluster_of(0) as made:
            ray.init(made.address, log_to_driver=False, logging_level="error")
            connection = ray_connection.Connection.join(None)
            connection.leave(lost=False)
            assert ray.is_initialized()
            ray.shutdown()
            assert connection.head == made.address
            told = re.escape(f"cluster at {made.address} has no cores: start a node that has")
            with pytest.raises(UserError, match=told):
                ray_cluster.Cluster(made.address)
            assert not ray.is_initialized()


@pytest.fixture
def listener():
    """A socket that listens and never answers; a second caller is not even let in."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        yield "{}:{}".format(*server.getsockname())


@pytest.fixture
def swallower(listener):
    """A socket whose callers hear nothing: two fill its queue."""
    host, port = listener.split(":")
    with contextlib.ExitStack() as callers:
        for _ in range(2):
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex((host, int(port)))
        yield listener


def test_an_address_that_swallows_everything_is_given_up(swallower, monkeypatch):
    monkeypatch.setattr(ray_connection, "_PATIENCE", 0.5)
    with pytest.raises(UserError, match=f"no Ray cluster answers at {swallower}: give HOST"):
        ray_cluster.Cluster(swallower)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("swallower", "no Ray cluster answers at {}: give HOST:PORT"),
        ("listener", "the Ray cluster at {} cannot be joined: no answer in 8 s"),
    ],
)
def test_what_is_no_cluster_is_given_up_within_15_seconds(request, tmp_path, where, told):
    address = request.getfixturevalue(where)
    with starling(*COMMAND, address, folder=tmp_path) as process:
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]  # what Ray's own code writes before cannot be turned off
    assert told.format(address) in last


@pytest.mark.slow
def test_a_token_that_the_nodes_do_not_use_is_told(cluster, tmp_path, monkeypatch):
    """The head node cannot ask for the actor's owner then, and Ray says that it has died."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    with starling(*COMMAND, cluster.address, folder=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "RAY_AUTH_MODE has to be the same here, where it is token" in errors.splitlines()[-1]
    assert "actor" not in errors.lower()


def test_what_nodes_cannot_import_is_told(cluster, tmp_path, monkeypatch):
    labyrinth = types.ModuleType("labyrinth")
    exec("import gymnasium\ndef make():\n    return gymnasium.make('CartPole-v1')", vars(labyrinth))
    monkeypatch.setitem(sys.modules, "labyrinth", labyrinth)
    with (
        DistributedPPO(
            labyrinth.make, address=cluster.address, log_dir=str(tmp_path), **SMALL
        ) as agent,
        pytest.raises(UserError, match="worker 0 cannot be made") as caught,
    ):
        agent.train(quiet=True)
    message = str(caught.value)
    assert "No module named 'labyrinth'" in message
    assert "pid=" in message
    assert "ip=" in message
    assert "has to be installed on every node" in message


class Paths:
    """Says where it is, and where it finds modules."""

    def paths(self) -> tuple[str, list[str]]:
        return os.getcwd(), sys.path


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_workers_find_modules_where_the_learner_and_their_node_do(tmp_path, monkeypatch, told):
    from ray.cluster_utils import Cluster

    nodes = [str(tmp_path / name) for name in ("one", "other")] if told else []
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        patch.delenv("PYTHONPATH", raising=False)
        if told:
            patch.setenv("PYTHONPATH", os.pathsep.join(nodes))
        node = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
    monkeypatch.syspath_prepend(str(tmp_path / "learner's"))
    try:
        connection = ray_cluster.Cluster(cluster.address)
        ray = connection.ray
        folder, found = ray.get(spread(ray, Paths, 0).remote().paths.remote())
        connection.close()
    finally:
        cluster.shutdown()
    assert folder == str(tmp_path / "elsewhere")
    ours = [path.rstrip("/") for path in found if path.startswith(str(tmp_path))]
    assert ours == [str(tmp_path / "learner's"), *nodes], "and not the folder"


SIZE = 2**16  # bytes of an observation
STORE = 80 * 10**6  # bytes


class Checksummed(gym.Env):
    """Observes its step, random bytes, and a checksum of both; the reward is the step, too."""

    observation_space = gym.spaces.Box(0, 255, (SIZE,), np.uint8)
    action_space = gym.spaces.Discrete(2)
    step_number = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.step_number += 1
        return self._observe(), float(self.step_number), False, False, {}

    def _observe(self) -> np.ndarray:
        body = np.uint32(self.step_number).tobytes() + self.np_random.bytes(SIZE - 8)
        return np.frombuffer(body + np.uint32(zlib.crc32(body)).tobytes(), np.uint8)


def check(rollout: Any, steps: int) -> None:
    """That a rollout's every byte is as it was observed, and in its place."""
    first = rollout.origin.sequence * steps
    for t, of_all in enumerate(rollout.observations):
        for row in of_all:
            words = np.ascontiguousarray(row).view(np.uint32)
            assert words[0] == first + t
            assert words[-1] == zlib.crc32(row[:-4].tobytes())
    expected = np.arange(first + 1, first + steps + 1)
    np.testing.assert_array_equal(rollout.rewards, expected[:, None].repeat(2, 1))


@pytest.mark.slow
def test_an_object_store_that_overflows_spoils_nothing(tmp_path):
    from ray.cluster_utils import Cluster

    workers, steps, seen = 3, 96, 0
    node = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": STORE}
    node["object_spilling_directory"] = str(tmp_path / "spilled")
    cluster = Cluster(initialize_head=True, head_node_args=node)
    settings = {**SMALL, "num_steps": steps, "mini_batch_size": 96, "hidden_sizes": (2,)}

    def look(iteration: Any) -> None:
        nonlocal seen
        pool = iteration.agent._pool
        while pool._answers.qsize() < 2 * workers:  # until nobody may collect any more
            time.sleep(0.05)
        assert len(pool._requests) == 2 * workers, "the queue grows"
        assert pool._parts == []
        learnt_from = [report.rollout for report in pool.reports]
        alive = learnt_from + [done.result().rollout for done in queued(pool)]
        assert sum(size_of(rollout) for rollout in alive) > 1.2 * STORE
        for rollout in learnt_from:
            check(rollout, steps)
            seen += size_of(rollout)

    try:
        with DistributedPPO(
            Checksummed, sync_mode="non_blocking", address=cluster.address,
            timesteps=8 * workers * 2 * steps, log_dir=str(tmp_path),
            **{**settings, "num_workers": workers},
        ) as agent:  # fmt: skip
            agent.train(callbacks=look, quiet=True)
            assert agent._pool is not None
            assert not agent._pool.losses.counts
    finally:
        cluster.shutdown()
    assert seen > 3 * STORE


def queued(pool: Any) -> list[Any]:
    """The answers that the learner has not taken yet."""
    waiting = [pool._answers.get() for _ in range(pool._answers.qsize())]
    for answer in waiting:
        pool._answers.put(answer)
    return [done for _, done in waiting]


def size_of(rollout: Any) -> int:
    """Bytes of its observations, which are most of it."""
    return rollout.observations.nbytes
