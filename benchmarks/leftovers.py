"""What a case that has ended leaves behind: processes, and files in shared memory."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

LEFT_AFTER = 3.0  # seconds after which what is still there is left over
SHARED = Path("/dev/shm")


def processes(token: str) -> list[int]:
    """Processes that descend from a case, whoever their parent is by now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"STARLING_FAULT={token}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def left(token: str) -> int:
    """How many processes are left after a while; returns at once if there are none."""
    deadline = time.monotonic() + LEFT_AFTER
    while (left := len(processes(token))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def shared() -> set[str]:
    """Names of files in shared memory, of whichever process."""
    return set(os.listdir(SHARED)) if SHARED.exists() else set()


def forgotten(before: set[str]) -> int:
    """How many files in shared memory have come to stay; those in use are other programs'."""
    deadline = time.monotonic() + LEFT_AFTER
    while new := [name for name in shared() - before if not _in_use(SHARED / name)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return len(new)


def _in_use(file: Path) -> bool:
    """Whether a process has a file open or mapped."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f" {file}\n" in (process / "maps").read_text():
                return True
            for opened in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(opened) == str(file):
                        return True
    return False
