"""Run folders: names that are never shared, settings that can be read back, one owner at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from starling.errors import CheckpointError, UserError
from starling.training.run_folder import (
    create_run_folder,
    lock_run,
    read_settings,
    versions,
    write_json,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_names_count_up_when_taken(tmp_path):
    made = [create_run_folder(tmp_path / "logs", "CartPole-v1", "ppo", 3) for _ in range(3)]
    assert [path.name for path in made] == [
        "CartPole-v1__ppo__s3",
        "CartPole-v1__ppo__s3__2",
        "CartPole-v1__ppo__s3__3",
    ]
    assert all(path.is_dir() for path in made)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ("ALE/Pong-v5", "ALE-Pong-v5"),
        ("my.module:make_env", "my.module-make_env"),
        ("../../etc", "etc"),
        ("<lambda> of me", "lambda-of-me"),
        ("..", "env"),
    ],
)
def test_environments_names_become_file_names(tmp_path, env, name):
    path = create_run_folder(tmp_path, env, "ppo", 0)
    assert path == tmp_path / f"{name}__ppo__s0"


def test_own_names(tmp_path):
    assert create_run_folder(tmp_path, "X", "ppo", 0, "mine").name == "mine"
    assert create_run_folder(tmp_path, "X", "ppo", 0, "mine").name == "mine__2"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "a\\b", "c:", "a\0b"])
def test_own_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(UserError, match="no plain folder name"):
        create_run_folder(tmp_path / "logs", "X", "ppo", 0, name)
    assert not (tmp_path / "logs").exists()


def test_many_at_once_get_one_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create_run_folder(tmp_path, "X", "ppo", 0), range(40)))
    assert len(set(made)) == 40


def test_a_log_dir_that_is_a_file(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to.*--log_dir"):
        create_run_folder(tmp_path / "logs", "X", "ppo", 0)


def test_a_log_dir_that_is_read_only(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere: no chmod would do
    with pytest.raises(UserError, match=r"Permission denied\).*--log_dir"):
        create_run_folder(tmp_path / "logs", "X", "ppo", 0)


def test_settings_are_read_back(tmp_path):
    write_json(tmp_path / "config.json", {"env": "X", "seed": np.int64(3), "path": tmp_path})
    assert read_settings(tmp_path) == {"env": "X", "seed": 3, "path": str(tmp_path)}


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run folder: it has no config\.json; give"):
        read_settings(tmp_path)
    with pytest.raises(CheckpointError, match="no run folder: there is no such folder"):
        read_settings(tmp_path / "gone")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_settings_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_settings(tmp_path)


def test_json_keeps_its_order_and_replaces_in_one_step(tmp_path):
    file = tmp_path / "result.json"
    write_json(file, {"b": 1, "a": 2})
    assert list(json.loads(file.read_text())) == ["b", "a"]
    before = file.read_bytes()
    circle: dict = {}
    circle["self"] = circle
    with pytest.raises(ValueError, match="Circular"):
        write_json(file, circle)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_versions_name_what_decides_results():
    found = versions()
    assert {"starling", "python", "jax", "numpy", "gymnasium", "flax", "optax"} <= found.keys()
    assert found["numpy"] == np.__version__


def test_one_owner_at_a_time(tmp_path):
    with lock_run(tmp_path), pytest.raises(UserError, match=r"in use by process .*stop it first"):
        lock_run(tmp_path)
    lock_run(tmp_path).close()


@pytest.mark.timeout(30)
def test_a_killed_owner_leaves_no_lock(tmp_path):
    code = (
        "import sys; from starling.training.run_folder import lock_run; "
        "lock = lock_run(sys.argv[1]); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"in use by process {owner.pid} on"):
            lock_run(tmp_path)
        owner.kill()
    assert owner.poll() is not None
    lock_run(tmp_path).close()
