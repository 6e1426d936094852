"""Environments that hang: warned of, ended at their deadline, and no stale answer."""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import threading

import envs_for_tests as envs
import numpy as np
import pytest
from failing import RESTART, run_to_fault, steps, with_fault
from leaks import children, ends_within

from starling.envs import requests
from starling.envs.process import ProcessVectorEnv
from starling.envs.requests import Answer, Workers
from starling.envs.seeding import child_seeds
from starling.envs.serial import SerialVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.errors import StepTimeoutError, WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks", "no_pauses")]


class Opener(logging.Handler):
    """Opens the gate of environment 0 when its worker is warned of."""

    def __init__(self, gate: str):
        super().__init__()
        self.gate = gate
        self.told: list[str] = []

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("environment 0 "):
            self.told.append(message)
            envs.open_gate(self.gate)


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_a_step_that_takes_long_is_warned_of_once_and_whole(make, backend, gate, monkeypatch):
    """The environment waits until the warning has come."""
    opener = Opener(gate)
    factories = [functools.partial(envs.GatedEnv, gate), envs.GatedEnv]
    vector = make(backend, factories, num_workers=2, step_timeout=300, seed=4)
    vector.reset()
    seed = vector.get_attr("seed_used")[0]
    monkeypatch.setattr(requests, "_WARN_AFTER", 0.05)
    monkeypatch.setattr(requests._log, "handlers", [opener])
    observations, *_, infos = vector.step([0, 0])
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    assert "valid" not in infos
    assert not vector.faults
    assert opener.told == [
        "environment 0 has not answered for 0.05 s, of 300 s allowed "
        f"(worker pid {vector._workers.pid(0)}, seed {seed}, step 1)"
    ]


def test_a_step_that_was_warned_of_ends_at_its_deadline(make, monkeypatch, caplog):
    hangs = functools.partial(envs.FaultyEnv, envs.hang, step=1)
    vector = make(ProcessVectorEnv, [hangs], step_timeout=60)
    vector.reset()
    vector._workers._time_limit = 0.5
    monkeypatch.setattr(requests, "_WARN_AFTER", 0.1)
    with pytest.raises(StepTimeoutError, match=r"environment 0 did not answer within 0.5 s"):
        vector.step([0])
    told = [line for line in caplog.messages if line.startswith("environment 0 has not answered")]
    assert len(told) == 1


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_worker_that_hangs_is_replaced_and_no_late_answer_is_taken(make, batch_size):
    vector = make(
        ProcessVectorEnv,
        with_fault(envs.hang),
        num_workers=3,
        batch_size=batch_size,
        step_timeout=0.3,
        safety=RESTART,
    )
    vector.reset()
    counts = np.zeros((3, 2))
    counts[:, 0] = 1
    vector.send([1, 1, 1])
    left = 6
    while left > 0:  # so many after the fault
        left -= vector.faults["timeouts"]
        observations, *_, infos = vector.recv()
        ids = infos.get("env_id", np.arange(3))
        for env, observation, valid in zip(
            ids, observations, infos.get("valid", [True] * 3), strict=False
        ):
            counts[env] = [1, 0] if not valid else counts[env] + [0, 1]
            if counts[env][1] == 5 and env != 1:
                counts[env] += [1, -5]
            np.testing.assert_array_equal(observation, counts[env])
        vector.send(np.ones(len(ids), np.int64), ids)
    assert vector.faults["timeouts"] == vector.faults["restarts"] >= 1


def test_a_thread_that_hangs_cannot_be_replaced(make, gate):
    factories = [functools.partial(envs.GatedEnv, gate), envs.GatedEnv]
    vector = make(ThreadVectorEnv, factories, num_workers=2, step_timeout=0.2, safety=RESTART)
    vector.reset()
    with pytest.raises(StepTimeoutError, match="use backend='process'"):
        vector.step([0, 0])
    envs.open_gate(gate)


# ---- where nothing is survived


class JustInTime(Workers):
    """A worker that answers at the very moment when its time is up."""

    def _post(self, worker, request, method, args):
        self._late = [Answer(worker, request, "the answer", False)]

    def _poll(self, timeout, every):
        self._deadlines[0] = self._looks[0] = 0.0
        answers, self._late = self._late, []
        return answers


def test_an_answer_that_comes_with_its_deadline_counts():
    assert JustInTime([slice(0, 1)], step_timeout=10).ask(0, "call", ()) == "the answer"


def test_what_a_hung_environment_has_started_ends_with_its_worker(tmp_path):
    started = tmp_path / "pid"

    def hang():
        started.write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        envs.hang()

    with pytest.raises(StepTimeoutError):
        run_to_fault(hang, "step", step_timeout=3)
    assert ends_within(int(started.read_text()), 5)


def test_a_hung_worker_is_killed_at_the_deadline(tmp_path):
    before, last_words = children(), tmp_path / "pid"

    def hang():
        last_words.write_text(str(os.getpid()))
        envs.hang()

    with pytest.raises(
        StepTimeoutError, match=r"environment 1 did not answer within 0.2 s"
    ) as info:
        run_to_fault(hang, "step", step_timeout=0.2, seed=4)
    pid, seed = int(last_words.read_text()), child_seeds(4, 3)[1]
    error = info.value
    assert (error.env_index, error.pid, error.seed, error.step) == (1, pid, seed, 3)
    assert f"(worker pid {pid}, seed {seed}, step 3)" in str(error)
    assert children() <= before


def test_a_worker_that_ignores_sigterm_is_killed():
    def stubborn():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        envs.hang()

    with pytest.raises(StepTimeoutError):
        run_to_fault(stubborn, "step", step_timeout=0.2)


def test_a_worker_that_has_left_its_group_is_killed(make):
    def leave():
        os.setpgid(0, os.getpgid(os.getppid()))
        envs.hang()

    vector = make(
        ProcessVectorEnv, with_fault(leave), num_workers=3, step_timeout=0.2, safety=RESTART
    )
    vector.reset()
    pid = vector._workers.pid(1)
    steps(vector, 3)
    assert vector.faults["restarts"] == 1
    assert ends_within(pid, 0.0)


def test_a_worker_that_holds_the_interpreter_lock_is_killed():
    def spin():
        import ctypes

        ctypes.PyDLL(None).pause()  # PyDLL keeps the lock

    with pytest.raises(StepTimeoutError):
        run_to_fault(spin, "step", step_timeout=0.2)


def test_no_late_answer_is_taken_for_a_later_one(gate):
    """Gymnasium's fault: after a caught time-out every step returns the step before."""
    factories = [functools.partial(envs.GatedEnv, gate), envs.GatedEnv]
    vector = ThreadVectorEnv(factories, num_workers=2, step_timeout=0.2)
    vector.reset()
    with pytest.raises(StepTimeoutError, match="use backend='process'"):
        vector.step([0, 0])
    envs.open_gate(gate)  # now the answer comes
    for use in (vector.recv, lambda: vector.step([0, 0]), vector.reset):
        with pytest.raises(WorkerError, match="no longer be used"):
            use()
    vector.close()


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_answers_to_a_step_that_reset_gave_up_are_dropped(backend, gate):
    factories = [functools.partial(envs.GatedEnv, gate), envs.GatedEnv]
    vector = backend(factories, num_workers=2)
    vector.reset()
    vector.send([0, 0])  # environment 0 waits at the gate, environment 1 answers

    opener = threading.Thread(target=envs.open_gate, args=(gate, 2))
    opener.start()
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations, [[2, 0], [2, 0]])
    opener.join()
    opener = threading.Thread(target=envs.open_gate, args=(gate, 2))
    opener.start()
    observations, *_ = vector.step([0, 0])
    np.testing.assert_array_equal(observations, [[2, 1], [2, 1]])
    opener.join()
    vector.close()


@pytest.mark.parametrize("where", ["step", "close"])
def test_close_returns_although_a_worker_hangs(where):
    vector = ProcessVectorEnv(with_fault(envs.hang, where), num_workers=3)
    vector.reset()
    steps(vector, 2)
    vector.send([0, 0, 0])
    vector.close()


def test_large_requests_to_a_hung_worker_time_out():
    vector = ProcessVectorEnv(with_fault(envs.hang), num_workers=3, step_timeout=0.5)
    vector.reset()
    steps(vector, 2)
    vector.send([0, 0, 0])
    with pytest.raises(StepTimeoutError):
        vector.reset(options={"more than a pipe holds": b"x" * (1 << 20)})
    vector.close()


def test_large_answers_arrive():
    vector = ProcessVectorEnv([functools.partial(envs.EchoEnv, 1 << 20)] * 2, infos="all")
    vector.reset(options={"payload": b"x" * (1 << 20)})
    *_, infos = vector.step([0, 0])
    assert [len(text) for text in infos["text"]] == [1 << 20] * 2
    vector.close()


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_an_interrupted_recv_can_be_repeated(backend, gate):
    """As by Ctrl-C; the step goes on meanwhile, and its results are not lost."""
    vector = backend([functools.partial(envs.GatedEnv, gate), envs.GatedEnv], num_workers=2)
    vector.reset()
    vector.send([0, 0])

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            vector.recv()
    finally:
        signal.signal(signal.SIGALRM, previous)
    envs.open_gate(gate)  # now the answer comes
    observations, *_ = vector.recv()
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    vector.close()


def test_an_interrupted_serial_step_asks_for_a_reset(interruptible):
    def interrupt():
        raise KeyboardInterrupt

    vector = SerialVectorEnv(with_fault(interrupt))
    vector.reset()
    steps(vector, 2)
    with pytest.raises(KeyboardInterrupt):
        steps(vector, 1)
    for use in (vector.recv, lambda: vector.step([0, 0, 0])):
        with pytest.raises(WorkerError, match="interrupted; call reset"):
            use()
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations, [[2, 0], [2, 0], [2, 0]])
    steps(vector, 3)
    vector.close()
