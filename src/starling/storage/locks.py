"""Locks between processes that vanish with their owner, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Some network file systems know no locks: going without one is better than not saving at all.
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class LockHeldError(OSError):
    """Another process, or another part of this one, holds the lock; the message names it."""


def lock_file(path: Path) -> IO[str]:
    """Takes the lock of a file without waiting; closing what it returns gives the lock back.

    The kernel frees the lock when its owner ends, `kill -9` included: it is never stale, and
    the file itself may stay behind.

    Args:
        path: The lock's file, made if it is missing; it names its owner.

    Returns:
        The open file, usable in a `with` statement.

    Raises:
        LockHeldError: Someone else holds the lock.
        OSError: The file cannot be made or written.
    """
    # Not "w": that would wipe the owner's name before we know whether the lock is free.
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        if not _try_lock(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise LockHeldError(f"{path.parent} is in use by {owner}")
        # The name is a courtesy: a full disk must not keep the lock from being taken.
        with contextlib.suppress(OSError):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BaseException:
        file.close()
        raise
    return file


def _try_lock(file: IO[str]) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            # Far past the text: a locked byte cannot be read there, and the text names the owner.
            file.seek(1 << 30)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore
    except OSError as error:
        return error.errno in _NO_LOCKS_HERE
    return True
