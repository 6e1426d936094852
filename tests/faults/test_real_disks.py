"""Whole runs on file systems that fill up or become read-only, in mount namespaces of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from counters import metrics_of

from starling.storage.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces"),
]
ROWS = 4 * 16

# What a script does to its disk after the second and after the fourth of six iterations.
RUN = """
import logging, os, subprocess, sys
from pathlib import Path
from starling import ParallelPPO
from starling.storage.checkpoint import load_checkpoint

logging.basicConfig(format="%(levelname)s %(message)s")
folder, rows = Path(sys.argv[1]), int(sys.argv[2])

def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)

{script}

def change(it):
    if it.iteration == 2:
        damage(it.agent.run)
    if it.iteration == 4:
        assert load_checkpoint(it.agent.run).step == 2 * rows
        mend(it.agent.run)

settings = dict(num_envs=4, num_steps=16, mini_batch_size=64, epochs=1, preset="none", seed=0)
settings |= dict(backend="serial", tensorboard=False, log_interval=1, save_interval=1)
with ParallelPPO("CartPole-v1", **settings, log_dir=str(folder), run_name="run") as agent:
    try:
        print(agent.train(6 * rows, callbacks=change, quiet=True).status)
    finally:
        subprocess.run(["cp", "-r", agent.run, sys.argv[3]], check=True)
"""
TMPFS = """
mount("-t", "tmpfs", "-o", "size=2m", "none", folder)

def damage(run):
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 1024):
                pass
        except OSError:
            pass

def mend(run):
    (folder / "filler").unlink()
"""
READ_ONLY = """
def damage(run):
    checkpoints = run / "checkpoints"
    mount("--bind", checkpoints, checkpoints)
    mount("-o", "remount,bind,ro", checkpoints)

def mend(run):
    subprocess.run(["umount", run / "checkpoints"], check=MENDED) if MENDED else None
"""


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    mounting = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/tmp"]
    try:
        subprocess.run(mounting, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mount namespaces of one's own are not permitted here: {error}")


def run(script: str, tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What a run said, and a copy of its folder."""
    (tmp_path / "logs").mkdir()
    program, copy = RUN.format(script=script), tmp_path / "copy"
    words = [sys.executable, "-c", program, tmp_path / "logs", ROWS, copy]
    ended = subprocess.run(
        ["unshare", "-Urm", *map(str, words)], capture_output=True, text=True, check=False
    )
    return ended, copy


def failed_saves(run: Path) -> list[Any]:
    lines = metrics_of(run)
    return [(line["time/iterations"], line.get("faults/failed_saves")) for line in lines]


def test_a_file_system_that_is_full_for_a_while_costs_what_is_written_then(tmp_path):
    ended, copy = run(TMPFS, tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "completed\n"), ended.stderr
    told = ended.stderr.splitlines()
    errors = [line for line in told if line.startswith("ERROR")]
    assert [f"the checkpoint of step {n * ROWS} was not saved" in errors[n - 3] for n in (3, 4)]
    assert all("No space left on device; the ones before it are intact" in e for e in errors)
    assert len(errors) == 2
    assert sum("metrics.jsonl cannot be written" in line for line in told) <= 1
    assert failed_saves(copy)[-2:] == [(5, 2), (6, 2)]
    assert load_checkpoint(copy).step == 6 * ROWS


@pytest.mark.parametrize("mended", [True, False])
def test_a_folder_that_becomes_read_only_ends_no_run(tmp_path, mended):
    ended, copy = run(READ_ONLY.replace("MENDED", str(mended)), tmp_path)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    assert all("Read-only file system; the ones before it are intact" in e for e in errors)
    if mended:
        assert (ended.returncode, ended.stdout) == (0, "completed\n"), ended.stderr
        assert failed_saves(copy) == [(1, None), (2, None), (3, None), (4, 1), (5, 2), (6, 2)]
    else:
        assert "run is over (completed), but its last checkpoint could not be saved" in ended.stderr
        assert failed_saves(copy)[-1] == (6, 3)
    assert len(errors) == (2 if mended else 5)  # the last one is tried again
    assert load_checkpoint(copy).step == (6 if mended else 2) * ROWS
