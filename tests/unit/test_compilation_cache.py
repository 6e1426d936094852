"""Compiled programs that are kept for the next process, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
import jax
from starling.training.compilation_cache import keep_compiled_programs
keep_compiled_programs()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[1])):
    assert jax.jit(lambda x: x * 3 + i)(2) == 6 + i
print(sum(event.endswith("cache_hits") for event in hits))
"""


def start(cache: Path, programs: int, **environment: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(programs)],
        env={**kept, "XDG_CACHE_HOME": str(cache), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hits_of(*processes: subprocess.Popen[str]) -> list[int]:
    """Lets processes begin at the same time; how many programs each found in the cache."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    results = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        results.append(int(out))
    return results


@pytest.mark.timeout(120)
def test_programs_are_found_by_the_next_process_and_many_may_write_at_once(tmp_path):
    hits_of(*(start(tmp_path, 5) for _ in range(3)))
    assert list((tmp_path / "starling" / "jax").glob("*-cache"))
    assert hits_of(start(tmp_path, 5))[0] >= 5


@pytest.mark.timeout(60)
def test_a_folder_of_the_users_is_used(tmp_path):
    own = tmp_path / "own"
    hits_of(start(tmp_path, 1, JAX_COMPILATION_CACHE_DIR=str(own)))
    assert not (tmp_path / "starling").exists()


@pytest.mark.timeout(60)
def test_a_cache_folder_that_cannot_be_made_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    assert hits_of(start(tmp_path / "file", 1)) == [0]


@pytest.mark.timeout(60)
def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    hits_of(start(tmp_path, 2))
    folder = tmp_path / "starling" / "jax"
    for program in folder.glob("*-cache"):
        program.write_bytes(program.read_bytes()[:100])
        (folder / (program.name.removesuffix("-cache") + "-atime")).unlink()
    assert hits_of(start(tmp_path, 2)) == [0]  # where warnings are errors
    assert hits_of(start(tmp_path, 2))[0] >= 2
