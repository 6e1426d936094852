"""The Ray cluster that a run uses: connecting to it, asking it, whether it is still there."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from starling.errors import (
    MissingExtraError,
    StarlingError,
    UserError,
    WorkerDiedError,
    WorkerError,
)

_PATIENCE = 8.0  # seconds for a cluster to answer and to let us in
_LOOK_EVERY = 1.0  # seconds
_MOST_FAILURES = 3  # of looking for the head node in a row
_OUTLIVES = "86400"  # seconds
_LONGEST = 500  # characters of what an exception says

_VERSIONS = re.compile(r"Ray: (\S+) Python: (\S+)")  # of the cluster and ours, in Ray's error
_QUIET = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}

# They warn that tokens are in use, and that only the main thread can take over SIGTERM.
_TALKATIVE = ("ray._private.authentication.authentication_token_setup", "ray._private.worker")

# Ray's exceptions that say that an actor is lost or out of reach, or what it gave; one that is
# killed since its node has no memory left is no RayActorError.
_LOST = (
    *("RayActorError", "OutOfMemoryError", "NodeDiedError", "WorkerCrashedError"),
    *("ObjectLostError", "RuntimeEnvSetupError", "ActorUnschedulableError"),
)
_NO_ROOM = ("ObjectStoreFullError", "OutOfDiskError")
_RESUME = "the run's checkpoints are here, not there: resume it on another cluster with --resume"

_log = logging.getLogger(__name__)


class ActorLostError(WorkerDiedError):
    """An actor is gone or out of reach, or what it gave is.

    Attributes:
        unmakeable: What keeps it from being made, now and the next time; else "".
        may_answer: Whether it is only out of reach, as far as is known.
        of_node: Whether all that is on its node is lost, or out of reach.
    """

    def __init__(
        self, message: str, unmakeable: str = "", may_answer: bool = False, of_node: bool = False
    ):
        super().__init__(message)
        self.unmakeable, self.may_answer, self.of_node = unmakeable, may_answer, of_node


class CallFailedError(WorkerError):
    """An actor is there, and could not do what it was asked to.

    Attributes:
        of_ray: Whether that was for Ray: what it was given is lost, or what it gives has no room.
    """

    def __init__(self, message: str, traceback: str, of_ray: bool):
        super().__init__(message, original_traceback=traceback)
        self.of_ray = of_ray


class Cluster:
    """A connection to Ray.

    Args:
        address: HOST:PORT of a cluster, or None: the one that is connected already, or else one
            that is started on this machine, without a dashboard and on the loopback interface.

    Raises:
        UserError: Ray is not installed, no cluster of this version answers, or this process is
            connected to another already.
    """

    def __init__(self, address: str | None):
        if address is not None:
            # Ray reads it when it is imported: how long a process outlives the head node. An update
            # may take longer than the minute that is usual, and is to be saved. Not for a Ray of
            # our own, whose processes inherit it, and are to end if this one is killed.
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _OUTLIVES)
        # Ray reads this then, too: what it does at a signal would end the process unsaved.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        try:
            import ray
        except ModuleNotFoundError:
            raise MissingExtraError(
                "workers on a cluster need Ray, which is not installed: pip install "
                "'starling-rl[ray]'"
            ) from None
        self.ray: Any = ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ours = not ray.is_initialized()
        self._over = threading.Event()
        if self.ours:
            _connect(ray, address, self._over)
        self._head = ray.get_runtime_context().gcs_address
        self._here = _address_of(ray, ray.get_runtime_context().get_node_id())
        if address is not None and not self.ours and not _alike(address, self._head):
            raise UserError(
                f"this process is connected to the Ray cluster at {self._head}, not to {address}: "
                "leave the address out, or disconnect before (ray.shutdown())"
            )
        self._looked, self._lost = time.monotonic(), False
        self._asking: threading.Thread | None = None
        self._count_cores()

    def cores(self) -> int:
        """Cores of all nodes, as far as is known: a head node that is lost keeps nobody waiting."""
        if not self._lost and (self._asking is None or not self._asking.is_alive()):
            name = "starling-ray-cores"
            self._asking = threading.Thread(target=self._count_again, name=name, daemon=True)
            self._asking.start()
        return self._cores

    def cores_of_largest_node(self) -> float:
        """What one worker can have at most."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return max(node.get("CPU", 0.0) for node in nodes)

    def _count_cores(self) -> None:
        self._cores = int(self.ray.cluster_resources().get("CPU", 0))

    def _count_again(self) -> None:
        with contextlib.suppress(Exception):  # who looks for the head node says that it is lost
            self._count_cores()

    def is_lost(self) -> bool:
        """Whether the head node, or Ray's process here, does not answer; looks once in a second.

        Waits some seconds for one that does not answer at once: Ray's processes on this node end a
        minute after the head node, and asking for anything then ends this process on the spot.
        """
        if not self._lost and time.monotonic() - self._looked >= _LOOK_EVERY:
            self._lost = not any(self._answer_now(attempt) for attempt in range(_MOST_FAILURES))
            self._looked = time.monotonic()
        return self._lost

    def _answer_now(self, attempt: int) -> bool:
        if attempt:
            time.sleep(_LOOK_EVERY)
        return _answers(self._head, _LOOK_EVERY) and _answers(self._here, _LOOK_EVERY)

    def check(self) -> None:
        """Looks whether the cluster is still there.

        Raises:
            WorkerDiedError: It is not.
        """
        if self.is_lost():
            gone = "head node" if _answers(self._here, _LOOK_EVERY) else "process here (raylet)"
            raise WorkerDiedError(
                f"the Ray cluster's {gone} does not answer any more; {_RESUME} and --address"
            )

    # ---- asking Ray

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Has Ray do something: the one place where its exceptions get a meaning for the run.

        Args:
            function: Of Ray's, such as the `remote` of an actor's method.
            arguments: Passed on.
            options: Passed on.

        Returns:
            What `function` does.

        Raises:
            TimeoutError: What was to be fetched is not there yet.
            ActorLostError: The actor, or what it gave, is lost or out of reach.
            CallFailedError: The actor could not do what it was asked to.
            StarlingError: Whatever the actor raised on purpose; a WorkerDiedError where the cluster
                is of no use any more.
        """
        errors = self.ray.exceptions
        try:
            if not self.ray.is_initialized():  # it would connect to whatever cluster it finds
                raise WorkerDiedError(f"this process is no longer connected to Ray; {_RESUME}")
            return function(*arguments, **options)
        except errors.RayTaskError as error:  # it may be an instance of its cause's class, too
            if isinstance(error.cause, StarlingError):
                raise error.cause from None
            of_ray = isinstance(error.cause, errors.RayError)
            raise CallFailedError(_in_a_line(error.cause), str(error), of_ray) from None
        except (StarlingError, errors.GetTimeoutError):
            raise
        except Exception as error:
            raise self._meaning(error) from error

    def _meaning(self, error: Exception) -> Exception:
        errors = self.ray.exceptions
        if isinstance(error, tuple(getattr(errors, name) for name in _LOST)):
            unmakeable = str(error) if getattr(error, "actor_init_failed", False) else ""
            # Who sits on a node that ends without a word is out of reach for 10 s, and then dead.
            may_answer = isinstance(error, errors.ActorUnavailableError)
            of_node = isinstance(error, errors.NodeDiedError) or "its node has died" in str(error)
            told = _in_a_line(error)
            return ActorLostError(told, unmakeable, may_answer, may_answer or of_node)
        self.check()
        if isinstance(error, tuple(getattr(errors, name) for name in _NO_ROOM)):
            return WorkerDiedError(
                f"Ray's object store here has no room for what workers need: {_in_a_line(error)}; "
                "make room on its disk or give it more memory (ray start --object-store-memory), "
                "and resume the run"
            )
        return WorkerDiedError(
            f"the Ray cluster cannot be used any more: {_in_a_line(error)}; {_RESUME}"
        )

    def put(self, value: Any) -> Any:
        """Puts a value into the object store; see `call`.

        Looks whether Ray's process here is there: without it, this would end on the spot.
        """
        self._looked = -math.inf
        self.check()
        return self.call(self.ray.put, value)

    def kill(self, actor: Any) -> None:
        """Ends an actor, if it is there."""
        if not self.is_lost():
            with contextlib.suppress(StarlingError):
                self.call(self.ray.kill, actor)

    def close(self) -> None:
        """Disconnects; a cluster that was started for the run ends."""
        if self.ours and not self.is_lost():
            self.ray.shutdown()
        self._over.set()


def _address_of(ray: Any, node_id: str) -> str:
    """HOST:PORT of Ray's process on a node."""
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _in_a_line(error: BaseException) -> str:
    """An exception's name and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= _LONGEST else said[:_LONGEST] + ' ...'}"


def _connect(ray: Any, address: str | None, over: threading.Event) -> None:
    if address is None:
        own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        return _init(ray, "local", None, over, **own)
    deadline = time.monotonic() + _PATIENCE
    if not _answers(address, _PATIENCE / 2):
        raise UserError(
            f"no Ray cluster answers at {address}: give HOST:PORT of its head node, which `ray "
            "start --head` prints (the port is 6379 by default)"
        )
    if os.environ.get("RAY_AUTH_MODE") != "token":
        _log.warning(
            "the cluster at %s runs whatever anybody who reaches it sends it: set RAY_AUTH_MODE to "
            "token here and on its nodes",
            address,
        )
    try:
        _init(ray, address, deadline - time.monotonic(), over)
    except Exception as error:
        raise UserError(_refusal(address, " ".join(str(error).split()))) from None
    return None


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
        "and use its token (~/.ray/auth_token) here"
    )


def _init(
    ray: Any, address: str, patience: float | None, over: threading.Event, **settings: Any
) -> None:
    """Has Ray join or start a cluster, in a thread that stays until it is `over`.

    In the main thread Ray would take over SIGTERM, and wait for half a minute and more for what is
    no cluster. The thread stays, as the processes of a cluster that it started end with it.
    """
    failure: list[BaseException] = []
    done = threading.Event()

    def connect() -> None:
        try:
            ray.init(address, **settings, **_QUIET)
        except BaseException as error:
            failure.append(error)
            over.set()
        done.set()
        over.wait()

    with _without_notices():
        threading.Thread(target=connect, name="starling-ray", daemon=True).start()
        in_time = done.wait(patience)
    if not in_time:
        over.set()
        raise TimeoutError(f"no answer in {patience:.0f} s")
    if failure:
        ray.shutdown()  # it may be half there
        raise failure[0]


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


def _answers(address: str, timeout: float) -> bool:
    """Whether anything listens at HOST:PORT."""
    try:
        socket.create_connection(_host_and_port(address), timeout).close()
    except OSError:
        return False
    return True


def _alike(one: str, other: str) -> bool:
    """Whether two HOST:PORT are the same, by name or number."""
    try:
        places = [set(socket.getaddrinfo(*_host_and_port(x))) for x in (one, other)]
    except OSError:
        return False
    return bool(places[0] & places[1])


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"address {address!r} is not HOST:PORT, such as 10.0.0.5:6379")
    return host.strip("[]"), int(port)
