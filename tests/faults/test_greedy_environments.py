"""Environments that take more of their process than they should."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import envs_for_tests as envs
import numpy as np
import pytest
from failing import run_to_fault, step
from leaks import ends_within

from starling.envs.process import ProcessVectorEnv
from starling.envs.safety import Safety
from starling.envs.serial import SerialVectorEnv
from starling.errors import UserError, WorkerDiedError, WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks", "no_pauses")]


@pytest.mark.timeout(120)  # up to six processes are started, one after the other
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_grows_is_replaced_and_its_episodes_are_cut(make, workers, caplog):
    vector = make(
        ProcessVectorEnv,
        [envs.LeakyEnv] * 2,
        num_workers=workers,
        safety=Safety(worker_max_rss=1e6),
    )
    vector.reset()
    limit = max(vector.worker_memory) + 50
    vector._recovery._most_memory = limit * 2**20
    lengths, largest = ([], []), 0.0
    for _ in range(20_000):
        vector._recovery._next_look = 0.0
        observations, rewards, _, truncated, infos = step(vector)
        largest = max(largest, *vector.worker_memory)
        np.testing.assert_array_equal(rewards, [1, 1])
        assert "valid" not in infos
        assert workers == 2 or truncated[0] == truncated[1]
        for i in np.flatnonzero(truncated):
            np.testing.assert_array_equal(observations[i], [1, 0])
            lengths[i].append(infos["final_obs"][i][1])
        if min(map(len, lengths)) == 2:
            break
    assert min(map(len, lengths)) == 2
    assert max(lengths[0] + lengths[1]) < 40 * workers
    assert largest < limit + 10
    cut = sum(map(len, lengths)) if workers == 2 else len(lengths[0])
    assert vector.faults == {"recycled_workers": cut}
    assert "another takes its place" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fault", [envs.boom, envs.kill_self])
@pytest.mark.parametrize("on_env_error", ["raise", "restart", "drop"])
def test_a_large_worker_that_cannot_be_replaced_at_once(make, fault, on_env_error, tmp_path):
    """The steps that led there are whole, whatever comes of it."""
    made, failed = tmp_path / "made", tmp_path / "failed"

    def new_env():
        if made.exists() and not failed.exists():
            failed.touch()
            fault()
        made.touch()
        return envs.LeakyEnv()

    vector = make(
        ProcessVectorEnv,
        [new_env, envs.CountingEnv],
        num_workers=2,
        safety=Safety(on_env_error, worker_max_rss=1e6),
    )
    vector.reset()
    vector._recovery._most_memory = vector._workers.memory_of(0) + (10 << 20)

    def step_until_it_is_too_large():
        for k in range(1, 1000):
            vector._recovery._next_look = 0.0
            result = step(vector)
            if vector.faults:
                return k, result
        return None

    if on_env_error == "raise":
        with pytest.raises(WorkerError, match=r"could not be made.*boom|signal 9"):
            step_until_it_is_too_large()
        return
    k, (observations, rewards, _, truncated, infos) = step_until_it_is_too_large()
    np.testing.assert_array_equal(rewards, [1, 1])
    assert truncated[0]
    assert "valid" not in infos
    np.testing.assert_array_equal(infos["final_obs"][0], [1, k])
    kind = "env_errors" if fault is envs.boom else "worker_deaths"
    then = "restarts" if on_env_error == "restart" else "dropped_envs"
    replaced = {"recycled_workers": 1} if on_env_error == "restart" else {}
    assert vector.faults == {kind: 1, then: 1, **replaced}
    if on_env_error == "restart":
        np.testing.assert_array_equal(observations[0], [1, 0])
    *_, infos = step(vector)
    assert ("valid" in infos) == (on_env_error == "drop")


@pytest.fixture
def small_group():
    """A control group whose processes may take 32 MB from when they join it."""
    folder = Path(f"/sys/fs/cgroup/memory/starling-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(32 << 20))
    except OSError as error:
        pytest.skip(f"control groups of memory (version 1) cannot be made here: {error}")
    yield folder
    folder.rmdir()


def test_a_worker_that_the_system_kills_for_want_of_memory_is_named(small_group):
    def take_all():
        (small_group / "cgroup.procs").write_text(str(os.getpid()))
        _ = [b"x" * (1 << 20) for _ in range(100)]

    said = r"^environment 1 was killed by signal 9 \(SIGKILL\), perhaps out of memory"
    with pytest.raises(WorkerDiedError, match=said):
        run_to_fault(take_all, "step")
    assert "oom_kill 1" in (small_group / "memory.oom_control").read_text()


def test_a_limit_that_no_worker_can_keep_is_refused():
    with pytest.raises(UserError, match=r"worker_max_rss is 5 MB, and a worker process takes \d+"):
        ProcessVectorEnv([envs.CountingEnv], safety=Safety(worker_max_rss=5))
    with pytest.raises(UserError, match="worker_max_rss needs worker processes"):
        SerialVectorEnv([envs.CountingEnv], safety=Safety(worker_max_rss=500))


def test_a_greedy_environment_harms_nobody():
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
import envs_for_tests as envs
from starling.envs.process import ProcessVectorEnv
here = os.getcwd()
vector = ProcessVectorEnv([envs.GreedyEnv] * 2, num_workers=2)
vector.reset()
for k in range(1, 5):
    assert vector.step([0, 0])[0].tolist() == [[1, k]] * 2
assert os.getcwd() == here
print(*(vector._workers.pid(w) for w in range(2)))
vector.close()
"""
    folder = os.path.dirname(envs.__file__)
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=True
    )
    printed = [line for line in done.stderr.splitlines() if "xxx" in line]
    assert {line.rstrip("x") for line in printed} == {
        f"[worker pid {pid}] " for pid in done.stdout.split()
    }
    assert len(printed) == 2 * 4 * 10


def test_what_an_environment_forks_ends_at_a_signal():
    def fork_and_end():
        codes = set()
        for _ in range(20):  # the signal comes before Python runs there, now and then
            forked = multiprocessing.get_context("fork").Process(target=signal.pause)
            forked.start()
            forked.terminate()
            forked.join()
            codes.add(forked.exitcode)
        raise RuntimeError(f"they ended with {codes}")

    with pytest.raises(WorkerError, match=rf"they ended with {{{-signal.SIGTERM}}}"):
        run_to_fault(fork_and_end, "step")


def test_a_copy_of_a_worker_neither_reads_requests_nor_answers(tmp_path):
    copy = tmp_path / "pid"
    vector = ProcessVectorEnv([functools.partial(envs.ForkingEnv, str(copy))])
    vector.reset()
    vector.step([0])
    assert not any(vector.get_attr("copied")[0] for _ in range(20))
    assert ends_within(int(copy.read_text()), 5)
    vector.close()
