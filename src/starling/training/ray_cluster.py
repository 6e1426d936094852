"""The Ray cluster that a run uses: what it has, asking it, whether it is still there."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from starling.errors import StarlingError, UserError, WorkerDiedError, WorkerError
from starling.training.ray_connection import Connection, answers
from starling.training.ray_witness import Witness

_LOOK_EVERY = 1.0  # seconds
_MOST_FAILURES = 3  # of looking for the head node in a row
_LONGEST = 500  # characters of what an exception says

# Ray's exceptions that say that an actor is lost or out of reach, or what it gave; one that is
# killed since its node has no memory left is no RayActorError.
_LOST = (
    *("RayActorError", "OutOfMemoryError", "NodeDiedError", "WorkerCrashedError"),
    *("ObjectLostError", "RuntimeEnvSetupError", "ActorUnschedulableError"),
)
_NO_ROOM = ("ObjectStoreFullError", "OutOfDiskError")
_UNHEARD = ("all references to the actor were removed", "The actor never ran")
_RESUME = "the run's checkpoints are here, not there: resume it on another cluster with --resume"


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
        UserError: Ray is not installed, no cluster of this version answers, it has no cores, or
            this process is connected to another already.

    Attributes:
        ray: The package.
        stop: Says whether the run was asked to stop.
    """

    def __init__(self, address: str | None):
        self.stop: Callable[[], bool] = lambda: False
        self._connection: Connection | None = Connection.join(address)
        self.ray: Any = self._connection.ray
        self._head = self._connection.head
        self._here = _address_of(self.ray, self.ray.get_runtime_context().get_node_id())
        # A Ray of our own ends with this process, however that ends.
        self._witness = Witness(self._here) if address else None
        self._looked, self._lost = time.monotonic(), False
        self._asking: threading.Thread | None = None
        self._count_cores()
        if not any(self._cores):
            self.close()
            raise UserError(
                f"the Ray cluster at {self._head} has no cores: start a node that has "
                f"(ray start --address={self._head})"
            )

    def cores(self) -> list[float]:
        """Cores of each node, as far as is known: a head node that is lost keeps nobody waiting."""
        if not self._lost and (self._asking is None or not self._asking.is_alive()):
            name = "starling-ray-cores"
            self._asking = threading.Thread(target=self._count_again, name=name, daemon=True)
            self._asking.start()
        return self._cores

    def on_nodes(self, resource: str) -> list[float]:
        """How much each node has of one of Ray's resources, such as "CPU": an actor is on one."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [node.get(resource, 0.0) for node in nodes]

    def _count_cores(self) -> None:
        self._cores = self.on_nodes("CPU")

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
        return answers(self._head, _LOOK_EVERY) and answers(self._here, _LOOK_EVERY)

    def check(self) -> None:
        """Looks whether the cluster is still there.

        Raises:
            WorkerDiedError: It is not.
        """
        if self.is_lost():
            # Without a head node, Ray's process here ends, too.
            gone = "process here (raylet)" if answers(self._head, _LOOK_EVERY) else "head node"
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
            UserError: The cluster makes no actors for this process.
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
            if why := unheard(str(error)):
                return UserError(why)
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
        """Disconnects, unless others here use it; a cluster that was started for the run ends."""
        if self._connection is not None:
            self._connection.leave(self.is_lost())
            self._connection = None
        if self._witness is not None:
            self._witness.dismiss()
            self._witness = None


def room_on(nodes: Iterable[float], cpus: float) -> int:
    """How many actors that take so many cores nodes have room for: none is on two."""
    return sum(int(node / cpus + 1e-9) for node in nodes)  # of 7 cores there are 50 times 0.14


def unheard(said: str) -> str:
    """What keeps actors from being made, where what Ray says of one means that; else "".

    The head node takes it for given up, since it cannot ask the process whose it is.
    """
    if not all(words in said for words in _UNHEARD):
        return ""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    own = " (Ray sets it in a process that has had a Ray of its own)" if mode == "token" else ""
    return (
        "the Ray cluster's head node does not reach this process, and makes nothing for it: "
        f"RAY_AUTH_MODE has to be the same here, where it is {mode}{own}, as where the nodes were "
        "started; if it is, look for a firewall between the machines"
    )


def _address_of(ray: Any, node_id: str) -> str:
    """HOST:PORT of Ray's process on a node."""
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _in_a_line(error: BaseException) -> str:
    """An exception's name and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= _LONGEST else said[:_LONGEST] + ' ...'}"
