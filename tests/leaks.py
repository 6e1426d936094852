"""What a test must leave as it found it: processes and file descriptors."""

from __future__ import annotations

import os
import select
from pathlib import Path


def children(pid: int | None = None) -> set[int]:
    """Processes whose parent is `pid`, by default this one; zombies included."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == (pid or os.getpid()):
                found.add(int(entry.name))
    return found


def descriptors() -> list[str]:
    """The files and pipes that this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the listing's own
            continue
    return found


def ends_within(pid: int, seconds: float) -> bool:
    """Whether a process, which need not be a child, ends within some time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        return bool(poller.poll(seconds * 1000))
    finally:
        os.close(handle)
