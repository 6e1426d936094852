"""How much memory there is."""

from __future__ import annotations


def available_memory() -> int | None:
    """Bytes that processes can still take, where the system says so."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None
