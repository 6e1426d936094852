"""Checkpoints: folders that are there whole or not at all, and never run code when read.

```
<run>/checkpoints/
  step_000000016384/
    manifest.json            format, counters, name, size and sha256 of each file, what is not in it
    parameters.safetensors   a group of arrays          config.json   a document
  latest                     the newest one's name      best          the best one's name
```

A checkpoint is written under a temporary name that no reader looks at, flushed to the disk and
then renamed. Whatever happens meanwhile, the one before it stays loadable. The files `latest` and
`best` are for people and their scripts: loading goes by the manifests.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from starling.errors import CheckpointError
from starling.storage.checkpoint_format import (
    MANIFEST,
    check_names,
    read_manifest,
    read_members,
    sync_folder,
    unreadable,
    write_file,
    write_members,
)
from starling.storage.locks import lock_file

_TEMPORARY = ".tmp-"
# ".replaced": the older of two checkpoints of one step, between the two renames that swap them.
_CHECKPOINT_NAME = re.compile(r"step_\d{12,}(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """What was read from one checkpoint folder, verified.

    Attributes:
        path: The folder it came from.
        step: Environment steps made when it was saved.
        counters: The counters given to `save_checkpoint`.
        arrays: Groups of arrays, by name; the arrays are writable and owned by the reader, but for
            those that it asked to be left in their files.
        documents: JSON documents, by name.
        not_included: What the writer knew to be missing, in words.
    """

    path: Path
    step: int
    counters: dict[str, Any]
    arrays: dict[str, dict[str, np.ndarray]]
    documents: dict[str, Any]
    not_included: tuple[str, ...]


def save_checkpoint(
    folder: str | Path,
    step: int,
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    documents: Mapping[str, Any],
    counters: Mapping[str, Any],
    *,
    not_included: Sequence[str] = (),
    keep_last: int = 3,
    best: bool = False,
) -> Path:
    """Writes the checkpoint `folder/step_<step>`, then lets go of older ones.

    A checkpoint of the same step is replaced. NumPy scalars are welcome in the documents.

    Args:
        folder: Where the checkpoints of a run lie, made if it is missing.
        step: Environment steps made so far.
        arrays: Groups of arrays; each group becomes `<name>.safetensors`.
        documents: Whatever JSON can hold; each becomes `<name>.json`.
        counters: Small numbers to be seen at a glance, kept in the manifest.
        not_included: What a reader should know to be missing, in words.
        keep_last: Newest checkpoints to keep, the best one apart.
        best: Whether this is the best one so far, to be kept until a better one comes.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: It could not be written (disk full, no permission, another process is saving
            into the folder). The checkpoints that were there are intact; try again later.
        TypeError: Something in `arrays` or `documents` cannot be stored.
        ValueError: A name cannot be used, or `step` is negative.
    """
    folder = Path(folder)
    check_names(arrays, documents)
    if step < 0:
        raise ValueError(f"a checkpoint's step is at least 0, not {step}")
    name = f"step_{step:012d}"
    header: dict[str, Any] = {
        "step": int(step),
        "counters": dict(counters),
        "not_included": list(not_included),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / ".lock"):
            _clear_up_after_the_dead(folder)
            found = _find(folder)
            best_path = _best(found)
            # The best checkpoint, saved a second time at the same step, is still the best.
            header["best"] = best or best_path == folder / name
            header["sequence"] = 1 + max((known.sequence for known in found), default=0)
            _write_checkpoint(folder, name, header, arrays, documents)
            _write_pointer(folder, "latest", name)
            if header["best"]:
                best_path = folder / name
                _write_pointer(folder, "best", name)
            for known in _find(folder)[max(keep_last, 1) :]:
                if known.path != best_path:
                    _discard(known.path)
    except OSError as error:
        failure = OSError(
            f"the checkpoint of step {step} was not saved in {folder}: "
            f"{error.strerror or error}; the ones before it are intact"
        )
        failure.errno = error.errno
        raise failure from error
    return folder / name


def load_checkpoint(
    path: str | Path,
    *,
    which: str = "latest",
    finite: Collection[str] = (),
    without: Collection[str] = (),
    mapped: Collection[str] = (),
) -> Checkpoint:
    """Reads and verifies a checkpoint.

    Args:
        path: A run folder, its `checkpoints` folder, or one checkpoint's folder.
        which: "latest" or "best"; means nothing where `path` is one checkpoint.
        finite: Groups of arrays that must not hold NaN or infinity.
        without: Groups of arrays that are not read, whether damaged or not.
        mapped: Groups of arrays that are verified and left in their files: read-only views of
            these, for what is copied somewhere else anyway and need not be in memory twice.

    Returns:
        With "latest", the newest checkpoint that is undamaged; a warning names those skipped.

    Raises:
        CheckpointError: There is none, or the one asked for is damaged, or all are.
    """
    path = Path(path)
    read = functools.partial(_read_checkpoint, finite=finite, without=without, mapped=mapped)
    if which not in ("latest", "best"):
        raise CheckpointError(f"{which!r} is no choice of checkpoint: say 'latest' or 'best'")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no folder: give a run folder, or the folder of one checkpoint"
        )
    if _CHECKPOINT_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return read(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    choose = _load_best if which == "best" else _load_newest
    while True:
        with unreadable(folder):
            found = _find(folder)
        if which == "latest" and not found:
            raise CheckpointError(
                f"{path} holds no checkpoint: give a run folder in which one was saved"
            )
        with contextlib.suppress(_ReplacedError):
            return choose(folder, found, read)


class _ReplacedError(Exception):
    """Something was saved while a checkpoint was read: what is gone by then is not damaged."""


def _load_best(folder: Path, found: list[_Found], read: Callable[[Path], Checkpoint]) -> Checkpoint:
    best = _best(found)
    if best is None:
        raise CheckpointError(
            f"{folder} holds no best checkpoint: only runs that evaluate (--eval_interval) "
            "keep one; load the latest"
        )
    try:
        return read(best)
    except CheckpointError:
        _check_unchanged(folder, found)
        raise


def _load_newest(
    folder: Path, found: list[_Found], read: Callable[[Path], Checkpoint]
) -> Checkpoint:
    """The newest that is undamaged."""
    problems = []
    # A manifest that cannot be read may have been the newest's: try those first, and say so.
    for candidate in sorted(found, key=lambda known: known.sequence != 0):
        try:
            checkpoint = read(candidate.path)
        except CheckpointError as error:
            _check_unchanged(folder, found)
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(
                f"loaded {candidate.path} and skipped damaged checkpoints: {'; '.join(problems)}",
                RuntimeWarning,
                stacklevel=3,
            )
        return checkpoint
    raise CheckpointError(f"no checkpoint in {folder} is undamaged: {'; '.join(problems)}")


def _check_unchanged(folder: Path, found: list[_Found]) -> None:
    with unreadable(folder):
        if _find(folder) != found:
            raise _ReplacedError


def flatten_tree(tree: Any) -> dict[str, np.ndarray]:
    """Turns a pytree into a flat group of arrays for `save_checkpoint`.

    Args:
        tree: Any pytree of arrays or numbers. Typed JAX keys go through `jax.random.key_data`.

    Returns:
        Copies of its leaves on the host, by path ("layers/0/kernel").
    """
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
    # Copies: on CPU `device_get` gives views of buffers that an update may be donated.
    return {_key(path): np.array(leaf) for path, leaf in leaves}


def restore_tree(
    template: Any, arrays: Mapping[str, np.ndarray], what: str = "the checkpoint"
) -> Any:
    """Puts a flat group of arrays back into the shape of a pytree.

    Args:
        template: A pytree with the structure, shapes and dtypes to expect; its leaves may be
            arrays, numbers or `jax.ShapeDtypeStruct`.
        arrays: What `flatten_tree` made of such a tree.
        what: Names the arrays in errors ("the checkpoint's policy").

    Returns:
        A tree like `template` with NumPy arrays as its leaves.

    Raises:
        CheckpointError: Keys, shapes or dtypes differ; it lists them with both sides.
    """
    import jax

    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_key(path): leaf for path, leaf in paths_and_leaves}
    differences = [
        f"{key} is only in the checkpoint" for key in sorted(set(arrays) - set(expected))
    ]
    for key, leaf in expected.items():
        if key not in arrays:
            differences.append(f"{key} is not in the checkpoint")
        elif _describe(arrays[key]) != _describe(leaf):
            differences.append(
                f"{key} is {_describe(arrays[key])} in the checkpoint and {_describe(leaf)} here"
            )
    if differences:
        more = f"; and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError(f"{what} does not fit: {'; '.join(differences[:10])}{more}")
    return jax.tree_util.tree_unflatten(structure, [arrays[key] for key in expected])


def _write_checkpoint(
    folder: Path,
    name: str,
    header: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    documents: Mapping[str, Any],
) -> None:
    temporary = folder / f"{_TEMPORARY}{name}"
    temporary.mkdir()
    try:
        write_members(temporary, header, arrays, documents)
        target, replaced = folder / name, folder / f"{name}.replaced"
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        sync_folder(folder)
        _discard(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_pointer(folder: Path, pointer: str, name: str) -> None:
    temporary = folder / f"{_TEMPORARY}{pointer}"
    write_file(temporary, f"{name}\n".encode())
    temporary.replace(folder / pointer)
    sync_folder(folder)


def _discard(path: Path) -> None:
    """Removes a checkpoint in one step for readers: it never lies there half deleted."""
    if path.exists():
        doomed = path.with_name(f"{_TEMPORARY}discarded-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _clear_up_after_the_dead(folder: Path) -> None:
    """Removes what writers that were killed left; the lock says that none of them lives."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for replaced in folder.glob("step_*.replaced"):
        successor = replaced.with_suffix("")
        if successor.exists():
            _discard(replaced)
        else:
            replaced.rename(successor)


class _Found(NamedTuple):
    """A checkpoint that lies in a folder.

    The sequence counts the saves into the folder: steps would not do, as a run that went on from
    an older checkpoint has made fewer. Without a readable manifest it is unknown: 0.
    """

    sequence: int
    path: Path
    best: bool


def _find(folder: Path) -> list[_Found]:
    """Lists the checkpoints in a folder, newest first."""
    found = []
    for path in folder.iterdir():
        if _CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir():
            try:
                manifest = read_manifest(path)
                found.append(_Found(manifest["sequence"], path, manifest["best"]))
            except CheckpointError:
                found.append(_Found(0, path, False))
    return sorted(found, reverse=True)


def _best(found: Sequence[_Found]) -> Path | None:
    # From the manifests and not from the file `best`, which a killed writer may not have reached.
    return next((known.path for known in found if known.best), None)


def _read_checkpoint(
    path: Path, *, finite: Collection[str], without: Collection[str], mapped: Collection[str]
) -> Checkpoint:
    manifest = read_manifest(path)
    arrays, documents = read_members(path, manifest, without, mapped)
    for group in finite:
        for key, array in arrays.get(group, {}).items():
            if not np.isfinite(array).all():
                raise CheckpointError(f"{path / group}.safetensors holds a {key} with NaN or inf")
    return Checkpoint(
        path=path,
        step=manifest["step"],
        counters=manifest["counters"],
        arrays=arrays,
        documents=documents,
        not_included=tuple(manifest["not_included"]),
    )


def _key(path: tuple[Any, ...]) -> str:
    import jax

    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(leaf: Any) -> str:
    shaped = leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)
    return f"{np.dtype(shaped.dtype)}{list(shaped.shape)}"
