"""Run folders: one folder for each run, with its settings, metrics, checkpoints and result."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from starling.errors import CheckpointError, UserError
from starling.storage.checkpoint_format import write_file
from starling.storage.locks import LockHeldError, lock_file

_PACKAGES = ("jax", "jaxlib", "numpy", "gymnasium", "flax", "optax")


def create_run_folder(
    log_dir: str | Path, env: str, algo: str, seed: int, run_name: str | None = None
) -> Path:
    """Makes a new folder `<log_dir>/<run_name>` that no other run has or gets.

    Args:
        log_dir: Folder of runs, made if it is missing.
        env: The environment's name; what a file name cannot hold becomes "-".
        algo: The algorithm's name.
        seed: The run's seed.
        run_name: Name to use instead of `<env>__<algo>__s<seed>`.

    Returns:
        The folder; its name ends in `__2`, `__3` ... where the plain one is taken.

    Raises:
        UserError: `run_name` is no plain name, or nothing can be written to `log_dir`.
    """
    if run_name is None:
        base = "__".join(_file_name(part) for part in (env, algo, f"s{seed}"))
    elif run_name in ("", ".", "..") or re.search(r"[/\\:\0]", run_name):
        raise UserError(f"run_name {run_name!r} is no plain folder name: use letters, digits, - _")
    else:
        base = run_name
    log_dir = Path(log_dir)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = log_dir / (base if number == 1 else f"{base}__{number}")
            try:
                path.mkdir()  # atomic: of two runs that want one name, only one gets it
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"log_dir {str(log_dir)!r} cannot be written to ({error.strerror}): "
            "choose another with --log_dir"
        ) from error


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads a run's `config.json`: every setting as resolved, with the versions of what ran.

    Args:
        path: The folder that a run made.

    Raises:
        CheckpointError: `path` is no run folder, or its `config.json` cannot be read.
    """
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        why = "it has no config.json" if path.is_dir() else "there is no such folder"
        raise CheckpointError(
            f"{path} is no run folder: {why}; give the folder that `starling train` printed"
        )
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no JSON object")
    return config


def lock_run(path: str | Path) -> IO[str]:
    """Claims a run for this process, so that no second one goes on from it at the same time.

    Returns:
        The open lock; closing it, or the end of the process, gives the run back.

    Raises:
        UserError: Another process has the run, or the folder cannot be written to.
    """
    try:
        return lock_file(Path(path) / ".lock")
    except LockHeldError as error:
        raise UserError(f"{error}: stop it first, or start a run of its own") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be written to ({error.strerror}): copy the run to where it can"
        ) from error


def write_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Writes a run's `config.json`.

    Raises:
        UserError: It cannot be written. A folder that held none is removed: no run has begun.
    """
    file = Path(path) / "config.json"
    try:
        write_json(file, settings)
    except OSError as error:
        if not file.exists():
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"{file} cannot be written ({error.strerror}): make room, or choose another place "
            "with --log_dir"
        ) from error


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes JSON in the order given; a reader sees the old file or the new one, never half.

    Raises:
        OSError: The file cannot be written; the old one is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_file(temporary, (json.dumps(value, indent=2, default=_plain) + "\n").encode())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def versions() -> dict[str, str | None]:
    """Versions of Starling, Python and the packages that decide results; None if not installed."""
    from starling import __version__

    found: dict[str, str | None] = {"starling": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _file_name(text: str) -> str:
    """Turns "ALE/Pong-v5" or "module:factory" into a name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "env"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return value.tolist()
    return str(value)
