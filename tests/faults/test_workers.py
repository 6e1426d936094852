"""Environments that fail or die, and parents that do: no hang, no orphan, no stale answer."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading

import envs_for_tests as envs
import numpy as np
import pytest
from failing import ALL, run_to_fault, steps, with_fault
from leaks import children, ends_within

from starling.envs.process import ProcessVectorEnv
from starling.envs.seeding import child_seeds
from starling.envs.serial import SerialVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.envs.worker_process import WorkerProcess
from starling.errors import WorkerDiedError, WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]


# ---- environments that raise


@ALL
def test_an_exception_in_step_is_reported_in_full(backend):
    vector = backend(with_fault(envs.boom), num_workers=3, seed=4)
    vector.reset()
    steps(vector, 2)
    seed = vector.get_attr("seed_used")[1]
    with pytest.raises(
        WorkerError, match=r"environment 1 failed in step.*ValueError: boom"
    ) as info:
        steps(vector, 1)
    error = info.value
    pids = {worker.process.pid for worker in getattr(vector._workers, "_crew", [])}
    assert error.pid in (pids or {os.getpid()})
    assert (error.env_index, error.seed, error.step) == (1, seed, 3)
    assert "in boom" in error.original_traceback
    assert "envs_for_tests.py" in str(error)
    vector.close()


@ALL
def test_after_an_exception_a_reset_goes_on(backend):
    vector = backend(with_fault(envs.boom), num_workers=3)
    vector.reset()
    steps(vector, 2)
    with pytest.raises(WorkerError, match="boom"):
        steps(vector, 1)
    with pytest.raises(WorkerError, match="an environment failed; call reset"):
        steps(vector, 1)
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations, [[2, 0], [2, 0], [2, 0]])
    observations, *_ = vector.step([0, 0, 0])
    np.testing.assert_array_equal(observations, [[2, 1], [2, 1], [2, 1]])
    vector.close()


@ALL
@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_exit_is_an_exception(backend, where):
    vector = backend(with_fault(functools.partial(sys.exit, 3), where))
    with pytest.raises(WorkerError, match=f"environment 1 failed in {where}.*SystemExit: 3"):
        [vector.reset(), steps(vector, 3)]
    vector.close()


@ALL
@pytest.mark.parametrize("where", ["reset", "step"])
def test_what_is_no_ordinary_exception_is_reported_too(backend, where):
    vector = backend(with_fault(envs.cancelled, where), num_workers=3)
    with pytest.raises(
        WorkerError, match=f"environment 1 failed in {where}.*CancelledError"
    ) as info:
        [vector.reset(), steps(vector, 3)]
    assert "in cancelled" in info.value.original_traceback
    if where == "step":
        observations, _ = vector.reset()
        np.testing.assert_array_equal(observations, [[2, 0], [2, 0], [2, 0]])
    vector.close()


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_an_interrupt_in_a_worker_is_reported(backend):
    vector = backend(with_fault(envs.interrupted), num_workers=3)
    vector.reset()
    with pytest.raises(WorkerError, match=r"failed in step.*KeyboardInterrupt") as info:
        steps(vector, 3)
    assert "in interrupted" in info.value.original_traceback
    assert (info.value.env_index, info.value.step) == (1, 3)
    vector.close()


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("not this either")


@ALL
def test_an_exception_that_cannot_say_anything_is_reported(backend):
    def fail():
        raise Unspeakable

    vector = backend(with_fault(fail), num_workers=3)
    vector.reset()
    with pytest.raises(WorkerError, match=r"environment 1 failed .*Unspeakable: \(what it says"):
        steps(vector, 3)
    vector.close()


def test_an_exception_that_says_too_much_is_cut_short():
    """A state of 50 MB in a message would go through a pipe, to the terminal and into logs."""

    def fail():
        raise ValueError(f"first words {'x' * 1_000_000} last words")

    vector = SerialVectorEnv(with_fault(fail))
    vector.reset()
    with pytest.raises(WorkerError) as info:
        steps(vector, 3)
    for text in (str(info.value).partition("\n")[0], info.value.original_traceback):
        assert len(text) < 60_000
        assert "first words" in text
        assert text.endswith("last words")
        assert "characters left out" in text
    assert "in fail" in info.value.original_traceback
    vector.close()


def test_an_interrupt_in_the_callers_own_thread_is_passed_on(interruptible):
    vector = SerialVectorEnv(with_fault(envs.interrupted))
    vector.reset()
    with pytest.raises(KeyboardInterrupt):
        steps(vector, 3)
    vector.close()


@ALL
def test_a_reset_that_fails_one_step_after_the_end_is_named(backend):
    class OneEpisode(envs.CountingEnv):
        def reset(self, **kwargs):
            if self.episodes:
                raise ValueError("no second one")
            return super().reset(**kwargs)

    factories = [envs.CountingEnv, lambda: OneEpisode(length=1)]
    vector = backend(factories, num_workers=2, autoreset_mode="NextStep")
    vector.reset()
    steps(vector, 1)
    with pytest.raises(WorkerError, match=r"environment 1 failed in reset.*no second one"):
        steps(vector, 1)
    vector.close()


@ALL
def test_an_exception_in_reset_repeats_and_close_works(backend):
    vector = backend(with_fault(envs.boom, "reset"))
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"environment 1 failed in reset.*boom"):
            vector.reset()
    vector.close()


@ALL
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("fault", "shown"), [(envs.boom, "boom"), (envs.cancelled, "CancelledError")]
)
def test_an_exception_in_a_constructor_fails_the_start(backend, workers, fault, shown):
    with pytest.raises(WorkerError, match=f"environment 1 could not be made.*{shown}") as info:
        backend(with_fault(fault, "constructor"), num_workers=workers)
    assert info.value.env_index == 1


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_what_cannot_be_described_fails_the_start(backend):
    closed = []

    class WithoutMetadata(envs.CountingEnv):
        metadata = None

        def close(self):
            closed.append(True)

    with pytest.raises(WorkerError, match="could not start: TypeError"):
        backend([envs.CountingEnv, WithoutMetadata], num_workers=2)
    assert closed or backend is ProcessVectorEnv  # whose worker has a list of its own


def test_an_answer_outlives_the_worker_that_gave_it():
    """Environment 1's worker fails and is gone while that of environment 0 is still busy."""

    def never_made():
        threading.Event().wait()

    def broken():
        raise ValueError("boom")

    with pytest.raises(WorkerError, match=r"environment 1 could not be made.*boom"):
        ProcessVectorEnv([never_made, broken], num_workers=2)


@ALL
@pytest.mark.parametrize("fault", [envs.boom, envs.cancelled])
def test_an_exception_in_close_concerns_nobody(backend, fault):
    vector = backend(with_fault(fault, "close"))
    vector.reset()
    vector.close()


# ---- workers that die


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
def test_a_killed_worker_is_noticed_and_named(where, tmp_path):
    last_words = tmp_path / "pid"

    def die():
        last_words.write_text(str(os.getpid()))
        envs.kill_self()

    with pytest.raises(WorkerDiedError, match=r"signal 9 \(SIGKILL\), perhaps out of mem") as info:
        run_to_fault(die, where, seed=4)
    error = info.value
    assert error.env_index == 1
    assert error.pid == int(last_words.read_text())
    assert error.seed == (None if where == "constructor" else child_seeds(4, 3)[1])
    assert error.step == (3 if where == "step" else 0)
    assert f"(worker pid {error.pid}, seed {error.seed}, step {error.step})" in str(error)
    if where == "step":
        assert str(error).startswith("environment 1 was killed")


def test_death_ends_the_other_workers_and_every_use_repeats_it():
    others = children()  # what an earlier test has started, such as a library's resource tracker
    vector = ProcessVectorEnv(with_fault(envs.kill_self), num_workers=3)
    vector.reset()
    steps(vector, 2)
    workers = children() - others
    assert len(workers) == 3
    with pytest.raises(WorkerDiedError):
        steps(vector, 1)
    assert not workers & children()
    for use in (vector.reset, vector.recv, lambda: vector.step([0, 0, 0]), vector.render):
        with pytest.raises(WorkerError, match=r"no longer be used.*signal 9"):
            use()
    vector.close()


def test_a_worker_killed_while_idle_is_noticed_at_the_next_step():
    vector = ProcessVectorEnv([envs.CountingEnv] * 2, num_workers=2, seed=4)
    vector.reset()
    steps(vector, 1)
    victim, seed = vector._workers._crew[1].process, child_seeds(4, 2)[1]
    os.kill(victim.pid, signal.SIGKILL)
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerDiedError, match=r"environment.* 1 .*signal 9") as info:
        steps(vector, 1)
    assert (info.value.env_index, info.value.pid, info.value.seed) == (1, victim.pid, seed)
    assert f"(worker pid {victim.pid}, seed {seed}, step " in str(info.value)
    vector.close()


def test_death_is_noticed_even_if_a_program_holds_the_pipes_open(tmp_path):
    program = tmp_path / "pid"
    with pytest.raises(WorkerDiedError, match="signal 9"):
        run_to_fault(functools.partial(envs.die_and_leave, str(program)), "step", workers=1)
    os.kill(int(program.read_text()), signal.SIGKILL)


def test_death_is_noticed_while_a_large_request_waits_for_room(tmp_path):
    """Nobody reads the request's pipe any more, and a program that was started holds it open."""
    program = tmp_path / "pid"
    vector = ProcessVectorEnv([functools.partial(envs.LeavingEnv, str(program))])
    vector.reset()
    victim = vector._workers._crew[0].process
    os.kill(victim.pid, signal.SIGKILL)
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerDiedError, match="signal 9"):
        vector.reset(options={"more than a pipe holds": b"x" * (1 << 20)})
    os.kill(int(program.read_text()), signal.SIGKILL)
    vector.close()


def test_an_exit_code_is_reported():
    with pytest.raises(WorkerDiedError, match="ended its process with exit code 7"):
        run_to_fault(functools.partial(os._exit, 7), "step")


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="macOS has no waitid before Python 3.13")
def test_what_environments_have_started_ends_with_their_killed_workers(tmp_path):
    """Also with those that die while the end of the first is reported."""

    def die():
        (tmp_path / str(subprocess.Popen(["sleep", "1000"]).pid)).touch()
        envs.kill_self()

    vector = ProcessVectorEnv([functools.partial(envs.FaultyEnv, die)] * 2, num_workers=2)
    vector.reset()
    with pytest.raises(WorkerDiedError, match="signal 9"):
        steps(vector, 3)
    started = [int(file.name) for file in tmp_path.iterdir()]
    assert started
    assert all(ends_within(pid, 5) for pid in started)


def test_results_of_an_unfinished_step_are_never_used(tmp_path):
    """A worker dies after it has written the observation of its first environment."""
    factories = [
        envs.CountingEnv,
        functools.partial(envs.FaultyEnv, envs.kill_self, step=1),
    ]
    vector = ProcessVectorEnv(factories, num_workers=1, copy=False)
    observations, _ = vector.reset()
    vector.send([0, 0])
    os.waitid(os.P_PID, vector._workers._crew[0].process.pid, os.WEXITED | os.WNOWAIT)
    np.testing.assert_array_equal(observations, [[1, 1], [1, 0]])  # torn, as intended
    with pytest.raises(WorkerDiedError, match="environment 1"):
        vector.recv()
    vector.close()


# ---- parents that end


PARENT = """
import os, signal, sys, time
import gymnasium as gym
from starling.envs.process import ProcessVectorEnv

class Local(gym.Env):  # known to this script only; no `if __name__` anywhere
    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return 0, {}
    def step(self, action):
        if HANG:
            import ctypes
            ctypes.PyDLL(None).pause()
        return 1, 0.0, False, False, {}

HANG = False
vector = ProcessVectorEnv([lambda: Local()] * 4, num_workers=2)
vector.reset()
observations, *_ = vector.step([0] * 4)
assert observations.tolist() == [1] * 4
print(*(worker.process.pid for worker in vector._workers._crew), flush=True)
"""


def run_parent(ending, hang=False):
    """Runs a script with two workers; returns its process and theirs."""
    script = PARENT.replace("HANG = False", f"HANG = {hang}") if hang else PARENT
    if hang:
        script = script.replace("observations, *_ = vector.step", "vector.send").replace(
            "assert observations.tolist() == [1] * 4\n", ""
        )
    process = subprocess.Popen(
        [sys.executable, "-c", script + textwrap.dedent(ending)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    if len(workers) != 2:
        pytest.fail(process.communicate()[1])
    return process, workers


@pytest.mark.parametrize("hang", [False, True], ids=["idle", "holding the interpreter lock"])
def test_no_worker_outlives_a_killed_parent(hang):
    process, workers = run_parent("signal.pause()", hang)
    process.kill()
    assert all(ends_within(pid, 3.0) for pid in workers)
    process.communicate()


@pytest.mark.parametrize("hang", [False, True], ids=["idle", "holding the interpreter lock"])
def test_no_worker_outlives_a_parent_that_made_them_in_a_thread(hang, tmp_path):
    """As an actor's thread does that replaces a worker; the thread itself may end."""
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    ending = """
    import threading
    class Holds(Local):
        def step(self, action):
            if HANG:
                open(BEGUN, "w").close()
                import ctypes
                ctypes.PyDLL(None).pause()
            return super().step(action)
    def work():
        global vector
        vector = ProcessVectorEnv([Local, Holds], num_workers=2)
    thread = threading.Thread(target=work); thread.start(); thread.join()
    vector.reset()
    vector.send([0, 0])  # the thread is gone, the workers live
    print(*(worker.process.pid for worker in vector._workers._crew), flush=True)
    signal.pause()
    """
    process, workers = run_parent(f"HANG, BEGUN = {hang}, {str(begun)!r}" + textwrap.dedent(ending))
    workers += [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 4
    if hang:
        begun.read_text()
    process.kill()
    assert all(ends_within(pid, 3.0) for pid in workers)
    process.communicate()


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("sys.exit(5)", 5), ("raise RuntimeError('end')", 1), ("del vector", 0)],
)
def test_a_parent_that_forgets_to_close_ends_all_the_same(ending, code):
    process, workers = run_parent(ending)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert ("Traceback" in errors) == ("raise" in ending), errors
    assert all(ends_within(pid, 0.0) for pid in workers)


def test_workers_leave_signals_to_their_parent(monkeypatch):
    class Signalled(WorkerProcess):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for signum in (signal.SIGINT, signal.SIGTERM):  # it runs no line of Python yet
                os.kill(self.process.pid, signum)

    monkeypatch.setattr("starling.envs.process.WorkerProcess", Signalled)
    vector = ProcessVectorEnv([envs.CountingEnv] * 2, num_workers=2)
    vector.reset()
    for worker in vector._workers._crew:
        os.kill(worker.process.pid, signal.SIGINT)
        os.kill(worker.process.pid, signal.SIGTERM)
        assert os.getpgid(worker.process.pid) != os.getpgid(0)
    observations, *_ = vector.step([0, 0])
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    vector.close()


def test_a_forked_copy_of_the_parent_does_not_end_the_workers():
    vector = ProcessVectorEnv([envs.CountingEnv] * 2, num_workers=2)
    vector.reset()
    if (pid := os.fork()) == 0:
        vector.close()
        os._exit(0)
    os.waitpid(pid, 0)
    steps(vector, 1)
    vector.close()
