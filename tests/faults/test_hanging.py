"""Environments whose steps take long: warned of, then ended at their deadline."""

from __future__ import annotations

import functools
import logging

import envs_for_tests as envs
import numpy as np
import pytest
from recovering import RESTART
from test_workers import with_fault

from starling.envs import requests
from starling.envs.process import ProcessVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.errors import StepTimeoutError

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
    factories = [envs.CountingEnv, functools.partial(envs.FaultyEnv, envs.hang, step=1)]
    vector = make(ProcessVectorEnv, factories, num_workers=2, step_timeout=60)
    vector.reset()
    vector._workers._time_limit = 0.5
    monkeypatch.setattr(requests, "_WARN_AFTER", 0.1)
    with pytest.raises(StepTimeoutError, match=r"environment 1 did not answer within 0.5 s"):
        vector.step([0, 0])
    told = [line for line in caplog.messages if line.startswith("environment 1 has not answered")]
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
