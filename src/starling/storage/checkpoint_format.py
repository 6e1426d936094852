"""The files inside one checkpoint folder: how they are written, and how they are distrusted.

Reading never runs code: arrays are safetensors, the rest is JSON. The manifest's checksums keep
accidents out, not people, so that names, sizes and types are checked all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from starling.errors import CheckpointError

FORMAT = "starling-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_FILE_NAME = re.compile(rf"{_GROUP_NAME.pattern}\.(safetensors|json)")
_MANIFEST_TYPES = {"step": int, "sequence": int, "best": bool, "counters": dict, "files": list}
_MAX_MANIFEST_BYTES = 16 << 20
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}
_TYPE_NAMES = {np.dtype(kind).name: name for name, kind in _DTYPES.items()} | {"bfloat16": "BF16"}


def check_names(arrays: Mapping[str, Any], documents: Mapping[str, Any]) -> None:
    """Raises ValueError if a group or document cannot name a file."""
    for name in (*arrays, *documents):
        if not _GROUP_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a file: use letters, digits, _ and -")
    if "manifest" in documents:
        raise ValueError("a document cannot be called 'manifest'")


def write_members(
    folder: Path,
    header: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    documents: Mapping[str, Any],
) -> None:
    """Writes every file of a checkpoint into an empty folder, the manifest last.

    Args:
        folder: An empty folder.
        header: What the manifest says besides its list of files.
        arrays: Groups of arrays; each becomes `<name>.safetensors`.
        documents: What JSON can hold; each becomes `<name>.json`.

    Raises:
        OSError: A file could not be written.
        TypeError: Something cannot be stored.
    """
    files = []
    for name, group in arrays.items():
        file = f"{name}.safetensors"
        size, checksum = write_arrays(folder / file, group)
        files.append({"name": file, "size": size, "sha256": checksum})
    for name, document in documents.items():
        file, data = f"{name}.json", _to_json(document, f"document {name!r}")
        write_file(folder / file, data)
        files.append({"name": file, "size": len(data), "sha256": _sha256(data)})
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "files": files}
    # Through JSON and back first: the checksum is of what a reader will see.
    manifest = json.loads(_to_json(manifest, "the manifest"))
    manifest["sha256"] = _manifest_sha256(manifest)
    write_file(folder / MANIFEST, _to_json(manifest, "the manifest", indent=2))
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest and checks all that can be checked without the other files.

    Raises:
        CheckpointError: It is missing, damaged, of another version or not to be trusted.
    """
    file = folder / MANIFEST
    with unreadable(file):
        if _regular_size(file) > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{file} is too large for a manifest")
        manifest = json.loads(file.read_bytes())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no manifest of a Starling checkpoint")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {manifest.get('format_version')} and this Starling reads "
            f"{FORMAT_VERSION}: load it with the Starling that wrote it"
        )
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise CheckpointError(f"{file} is damaged: its sha256 does not match")
    with unreadable(file):
        for key, kind in _MANIFEST_TYPES.items():
            if type(manifest[key]) is not kind:
                raise TypeError(f"{key} is a {type(manifest[key]).__name__}")
        manifest["not_included"] = [str(item) for item in manifest["not_included"]]
        names = [entry["name"] for entry in manifest["files"]]
        for name in names:
            if not _FILE_NAME.fullmatch(name) or name == MANIFEST or names.count(name) > 1:
                raise CheckpointError(f"{file} names {name!r}, which is no file of a checkpoint")
    return manifest


def read_members(
    folder: Path,
    manifest: Mapping[str, Any],
    without: Collection[str] = (),
    mapped: Collection[str] = (),
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Reads and verifies the files that a manifest lists.

    Args:
        folder: Where they lie.
        manifest: As `read_manifest` gave it.
        without: Groups of arrays that are not even looked at.
        mapped: Groups of arrays that are left in their files.

    Returns:
        The groups of arrays (writable, owned by the caller; those `mapped` are read-only views of
        files) and the documents, by name.

    Raises:
        CheckpointError: A file is missing, damaged or not what its name says; it is named.
    """
    arrays: dict[str, dict[str, np.ndarray]] = {}
    documents: dict[str, Any] = {}
    for entry in manifest["files"]:
        file = folder / entry["name"]
        if file.suffix == ".safetensors" and file.stem in without:
            continue
        with unreadable(file):
            if file.suffix == ".json":
                with _open_verified(file, entry) as stream:
                    documents[file.stem] = json.load(stream)
            else:
                arrays[file.stem] = _read_arrays(file, entry, file.stem in mapped)
    return arrays, documents


def write_file(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_arrays(path: Path, group: Mapping[str, np.ndarray]) -> tuple[int, str]:
    """Writes a group of arrays as safetensors, and waits until the disk has it.

    One array after the other: safetensors' own functions hold several copies of all of them, and a
    replay may take half of the memory.

    Returns:
        The file's size in bytes, and its sha256.

    Raises:
        TypeError: An array cannot be stored.
    """
    header, offset = {}, 0
    # As safetensors' own: the largest types first, so that all are aligned.
    items = sorted(group.items(), key=lambda item: (-np.asarray(item[1]).itemsize, item[0]))
    for key, array in items:
        array = np.asarray(array)
        name = _TYPE_NAMES.get(array.dtype.name)
        if name is None:
            raise TypeError(
                f"array {key!r} of {path.name} cannot be stored: its type is {array.dtype}"
            )
        offsets = [offset, offset := offset + array.nbytes]
        header[key] = {"dtype": name, "shape": array.shape, "data_offsets": offsets}
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    with open(path, "wb") as file:
        checksum = hashlib.sha256()
        for part in _parts(start, items):
            file.write(part)
            checksum.update(part)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(start) + offset, checksum.hexdigest()


def sync_folder(folder: Path) -> None:
    """Waits until the disk knows a folder's entries: renames and new files."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def unreadable(file: Path) -> Iterator[None]:
    """Turns whatever a damaged or hostile file causes into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        message = f"{file} cannot be read: {type(error).__name__}: {error}"
        raise CheckpointError(message) from error


def _parts(header: bytes, items: Sequence[tuple[str, np.ndarray]]) -> Iterator[Any]:
    """The bytes of a safetensors file, from its beginning."""
    yield len(header).to_bytes(8, "little")
    yield header
    for _, array in items:
        array = np.ascontiguousarray(array, np.asarray(array).dtype.newbyteorder("<"))
        yield array.reshape(-1).view(np.uint8)


def _dtype(name: str) -> np.dtype:
    if name == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_DTYPES[name])


def _to_json(document: Any, what: str, indent: int | None = None) -> bytes:
    # Documents have no indent: with one, Python's encoder is slow, and some are long.
    try:
        return (json.dumps(document, indent=indent, default=_plain) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} cannot be stored as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON; arrays belong in a group of arrays")


def _read_arrays(file: Path, entry: Mapping[str, Any], mapped: bool) -> dict[str, np.ndarray]:
    """The arrays in a file; `mapped`, as views of it that are read when they are used.

    Not by safetensors' own functions, which hold all of it, and know no bfloat16.
    """
    with _open_verified(file, entry) as stream:
        # Where a disk fails, reading is an error, but what it is mapped to ends the process.
        data = np.asarray(np.memmap(stream, np.uint8, "r")) if mapped else np.fromfile(stream, "u1")
    header = 8 + int.from_bytes(data[:8], "little")
    if header > len(data):
        raise CheckpointError(f"{file} claims a header of {header - 8} of its {len(data)} bytes")
    table, body = json.loads(data[8:header].tobytes()), data[header:]
    table.pop("__metadata__", None)
    views = {key: _view(key, told, body) for key, told in table.items()}
    return views if mapped else {key: np.array(view) for key, view in views.items()}


def _view(key: str, told: Mapping[str, Any], body: np.ndarray) -> np.ndarray:
    """One of a file's arrays, by what its header tells."""
    (begin, end), shape = told["data_offsets"], told["shape"]
    if not 0 <= begin <= end <= len(body) or min(shape, default=0) < 0:
        raise ValueError(f"array {key!r} is said to be {shape}, in bytes {begin} to {end}")
    return body[begin:end].view(_dtype(told["dtype"])).reshape(shape)


@contextlib.contextmanager
def _open_verified(file: Path, entry: Mapping[str, Any]) -> Iterator[BinaryIO]:
    """A file that has the size and the checksum of its entry, from its beginning."""
    size = _regular_size(file)
    if size != entry["size"]:
        raise CheckpointError(f"{file} is damaged: it has {size} bytes, not {entry['size']}")
    with open(file, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its sha256 does not match")
        stream.seek(0)
        yield stream


def _regular_size(file: Path) -> int:
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file} is no regular file")
    return status.st_size


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Checksum of a manifest's content, its own checksum apart."""
    return _sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
