"""What a checkpoint brings back, what it refuses, and what it keeps."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tracemalloc
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from starling.errors import CheckpointError
from starling.storage import checkpoint
from starling.storage.checkpoint import (
    flatten_tree,
    load_checkpoint,
    restore_tree,
    save_checkpoint,
)
from starling.storage.locks import lock_file

ARRAYS = {
    "parameters": {
        "layers/0/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
        "log_std": np.zeros((), np.float32),
    },
    "optimizer": {"count": np.array(7, np.int32), "nothing": np.zeros((0, 4), np.float64)},
}
DOCUMENTS = {"config": {"env": "CartPole-v1", "hidden_sizes": (64, 64)}, "spaces": [1, None]}


def save(folder: Path, step: int, value: float = 0.0, **options) -> Path:
    arrays = {"parameters": {"w": np.full(100, value, np.float32)}}
    return save_checkpoint(folder, step, arrays, {"config": {"step": step}}, {}, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def forge(checkpoint: Path, changes: dict, name: str | None = None, data: bytes = b"") -> None:
    """Rewrites a manifest, and one file, as an attacker would: with every checksum right."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_bytes())
    del manifest["sha256"]
    manifest.update(changes)
    if name is not None:
        (checkpoint / name).write_bytes(data)
        entry = next(entry for entry in manifest["files"] if entry["name"] == name)
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps(manifest))


# --- what comes back -------------------------------------------------------------------------


def test_round_trip(tmp_path):
    path = save_checkpoint(
        tmp_path,
        4096,
        ARRAYS,
        DOCUMENTS,
        {"iteration": np.int64(2), "episode": 31},
        not_included=["state of the environments"],
    )
    assert path == tmp_path / "step_000000004096"
    loaded = load_checkpoint(tmp_path)
    assert loaded.path == path
    assert loaded.step == 4096
    assert loaded.counters == {"iteration": 2, "episode": 31}
    assert loaded.not_included == ("state of the environments",)
    assert loaded.documents["config"] == {"env": "CartPole-v1", "hidden_sizes": [64, 64]}
    assert loaded.documents["spaces"] == [1, None]
    for group, arrays in ARRAYS.items():
        assert loaded.arrays[group].keys() == arrays.keys()
        for key, array in arrays.items():
            assert loaded.arrays[group][key].dtype == array.dtype
            np.testing.assert_array_equal(loaded.arrays[group][key], array)


@pytest.mark.parametrize(
    "dtype", [bool, "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
)
def test_dtypes_come_back(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    save_checkpoint(tmp_path, 0, {"a": {"x": array}}, {}, {})
    loaded = load_checkpoint(tmp_path).arrays["a"]["x"]
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


def test_bfloat16_comes_back(tmp_path):
    array = np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16)
    save_checkpoint(tmp_path, 0, {"a": {"x": array}}, {}, {})
    loaded = load_checkpoint(tmp_path, finite=["a"]).arrays["a"]["x"]
    assert loaded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("view", ["transposed", "strided", "reversed", "big-endian", "fortran"])
def test_arrays_of_any_layout_come_back(tmp_path, view):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    array = {
        "transposed": base.T,
        "strided": base[::2, ::3],
        "reversed": base[::-1],
        "big-endian": base.astype(">f4"),
        "fortran": np.asfortranarray(base),
    }[view]
    save_checkpoint(tmp_path, 0, {"a": {"x": array}}, {}, {})
    np.testing.assert_array_equal(load_checkpoint(tmp_path).arrays["a"]["x"], array)


def test_others_can_read_the_arrays(tmp_path):
    group = {
        "flags": np.array([True, False, True]),
        "a/b": np.arange(5, dtype=np.int64),
        "scalar": np.float32(3.5),
        "none": np.zeros((0, 4), np.float16),
        "ä": np.arange(3, dtype=np.uint8),
    }
    path = save_checkpoint(tmp_path, 0, {"a": group}, {}, {}) / "a.safetensors"
    assert set(load_file(path)) == set(group)
    for key, array in load_file(path).items():
        assert array.dtype == group[key].dtype
        np.testing.assert_array_equal(array, group[key])
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:][:size])
    aligned = [np.asarray(group[key]).itemsize for key in header]
    assert size % 8 == 0
    assert [header[key]["data_offsets"][0] % aligned[k] for k, key in enumerate(header)] == [0] * 5


def test_saving_takes_no_second_copy(tmp_path):
    group = {str(i): np.zeros(2**20) for i in range(4)}  # 8 MB each
    save_checkpoint(tmp_path, 0, {"a": group}, {}, {})  # imports what it needs
    tracemalloc.start()
    try:
        save_checkpoint(tmp_path, 1, {"a": group}, {}, {})
        assert tracemalloc.get_traced_memory()[1] < 2**20
        save_checkpoint(tmp_path, 2, {"a": {"x": np.zeros(2**18)[::-1]}}, {}, {})
        assert tracemalloc.get_traced_memory()[1] > 2**20  # which it would have noticed
    finally:
        tracemalloc.stop()


def test_what_is_not_wanted_is_not_looked_at(tmp_path):
    path = save(tmp_path, 1)
    (path / "parameters.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"parameters\.safetensors is damaged"):
        load_checkpoint(tmp_path)
    loaded = load_checkpoint(tmp_path, without=["parameters"])
    assert "parameters" not in loaded.arrays
    assert loaded.step == 1


def test_what_is_mapped_stays_in_its_file(tmp_path):
    save_checkpoint(tmp_path, 1, ARRAYS, DOCUMENTS, {})
    loaded = load_checkpoint(tmp_path, mapped=["parameters"])
    for group, arrays in ARRAYS.items():
        for key, array in arrays.items():
            found = loaded.arrays[group][key]
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
            assert found.flags.writeable == (group == "optimizer")
    save(tmp_path, 1)  # and outlives it
    np.testing.assert_array_equal(
        loaded.arrays["parameters"]["layers/0/kernel"], ARRAYS["parameters"]["layers/0/kernel"]
    )
    flip_a_bit(tmp_path / "step_000000000001" / "parameters.safetensors")
    with pytest.raises(CheckpointError, match=r"parameters\.safetensors is damaged"):
        load_checkpoint(tmp_path, mapped=["parameters"])


def test_loaded_arrays_can_be_written(tmp_path):
    save(tmp_path, 1)
    load_checkpoint(tmp_path).arrays["parameters"]["w"] += 1


def test_exact_numbers_in_documents(tmp_path):
    state = {"big": 2**127 + 1, "float": 0.1, "numpy": np.float32(0.1), "inf": float("-inf")}
    save_checkpoint(tmp_path, 0, {}, {"random": state}, {})
    assert load_checkpoint(tmp_path).documents["random"] == state


# --- which one is read -----------------------------------------------------------------------


def test_run_folder_checkpoints_folder_and_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    first, second = save(folder, 100), save(folder, 200)
    assert load_checkpoint(tmp_path / "run").path == second
    assert load_checkpoint(folder).path == second
    assert load_checkpoint(first).path == first
    renamed = first.rename(tmp_path / "mine")
    assert load_checkpoint(renamed).step == 100


def test_latest_and_best(tmp_path):
    save(tmp_path, 100)
    best = save(tmp_path, 200, best=True)
    newest = save(tmp_path, 300)
    assert load_checkpoint(tmp_path, which="latest").path == newest
    assert load_checkpoint(tmp_path, which="best").path == best
    assert (tmp_path / "latest").read_text().strip() == newest.name
    assert (tmp_path / "best").read_text().strip() == best.name


def test_the_best_saved_again_at_its_step_is_still_the_best(tmp_path):
    save(tmp_path, 1, best=True)
    save(tmp_path, 2, best=True)
    save(tmp_path, 2, value=5.0)
    assert load_checkpoint(tmp_path, which="best").arrays["parameters"]["w"][0] == 5.0
    save(tmp_path, 3)
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == {"step_000000000002", "step_000000000004", "latest", "best"}


def test_newest_is_the_last_saved_not_the_highest_step(tmp_path):
    save(tmp_path, 10_000)
    save(tmp_path, 500)
    assert load_checkpoint(tmp_path).step == 500


def test_old_ones_go_and_the_best_stays(tmp_path):
    save(tmp_path, 0, best=True)
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == {
        "step_000000000000",
        "step_000000000004",
        "step_000000000005",
        "latest",
        "best",
    }


def test_a_second_checkpoint_of_one_step_replaces_the_first(tmp_path):
    save(tmp_path, 7, value=1.0)
    save(tmp_path, 7, value=2.0)
    assert names(tmp_path) == {"step_000000000007", "latest"}
    assert load_checkpoint(tmp_path).arrays["parameters"]["w"][0] == 2.0


def test_the_replaced_one_is_found_when_the_swap_was_cut_short(tmp_path):
    save(tmp_path, 7).rename(tmp_path / "step_000000000007.replaced")
    assert load_checkpoint(tmp_path).step == 7
    save(tmp_path, 7)
    assert names(tmp_path) == {"step_000000000007", "latest"}


def test_what_a_dead_writer_left_is_never_read_and_cleaned_up(tmp_path):
    left = save(tmp_path, 5).rename(tmp_path / ".tmp-step_000000000005")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    save(tmp_path, 6)
    assert not left.exists()


def test_two_writers_at_once(tmp_path):
    save(tmp_path, 1)
    with (
        lock_file(tmp_path / ".lock"),
        pytest.raises(OSError, match=f"in use by process {os.getpid()} .* are intact"),
    ):
        save(tmp_path, 2)
    assert load_checkpoint(tmp_path).step == 1
    save(tmp_path, 2)


@pytest.mark.parametrize("which", ["latest", "best"])
def test_nothing_there(tmp_path, which):
    with pytest.raises(CheckpointError, match="holds no"):
        load_checkpoint(tmp_path, which=which)
    with pytest.raises(CheckpointError, match="is no folder"):
        load_checkpoint(tmp_path / "gone", which=which)


# --- what cannot be saved --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../evil", "/evil", "a/b", ".hidden", "a.b", "a\n"])
def test_names_that_are_no_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a file"):
        save_checkpoint(tmp_path / "c", 0, {name: {}}, {}, {})
    with pytest.raises(ValueError, match="cannot name a file"):
        save_checkpoint(tmp_path / "c", 0, {}, {name: {}}, {})
    assert not (tmp_path / "c").exists()


def test_a_document_cannot_be_the_manifest(tmp_path):
    with pytest.raises(ValueError, match="manifest"):
        save_checkpoint(tmp_path, 0, {}, {"manifest": {}}, {})


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["text"])])
def test_objects_are_not_arrays(tmp_path, array):
    save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"array 'x' of a\.safetensors .* its type is (object|<U4)"):
        save_checkpoint(tmp_path, 2, {"a": {"x": array}}, {}, {})
    assert names(tmp_path) == {"step_000000000001", "latest"}


def test_arrays_are_not_documents(tmp_path):
    with pytest.raises(TypeError, match=r"document 'd'.*ndarray is not JSON"):
        save_checkpoint(tmp_path, 2, {}, {"d": {"x": np.zeros(3)}}, {})


def test_negative_step(tmp_path):
    with pytest.raises(ValueError, match="at least 0"):
        save(tmp_path, -1)


# --- damage ----------------------------------------------------------------------------------

MEMBERS = ["manifest.json", "parameters.safetensors", "optimizer.safetensors", "config.json"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "bit flipped": flip_a_bit,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a link": lambda file: (file.rename(file.parent.parent / "away"), file.symlink_to("../away")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("member", MEMBERS)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, member, damage):
    good = save_checkpoint(tmp_path, 1, ARRAYS, DOCUMENTS, {})
    bad = save_checkpoint(tmp_path, 2, ARRAYS, DOCUMENTS, {})
    DAMAGE[damage](bad / member)

    with pytest.raises(CheckpointError, match=str(bad / member)):
        load_checkpoint(bad)
    with pytest.warns(RuntimeWarning, match=f"skipped damaged.*{bad / member}"):
        assert load_checkpoint(tmp_path).path == good


def test_no_bit_of_a_checkpoint_can_flip_unnoticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, ARRAYS, DOCUMENTS, {"episode": 3})
    whole = load_checkpoint(path)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for position in range(0, len(data), 7):
            flipped = bytearray(data)
            flipped[position] ^= 1 << (position % 8)
            file.write_bytes(flipped)
            try:
                loaded = load_checkpoint(path)
            except CheckpointError:
                continue
            # White space between the manifest's words may change: its content may not.
            assert file.name == "manifest.json"
            assert (loaded.step, loaded.counters) == (whole.step, whole.counters)
        file.write_bytes(data)


def test_an_empty_checkpoint_folder(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000000000002").mkdir()
    with pytest.warns(RuntimeWarning, match="step_000000000002/manifest.json is missing"):
        assert load_checkpoint(tmp_path).step == 1


def test_all_damaged_is_an_error_never_a_fresh_start(tmp_path):
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step) / "parameters.safetensors")
    with pytest.raises(CheckpointError, match=r"undamaged.*step_000000000002.*step_000000000001"):
        load_checkpoint(tmp_path)


def test_a_damaged_best_is_an_error(tmp_path):
    flip_a_bit(save(tmp_path, 1, best=True) / "config.json")
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"step_000000000001/config\.json is damaged"):
        load_checkpoint(tmp_path, which="best")


def test_saving_goes_on_beside_a_damaged_one(tmp_path):
    flip_a_bit(save(tmp_path, 1) / "manifest.json")
    save(tmp_path, 2)
    save(tmp_path, 1, value=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path).arrays["parameters"]["w"][0] == 3.0


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_versions_are_refused(tmp_path, version):
    path = save(tmp_path, 1)
    forge(path, {"format_version": version})
    with pytest.raises(CheckpointError, match=f"format version {version}"):
        load_checkpoint(path)


# --- malice ----------------------------------------------------------------------------------


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("protocol", [0, 5])
def test_pickles_are_never_run(tmp_path, member, protocol):
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary), protocol)
    pickle.loads(payload).close()
    assert canary.exists()  # the payload works
    canary.unlink()

    path = save_checkpoint(tmp_path / "c", 1, ARRAYS, DOCUMENTS, {})
    if member == "manifest.json":
        (path / member).write_bytes(payload)
    else:
        forge(path, {}, member, payload)
    with pytest.raises(CheckpointError, match=member):
        load_checkpoint(path)
    assert not canary.exists()


def test_extra_files_are_not_opened(tmp_path):
    path = save(tmp_path, 1)
    os.mkfifo(path / "extra.safetensors")  # reading it would block for ever
    assert load_checkpoint(path).arrays.keys() == {"parameters"}


@pytest.mark.parametrize(
    "name",
    ["../secret.json", "/etc/passwd", "a/../b.json", "..", "", "x.pkl", "manifest.json", 3, None],
)
def test_names_that_lead_elsewhere(tmp_path, name):
    (tmp_path / "secret.json").write_text("{}")
    path = save(tmp_path, 1)
    secret = hashlib.sha256(b"{}").hexdigest()
    forge(path, {"files": [{"name": name, "size": 2, "sha256": secret}]})
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "1"},
        {"step": True},
        {"counters": []},
        {"files": {}},
        {"files": [1]},
        {"files": [{}]},
        {"files": [{"name": "config.json"}]},
        {"not_included": 3},
        {"sequence": None},
        {"best": "yes"},
    ],
)
def test_manifests_of_other_types(tmp_path, changes):
    path = save(tmp_path, 1)
    forge(path, changes)
    with pytest.raises(CheckpointError, match=r"\.json cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("header", [10 * 2**30, 2**64 - 1, 50])
def test_headers_that_exceed_the_file(tmp_path, header):
    path = save(tmp_path, 1)
    forge(path, {}, "parameters.safetensors", header.to_bytes(8, "little") + b'{"x":{}}')
    with pytest.raises(CheckpointError, match=f"claims a header of {header} "):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "table",
    [
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**40]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
        {"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 3]}},
        {"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"x": 1},
        [1],
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    ],
)
def test_tensor_tables_that_lie(tmp_path, table):
    path = save(tmp_path, 1)
    header = json.dumps(table).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0" * 4
    forge(path, {}, "parameters.safetensors", data)
    with pytest.raises(CheckpointError, match=r"parameters\.safetensors cannot be read"):
        load_checkpoint(path)


def test_deeply_nested_json(tmp_path):
    path = save(tmp_path, 1)
    forge(path, {}, "config.json", b"[" * 1_000_000)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite(tmp_path, value):
    save(tmp_path, 1)
    path = save(tmp_path, 2, value=value)
    assert load_checkpoint(path).step == 2
    with pytest.raises(CheckpointError, match="NaN or inf"):
        load_checkpoint(path, finite=["parameters"])
    with pytest.warns(RuntimeWarning, match="NaN or inf"):
        assert load_checkpoint(tmp_path, finite=["parameters"]).step == 1


# --- trees -----------------------------------------------------------------------------------


def tree(width: int = 4) -> dict:
    import jax.numpy as jnp

    return {"layers": [{"kernel": jnp.ones((3, width))}, {"kernel": jnp.zeros(width)}], "n": 3}


def test_trees_go_through_a_checkpoint(tmp_path):
    import jax

    save_checkpoint(tmp_path, 0, {"parameters": flatten_tree(tree())}, {}, {})
    loaded = load_checkpoint(tmp_path).arrays["parameters"]
    assert set(loaded) == {"layers/0/kernel", "layers/1/kernel", "n"}
    restored = restore_tree(tree(), loaded)
    jax.tree.map(np.testing.assert_array_equal, restored, tree())


def test_flat_arrays_are_copies():
    import jax

    array = jax.numpy.zeros(3)
    flat = flatten_tree({"a": array})
    flat["a"] += 1
    np.testing.assert_array_equal(array, np.zeros(3))


def test_templates_of_shapes_only():
    import jax

    layers = tree()["layers"]
    shapes = jax.eval_shape(lambda: layers)
    restored = restore_tree(shapes, flatten_tree(layers))
    np.testing.assert_array_equal(restored[0]["kernel"], np.ones((3, 4)))


def test_what_does_not_fit_is_listed_with_both_sides():
    saved = flatten_tree({**tree(4), "old": 1.0})
    template = {**tree(5), "new": np.zeros(2, np.float32)}
    with pytest.raises(CheckpointError) as error:
        restore_tree(template, saved, "the policy in logs/x")
    assert str(error.value) == (
        "the policy in logs/x does not fit: old is only in the checkpoint; "
        "layers/0/kernel is float32[3, 4] in the checkpoint and float32[3, 5] here; "
        "layers/1/kernel is float32[4] in the checkpoint and float32[5] here; "
        "new is not in the checkpoint"
    )


def test_dtypes_have_to_fit():
    with pytest.raises(CheckpointError, match=r"a is float64\[2\].*float32\[2\] here"):
        restore_tree({"a": np.zeros(2, np.float32)}, {"a": np.zeros(2)})


def test_long_lists_of_differences_are_cut():
    with pytest.raises(CheckpointError, match=r"and 15 more$"):
        restore_tree({}, {f"k{i}": np.zeros(1) for i in range(25)})


@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_damaged(
    tmp_path, monkeypatch, which
):
    """As by whoever scores the newest one while the run goes on."""
    save(tmp_path, 1, keep_last=1, best=True)
    read, values = checkpoint.read_members, iter([1.0, 2.0])

    def read_late(*arguments):
        if value := next(values, None):
            save(tmp_path, 2, value, keep_last=1, best=True)
        return read(*arguments)

    monkeypatch.setattr(checkpoint, "read_members", read_late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path, which=which).arrays["parameters"]["w"][0] == 2.0
