"""Compiled programs kept from one process to the next: a second training starts seconds sooner."""

from __future__ import annotations

import os
from pathlib import Path

import filelock
import jax

_LARGEST = 2**30  # bytes; what was not used for longest makes room


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache folder, for what is compiled from now on.

    Several processes may do so at once: JAX locks the folder. Where a folder is set already (by
    JAX's own options) that is used; one that cannot be made means no cache.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home, "starling", "jax")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all
        return
    if not os.access(folder, os.W_OK):
        return
    _remove_unfinished(folder)
    jax.config.update("jax_compilation_cache_max_size", _LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed while it wrote has left.

    JAX writes a program, then the time of its use, both under this lock; one without the other
    would make it fail to write any more.
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=1):
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
    except (filelock.Timeout, OSError):  # others are at it, and what they do is as good
        return
