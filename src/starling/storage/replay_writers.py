"""Writers in other processes: whole rollouts over a socket into a shared replay.

A message is the rollout's structure as JSON and its arrays as bytes, so that nothing is unpickled.
The answer comes when the rollout has been added, which is how a writer waits where the replay's
limiter says so. What a writer was sending when it died is left out.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
from typing import Any

import numpy as np

from starling.errors import StarlingError, UserError
from starling.storage.rollout import Origin, Rollout
from starling.storage.shared_replay import SharedReplay
from starling.storage.trees import pack_tree, unpack_tree

_log = logging.getLogger(__name__)

_SIZES = struct.Struct("<QQ")  # bytes of the structure, bytes of the arrays
_ANSWER = struct.Struct("<qQ")  # transitions added, or a code below; bytes of an error's text
_STOPPED, _REFUSED = -1, -2
_ALIGNMENT = 8
_LONGEST = 1 << 34  # more bytes than a rollout has: the sizes are not to be believed
_PATIENCE = 5.0  # seconds that threads have to end
# What learning from a replay needs of a rollout.
_FIELDS = (
    *("observations", "actions", "rewards", "terminated", "truncated"),
    *("final_observations", "final_index", "valid", "action_masks", "priorities"),
)


class ReplayWriter:
    """A replay as a writer's process sees it.

    Args:
        connection: What `WriterConnections.connect` gave.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def add(self, rollout: Rollout) -> int | None:
        """As `SharedReplay.add`; None as well if the replay's process has ended."""
        try:
            self._connection.sendall(_message(rollout))
            answer = bytearray(_ANSWER.size)
            if not _receive(self._connection, memoryview(answer)):
                return None
            added, length = _ANSWER.unpack(answer)
            text = bytearray(length)
            _receive(self._connection, memoryview(text))
        except OSError:  # nobody is at the other end any more
            return None
        if added == _REFUSED:
            raise UserError(text.decode())
        return None if added == _STOPPED else added

    def close(self) -> None:
        """Says that nothing more will come."""
        self._connection.close()


class WriterConnections:
    """Adds what writers send to a replay, with a thread for each of them.

    Args:
        replay: Where it goes.

    Example:
        >>> connections = WriterConnections(replay)
        >>> with connections.connect() as end:  # the process has its own copy of it then
        ...     process = context.Process(target=write, args=(end,))
        ...     process.start()
    """

    def __init__(self, replay: SharedReplay):
        self._replay = replay
        self._serving: list[tuple[threading.Thread, socket.socket]] = []

    def connect(self) -> socket.socket:
        """The writer's end of a new connection; close it here once the writer has it."""
        self._serving = [one for one in self._serving if one[0].is_alive()]
        here, there = socket.socketpair()
        thread = threading.Thread(
            target=self._serve, args=(here,), name=f"replay-{len(self._serving)}", daemon=True
        )
        self._serving.append((thread, here))
        thread.start()
        return there

    def close(self) -> None:
        """Stops the replay and ends the connections: writers' `add` returns None."""
        self._replay.stop()
        for _, connection in self._serving:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has ended
                continue
        for thread, _ in self._serving:
            thread.join(_PATIENCE)
        self._serving = []

    def _serve(self, connection: socket.socket) -> None:
        name = threading.current_thread().name
        buffer = bytearray(1 << 16)
        with connection:
            try:
                while (sizes := _next_message(connection)) is not None:
                    if len(buffer) < sum(sizes):
                        buffer = bytearray(sum(sizes))
                    if not _receive(connection, memoryview(buffer)[: sum(sizes)]):
                        raise ValueError("the writer ended in the middle of it")
                    answer = self._answer(buffer, sizes)
                    connection.sendall(answer)
            except OSError:  # the writer has ended, or close() was called
                return
            except (ValueError, KeyError, TypeError) as error:
                _log.warning("%s: a rollout was left out, the last of its writer: %s", name, error)

    def _answer(self, buffer: bytearray, sizes: tuple[int, int]) -> bytes:
        try:
            added = self._replay.add(_rollout(buffer, sizes))
        except StarlingError as error:
            text = str(error).encode()
            return _ANSWER.pack(_REFUSED, len(text)) + text
        return _ANSWER.pack(_STOPPED if added is None else added, 0)


def _message(rollout: Rollout) -> bytes:
    arrays: list[np.ndarray] = []
    fields = {name: getattr(rollout, name) for name in _FIELDS}
    header = {
        "rollout": pack_tree(fields, arrays),
        "origin": [int(number) for number in rollout.origin],
        "arrays": [[array.dtype.str, array.shape] for array in arrays],
    }
    parts = [json.dumps(header).encode()]
    for array in arrays:
        parts += [array.tobytes(), bytes(-array.nbytes % _ALIGNMENT)]
    return _SIZES.pack(len(parts[0]), sum(map(len, parts[1:]))) + b"".join(parts)


def _rollout(buffer: bytearray, sizes: tuple[int, int]) -> Rollout:
    """A rollout, as views of a message."""
    header: dict[str, Any] = json.loads(bytes(buffer[: sizes[0]]))
    arrays, offset = [], sizes[0]
    for name, shape in header["arrays"]:
        dtype, count = np.dtype(name), int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(buffer, dtype, count, offset) if count else np.empty(0, dtype)
        arrays.append(array.reshape(shape))
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    fields = unpack_tree(header["rollout"], arrays)
    return Rollout(**fields, origin=Origin(*header["origin"]))


def _next_message(connection: socket.socket) -> tuple[int, int] | None:
    """Sizes of the message that comes next; None where the writer has ended between two."""
    sizes = bytearray(_SIZES.size)
    if not _receive(connection, memoryview(sizes)):
        return None
    structure, arrays = _SIZES.unpack(sizes)
    if structure + arrays > _LONGEST:
        raise ValueError(f"a message of {structure + arrays} bytes")
    return structure, arrays


def _receive(connection: socket.socket, view: memoryview) -> bool:
    """Fills a buffer; False where the other end has closed."""
    while len(view):
        count = connection.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True
