"""How much memory there is, and how much a process takes."""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEM = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that processes can still take, of the machine or of a container; None if unknown."""
    left = [found for found in (_of_system(), _of_container()) if found is not None]
    return min(left, default=None)


def resident_memory(pid: int | None = None) -> int:
    """Bytes that a process keeps in memory, this one or another; 0 where nobody says."""
    try:
        pages = Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1]
    except (OSError, IndexError):  # no such file, or the process has just ended
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _of_system() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _SYSTEM.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def _of_container() -> int | None:
    try:
        limit = int((_CONTAINER / "memory.max").read_text())
        # What only caches files is given up when it is needed.
        statistics = dict(
            line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines()
        )
        used = int((_CONTAINER / "memory.current").read_text())
        return max(0, limit - used + int(statistics["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no such files, or no limit ("max")
        return None
