"""Compiled programs kept from one command to the next: a second training starts 1 to 2 s sooner."""

from __future__ import annotations

import os
from pathlib import Path


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs in the user's cache folder; call before JAX is imported.

    What the user has set in the environment stays; a folder that cannot be made means no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home, "starling", "jax")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
