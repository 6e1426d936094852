"""What a test must leave as it found it: processes, descriptors, threads, shared memory, files."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 5.0
"""Seconds in which what is about to end or vanish does."""


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


def living_in(session: int) -> set[int]:
    """Processes of a session (`start_new_session`) that live, whoever their parent is now."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = file.read_text().rpartition(") ")[2].split()[:4]
            if int(its_session) == session and state != "Z":  # who reaps orphans may be slow
                found.add(int(file.parent.name))
    return found


def threads() -> set[threading.Thread]:
    """Threads of Python; those that libraries run without it come and go as they like."""
    return {t for t in threading.enumerate() if not isinstance(t, threading._DummyThread)}


def shared_files() -> set[Path]:
    """Named shared memory and semaphores, of whichever process."""
    folder = Path("/dev/shm")
    return set(folder.iterdir()) if folder.is_dir() else set()


def temporary_files() -> set[Path]:
    """What Starling has put into the folder for temporary files."""
    return set(Path(tempfile.gettempdir()).glob("starling-*"))


def abandoned(files: set[Path]) -> set[Path]:
    """Those of the files that nobody holds and that stay: other tests run at the same time."""
    deadline = time.monotonic() + PATIENCE
    while files and time.monotonic() < deadline:
        files = {file for file in files if file.exists() and not held_by_others(file)}
        time.sleep(0.05 if files else 0.0)
    return files


def held_by_others(file: Path) -> bool:
    """Whether another process has a file open or mapped."""
    own = str(os.getpid())
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == own:
            continue
        with contextlib.suppress(OSError):
            if f" {file}\n" in (process / "maps").read_text():
                return True
            if str(file) in map(os.readlink, (process / "fd").iterdir()):
                return True
    return False


def ended(thread: threading.Thread) -> bool:
    """Whether a thread ends, which one that was asked to may do a moment later."""
    thread.join(PATIENCE)
    return not thread.is_alive()


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fails if what is done inside leaves anything behind."""
    looks: list[Callable[[], set]] = [children, threads, shared_files, temporary_files]
    before, files = [look() for look in looks], descriptors()
    yield
    left = [look() - old for look, old in zip(looks, before, strict=True)]
    # Not by their number: a test may also close what garbage of an earlier one had open.
    if not any(left) and not Counter(descriptors()) - Counter(files):
        return
    gc.collect()  # takes longer than all of the above
    for look, old in zip(looks, before, strict=True):
        left = look() - old
        if look is threads:
            left = {thread for thread in left if not ended(thread)}
        if look is shared_files:
            left = abandoned(left)
        assert not left, f"{look.__name__} left behind: {left}"
    opened = Counter(descriptors()) - Counter(files)
    assert not opened, f"descriptors left behind: {opened}"


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
