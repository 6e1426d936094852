"""Who opens and closes this process's connection to Ray, and what is left of it; without Ray."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from starling.errors import UserError
from starling.training import ray_connection
from starling.training.ray_connection import Connection

OUTLIVES, SIGNALS = "RAY_gcs_rpc_server_reconnect_timeout_s", "RAY_DISABLE_FAILURE_SIGNAL_HANDLER"


class Ray:
    """What there is of it to connect by; each connection has a name of its own."""

    def __init__(self):
        self.connections, self.connected = 0, False
        self.variables: dict[str, str] = {}

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, *_: Any, **__: Any) -> None:
        self.connections, self.connected = self.connections + 1, True
        self.variables = dict(os.environ)

    def shutdown(self) -> None:
        self.connected = False

    def get_runtime_context(self) -> Any:
        name = f"worker {self.connections}"
        names = {"get_node_id": lambda: "node", "get_worker_id": lambda: name}
        return SimpleNamespace(gcs_address="127.0.0.1:6379", **names)


@pytest.fixture
def ray(monkeypatch):
    there = Ray()
    monkeypatch.setattr(ray_connection, "_import_ray", lambda: there)
    monkeypatch.setattr(ray_connection, "_last", None)
    monkeypatch.setattr(ray_connection, "answers", lambda *_: True)
    for name in (OUTLIVES, SIGNALS):
        monkeypatch.delenv(name, raising=False)
    return there


pytestmark = pytest.mark.usefixtures("no_leaks")


def test_the_last_to_leave_a_connection_closes_it(ray):
    first, second = Connection.join(None), Connection.join(None)
    first.leave(lost=False)
    assert ray.connected
    third = Connection.join("127.0.0.1:6379")
    second.leave(lost=False)
    assert ray.connected
    third.leave(lost=False)
    assert not ray.connected
    assert ray.connections == 1


def test_a_connection_that_somebody_else_opened_is_left_open(ray):
    ray.init()
    Connection.join(None).leave(lost=False)
    assert ray.connected
    ray.shutdown()
    ours = Connection.join(None)
    ray.shutdown()
    ray.init()  # which is another
    Connection.join(None).leave(lost=False)
    assert ray.connected
    ours.leave(lost=False)
    assert ray.connected


def test_nobody_waits_for_a_cluster_that_is_gone(ray):
    Connection.join(None).leave(lost=True)
    assert ray.connected


@pytest.mark.parametrize("by_others", [False, True])
@pytest.mark.parametrize("address", [None, "127.0.0.1:6379"])
def test_a_connection_that_was_lost_is_not_joined_again(ray, by_others, address):
    if by_others:
        ray.init()
    Connection.join(None).leave(lost=True)
    for _ in range(2):
        message = "lost its Ray cluster at 127.0.0.1:6379, .*: resume in a new process"
        with pytest.raises(UserError, match=message):
            Connection.join(address)
    ray.shutdown()
    Connection.join(address).leave(lost=False)  # which is another
    assert not ray.connected


@pytest.mark.parametrize("address", ["ray://10.0.0.5:10001", "auto", ":6379", "head:65536"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match=f"address '{address}' is not HOST:PORT, such as"):
        ray_connection._connect(None, address, threading.Event())


def test_no_cluster_answers_at_what_is_no_name_of_a_host():
    address = "head..lan:6379"
    assert not ray_connection._alike(address, "127.0.0.1:6379")
    with pytest.raises(UserError, match=r"no Ray cluster answers at head\.\.lan:6379: give HOST"):
        ray_connection._connect(None, address, threading.Event())


def test_a_cluster_that_lets_in_too_late_is_left(ray, monkeypatch):
    """Else the process would be connected to what it was told cannot be joined."""
    lets_in, address = threading.Event(), "127.0.0.1:6379"
    init = ray.init
    monkeypatch.setattr(ray, "init", lambda *told, **settings: lets_in.wait() and init())
    monkeypatch.setattr(ray_connection, "_PATIENCE", 0.1)
    before = set(threading.enumerate())
    with pytest.raises(UserError, match=f"cluster at {address} cannot be joined: no answer in 0 s"):
        Connection.join(address)
    lets_in.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10.0)
    assert ray.connections == 1
    assert not ray.connected


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379"])
def test_variables_of_the_environment_are_set_while_it_connects(ray, monkeypatch, address):
    before = dict(os.environ)
    Connection.join(address).leave(lost=False)
    assert ray.variables[SIGNALS] == "1"
    assert ray.variables.get(OUTLIVES) == (address and "86400")
    assert dict(os.environ) == before
    monkeypatch.setenv(OUTLIVES, "7")
    Connection.join(address).leave(lost=False)
    assert ray.variables[OUTLIVES] == os.environ[OUTLIVES] == "7"
