"""Checkpoints under `kill -9` and on a full disk: the newest good one can always be loaded."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from measured import record
from replay_records import contents, torn

from starling.storage.checkpoint import Checkpoint, load_checkpoint
from starling.storage.replay import Replay

pytestmark = pytest.mark.usefixtures("no_leaks")

# Saves steps 1, 2, 3 ... and says so after each; every array holds its step.
WRITER = """
import sys, numpy as np
from starling.storage.checkpoint import save_checkpoint
folder, first = sys.argv[1], int(sys.argv[2])
for step in range(first, first + 100_000):
    arrays = {name: {"w": np.full(20_000, step, np.float32)} for name in ("policy", "optimizer")}
    save_checkpoint(folder, step, arrays, {"config": {"step": step}}, {"iteration": step},
                    keep_last=2, best=step % 5 == 0)
    print(step, flush=True)
"""

# The same of a replay: each save holds one rollout more, from where the newest checkpoint ends.
REPLAY_WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from replay_records import rollout
from starling.storage.checkpoint import load_checkpoint, save_checkpoint
from starling.storage.replay import Replay
replay, first = Replay({capacity}, {envs}), int(sys.argv[3])
if first > 1:
    replay.restore(load_checkpoint(sys.argv[1]).arrays["replay"])
for step in range(first, first + 100_000):
    replay.add(rollout(0, step - 1, {steps}, {envs}))
    save_checkpoint(sys.argv[1], step, {{"replay": replay.state()}}, {{}}, {{}}, keep_last=2)
    print(step, flush=True)
"""
CAPACITY, ENVS, STEPS = 12_000, 5, 200

# Forks a process for every event (open, rename, mkdir, unlink ...) of one save, and has it
# killed right before that event. The save replaces a checkpoint and discards another.
KILLED_AT_EVERY_EVENT = """
import os, signal, sys, numpy as np
from starling.storage.checkpoint import load_checkpoint, save_checkpoint

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")

def save(folder, step, value):
    arrays = {"policy": {"w": np.full(1000, value)}}
    save_checkpoint(folder, step, arrays, {"config": {}}, {}, keep_last=2, best=True)

def save_until(event, folder):
    seen = 0
    def count(name, arguments):
        nonlocal seen
        if name in EVENTS and folder in str(arguments[0]):
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(count)
    save(folder, 3, 3.5)
    os._exit(0)

event = 0
while True:
    folder = f"{sys.argv[1]}/{event}"
    for step in (1, 2, 3):
        save(folder, step, float(step))
    child = os.fork()
    if child == 0:
        save_until(event, folder)
    status = os.waitpid(child, 0)[1]
    found = load_checkpoint(folder).arrays["policy"]["w"]
    assert found[0] in (3.0, 3.5) and (found == found[0]).all(), (event, found)
    assert load_checkpoint(folder, which="best").step == 3, event
    save(folder, 4, 4.0)
    assert load_checkpoint(folder).arrays["policy"]["w"][0] == 4.0, event
    leftovers = [name for name in os.listdir(folder) if name.startswith(".tmp") or "repl" in name]
    assert not leftovers, (event, leftovers)
    if status == 0:
        break
    event += 1
print(event, found[0])
"""

# Files of at most 64 KB stand for a disk that is full.
FULL_DISK = """
import os, resource, sys, numpy as np
from starling.storage.checkpoint import load_checkpoint, save_checkpoint

def save(step):
    save_checkpoint(sys.argv[1], step, {"policy": {"w": np.zeros(100_000)}}, {}, {})

save(1)
before = sorted(os.listdir(sys.argv[1]))
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, unlimited[1]))
try:
    save(2)
except OSError as error:
    print(error)
assert sorted(os.listdir(sys.argv[1])) == before
assert load_checkpoint(sys.argv[1]).step == 1
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
save(2)
assert load_checkpoint(sys.argv[1]).step == 2
"""


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def killed(
    moments: random.Random,
    script: str,
    folder: Path,
    *arguments: object,
    finite: Sequence[str] = (),
) -> tuple[int, Checkpoint]:
    """Kills a script that saves and says so; the last that it said, and the newest checkpoint."""
    command = [sys.executable, "-c", script, folder, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        for _ in range(moments.randrange(1, 4)):
            saved = int(writer.stdout.readline())
        time.sleep(moments.uniform(0, 0.01))  # the moment is what is tested
        writer.kill()
        said = writer.stdout.read().split()  # saves that ended before the signal came
    saved = int(said[-1]) if said else saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that was left behind may look damaged
        checkpoint = load_checkpoint(folder, finite=finite)
    assert saved <= checkpoint.step <= saved + 1
    return saved, checkpoint


def at_moments(few: int) -> pytest.MarkDecorator:
    """Few of them in the fast tests, 200 in the slow ones."""
    slow = [pytest.mark.slow, pytest.mark.timeout(1200)]
    moments = [pytest.param(few, marks=pytest.mark.timeout(120)), pytest.param(200, marks=slow)]
    return pytest.mark.parametrize("kills", moments)


@at_moments(20)
def test_killed_at_random_moments(tmp_path, kills):
    moments = random.Random(kills)
    newest = 0
    for _ in range(kills):
        saved, checkpoint = killed(moments, WRITER, tmp_path, newest + 1, finite=["policy"])
        for group in ("policy", "optimizer"):
            assert (checkpoint.arrays[group]["w"] == checkpoint.step).all()
        assert checkpoint.documents["config"] == {"step": checkpoint.step}
        if checkpoint.step > 5:
            assert load_checkpoint(tmp_path, which="best").step >= saved - saved % 5
        newest = checkpoint.step
    assert newest >= kills
    record("checkpoints", kills=kills)


@at_moments(10)
def test_a_replay_that_is_killed_at_random_moments_goes_on(tmp_path, kills):
    """What is in it stands in there once and whole, however often it was killed."""
    script = REPLAY_WRITER.format(capacity=CAPACITY, envs=ENVS, steps=STEPS)
    moments, tests = random.Random(kills), Path(__file__).parents[1]
    newest = 0
    for _ in range(kills):
        _, checkpoint = killed(moments, script, tmp_path, tests, newest + 1)
        newest, state = checkpoint.step, checkpoint.arrays["replay"]
        replay = Replay(CAPACITY, ENVS)
        replay.restore(dict(state))
        rows = newest * STEPS * ENVS
        assert replay.inserted == rows
        assert len(replay) == min(rows, CAPACITY)
        assert torn(replay.sample(100, 10)) == 0
        found = contents(state)
        for env in range(ENVS):
            steps = np.sort(found[found[:, 1] == env][:, 2])
            np.testing.assert_array_equal(steps, np.arange(newest * STEPS)[-CAPACITY // ENVS :])
    assert newest >= kills
    record("replays", kills=kills)


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_every_single_event(tmp_path):
    events, value = run(KILLED_AT_EVERY_EVENT, tmp_path).split()
    assert int(events) > 15
    assert float(value) == 3.5  # the last one was not killed


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_full_disk(tmp_path):
    said = run(FULL_DISK, tmp_path)
    assert f"the checkpoint of step 2 was not saved in {tmp_path}: File too large" in said
    assert "the ones before it are intact" in said


@pytest.mark.timeout(60)
def test_an_interrupt_while_saving_leaves_no_traces(tmp_path, monkeypatch):
    from starling.storage import checkpoint

    checkpoint.save_checkpoint(tmp_path, 1, {}, {"config": {}}, {})
    before = sorted(os.listdir(tmp_path))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_members", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, 2, {}, {"config": {}}, {})
    assert sorted(os.listdir(tmp_path)) == before
