"""Connecting to Ray: joining a cluster or starting one, once for all of this process."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from starling.errors import MissingExtraError, UserError

_PATIENCE = 8.0  # seconds for a cluster to answer and to let us in
_VERSIONS = re.compile(r"Ray: (\S+) Python: (\S+)")  # of the cluster and ours, in Ray's error
_QUIET = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}

# They warn that tokens are in use, and that only the main thread can take over SIGTERM.
_TALKATIVE = ("ray._private.authentication.authentication_token_setup", "ray._private.worker")

# Ray reads them when it is imported or connects: what it does at a signal would end the process
# unsaved.
VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
# How long a process outlives the head node, in seconds. An update may take longer than the minute
# that is usual, and is to be saved. Not for a Ray of our own, whose processes inherit it, and are
# to end if this one is killed.
_OUTLIVES = {"RAY_gcs_rpc_server_reconnect_timeout_s": "86400"}

_log = logging.getLogger(__name__)


class Connection:
    """This process's connection to Ray, for all that use it: the last to leave it closes it.

    One that somebody else has opened is left open.

    Attributes:
        ray: The package.
        head: HOST:PORT of the head node.
    """

    ray: Any
    head: str

    def __init__(self, ray: Any, over: threading.Event | None):
        self.ray, self._over, self._users, self._lost = ray, over, 0, False
        context = ray.get_runtime_context()
        self.head, self._identity = context.gcs_address, _identity(context)

    @classmethod
    def join(cls, address: str | None) -> Connection:
        """Joins the connection that there is, or opens one; see `Cluster`."""
        global _last
        with environment({**VARIABLES, **(_OUTLIVES if address else {})}):
            ray = _import_ray()
            if ray.is_initialized():
                known = _last if _last is not None and _last.is_there() else None
                connection = known or cls(ray, None)
                if connection._lost:
                    raise UserError(
                        f"this process has lost its Ray cluster at {connection.head}, and Ray "
                        "cannot connect again in it: resume in a new process"
                    )
                if address is not None and not _alike(address, connection.head):
                    raise UserError(
                        f"this process is connected to the Ray cluster at {connection.head}, not "
                        f"to {address}: leave the address out, or disconnect before "
                        "(ray.shutdown())"
                    )
            else:
                over = threading.Event()
                _connect(ray, address, over)
                connection = cls(ray, over)
        _last = connection
        connection._users += 1
        return connection

    def is_there(self) -> bool:
        """Whether this is the connection that there is."""
        there = self.ray.is_initialized()
        return there and _identity(self.ray.get_runtime_context()) == self._identity

    def leave(self, lost: bool) -> None:
        """Disconnects, after the last user, what was opened here.

        Args:
            lost: Whether the cluster does not answer any more: Ray would wait for it.
        """
        self._users -= 1
        self._lost = self._lost or lost  # what is asked of Ray then waits, and ends this process
        if self._over is not None and not self._users:
            if not self._lost and self.is_there():
                self.ray.shutdown()
            self._over.set()


_last: Connection | None = None  # that was joined


def _identity(context: Any) -> tuple[str, str]:
    """Node and driver: the driver alone would not do, as every cluster numbers its own from 1."""
    return context.get_node_id(), context.get_worker_id()


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtraError(
            "workers on a cluster need Ray, which is not installed: pip install 'starling-rl[ray]'"
        ) from None
    return ray


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment for a while, of those that are not set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _connect(ray: Any, address: str | None, over: threading.Event) -> None:
    if address is None:
        own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        with _on_loopback():
            _init(ray, "local", None, over, **own)
        return
    deadline = time.monotonic() + _PATIENCE
    if not answers(address, _PATIENCE / 2):
        raise UserError(
            f"no Ray cluster answers at {address}: give HOST:PORT of its head node, which `ray "
            "start --head` prints (the port is 6379 by default)"
        )
    try:
        _init(ray, address, deadline - time.monotonic(), over)
    except Exception as error:
        raise UserError(_refusal(address, " ".join(str(error).split()))) from None
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        _log.warning(
            "the cluster at %s runs whatever anybody who reaches it sends it: set RAY_AUTH_MODE to "
            "token here and on its nodes",
            address,
        )


def _refusal(address: str, error: str) -> str:
    match _VERSIONS.findall(error):
        case [(ray, python), (own_ray, own_python)]:
            return (
                f"the Ray cluster at {address} has Ray {ray} and Python {python}, but Ray "
                f"{own_ray} and Python {own_python} are here, and they must be the same to the "
                f"last digit: train with Python {python} and `pip install ray=={ray}`, or install "
                "what is here on every node"
            )
    return (
        f"the Ray cluster at {address} cannot be joined: {error}; give HOST:PORT of its head node, "
        "and use its token (~/.ray/auth_token) here, with RAY_AUTH_MODE=token"
    )


def _init(
    ray: Any, address: str, patience: float | None, over: threading.Event, **settings: Any
) -> None:
    """Has Ray join or start a cluster, in a thread that stays until it is `over`.

    In the main thread Ray would take over SIGTERM, and wait for half a minute and more for what is
    no cluster. The thread stays, as the processes of a cluster that it started end with it.
    """
    failure: list[BaseException] = []
    done, given_up = threading.Event(), threading.Event()

    def connect() -> None:
        try:
            ray.init(address, **settings, **_QUIET)
        except BaseException as error:
            failure.append(error)
            over.set()
        done.set()
        over.wait()
        if given_up.is_set() and not failure:
            ray.shutdown()  # it came too late

    with _without_notices():
        threading.Thread(target=connect, name="starling-ray", daemon=True).start()
        in_time = done.wait(patience)
    if not in_time:
        given_up.set()
        over.set()
        raise TimeoutError(f"no answer in {patience:.0f} s")
    if failure:
        ray.shutdown()  # it may be half there
        raise failure[0]


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Has a Ray that is started listen on 127.0.0.1 only.

    It takes that address for the question which one this machine has, and listens on all, but where
    clusters are off, as by default on systems whose firewalls would ask.
    """
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    if before is None:  # it is nothing that Ray promises
        _log.warning("this version of Ray may listen on all addresses of this machine")
        yield
        return
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def answers(address: str, timeout: float) -> bool:
    """Whether anything listens at HOST:PORT."""
    try:
        socket.create_connection(_host_and_port(address), timeout).close()
    except (OSError, UnicodeError):  # the latter of what is no name of a host
        return False
    return True


def _alike(one: str, other: str) -> bool:
    """Whether two HOST:PORT are the same, by name or number."""
    try:
        places = [set(socket.getaddrinfo(*_host_and_port(x))) for x in (one, other)]
    except (OSError, UnicodeError):
        return False
    return bool(places[0] & places[1])


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) >= 2**16:
        raise UserError(f"address {address!r} is not HOST:PORT, such as 10.0.0.5:6379")
    return host.strip("[]"), int(port)
