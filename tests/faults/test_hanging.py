"""Environments whose steps take long: warned of, then ended at their deadline."""

from __future__ import annotations

import functools
import logging
import os

import envs_for_tests as envs
import numpy as np
import pytest

from starling.envs import requests
from starling.envs.process import ProcessVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.errors import StepTimeoutError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]


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
            with open(self.gate, "wb") as pipe:
                pipe.write(b"!")


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_a_step_that_takes_long_is_warned_of_once_and_whole(backend, tmp_path, monkeypatch):
    """The environment waits until the warning has come."""
    opener = Opener(str(tmp_path / "gate"))
    os.mkfifo(opener.gate)
    factories = [functools.partial(envs.GatedEnv, opener.gate), envs.GatedEnv]
    vector = backend(factories, num_workers=2, step_timeout=300, seed=4)
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
    vector.close()


def test_a_step_that_was_warned_of_ends_at_its_deadline(monkeypatch, caplog):
    factories = [envs.CountingEnv, functools.partial(envs.FaultyEnv, envs.hang, step=1)]
    vector = ProcessVectorEnv(factories, num_workers=2, step_timeout=60)
    vector.reset()
    vector._workers._time_limit = 0.5
    monkeypatch.setattr(requests, "_WARN_AFTER", 0.1)
    with pytest.raises(StepTimeoutError, match=r"environment 1 did not answer within 0.5 s"):
        vector.step([0, 0])
    told = [line for line in caplog.messages if line.startswith("environment 1 has not answered")]
    assert len(told) == 1
    vector.close()
