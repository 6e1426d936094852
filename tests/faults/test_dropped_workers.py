"""Workers that die are dropped with what they had, and the others go on."""

from __future__ import annotations

import functools
import os
import time

import envs_for_tests as envs
import numpy as np
import pytest
from failing import DROP, step, steps_to_fault, with_fault

from starling.envs.process import ProcessVectorEnv
from starling.errors import WorkerDiedError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks", "no_pauses")]


def test_a_worker_that_dies_is_dropped_with_what_it_had(make):
    vector = make(ProcessVectorEnv, with_fault(envs.kill_self), num_workers=2, safety=DROP)
    observations, _, _, truncated, infos = steps_to_fault(vector)
    for k in range(3, 9):
        np.testing.assert_array_equal(truncated[:2], [k == 3] * 2)
        np.testing.assert_array_equal(observations[:2], [[1, 2], [1, 2]])
        np.testing.assert_array_equal(observations[2], [1 + k // 5, k % 5])
        np.testing.assert_array_equal(infos["valid"], [False, False, True])
        observations, _, _, truncated, infos = step(vector)
    assert vector.faults == {"worker_deaths": 1, "dropped_envs": 2, "lost_steps": 2}
    vector._workers._crew[0].process.pid = os.getpid()  # which another may have by now
    assert len(vector.worker_memory) == 1
    assert vector._workers.memory_of(0) == 0
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations[2], [3, 0])


def test_a_worker_that_dies_when_an_environment_is_dropped_is_dropped_as_well(make):
    class Env(envs.FaultyEnv):
        def close(self):
            envs.kill_self()

    factories = [functools.partial(Env, envs.boom), envs.CountingEnv, envs.CountingEnv]
    vector = make(ProcessVectorEnv, factories, num_workers=2, safety=DROP)
    steps_to_fault(vector)
    *_, infos = step(vector)
    np.testing.assert_array_equal(infos["valid"], [False, False, True])


def test_what_is_left_after_a_drop_can_be_asked_and_reset(make):
    vector = make(ProcessVectorEnv, with_fault(envs.kill_self), num_workers=2, safety=DROP)
    steps_to_fault(vector)
    assert vector.get_attr("length") == (None, None, 5)
    vector.set_attr("length", 7)
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations[2], [2, 0])
    step(vector)


def test_a_drop_touches_no_environment_that_is_under_way(make, gate):
    """Environment 0 is dropped while environment 1 is at a gate, in partial batches."""
    factories = [
        functools.partial(envs.FaultyEnv, envs.kill_self, "step", 1),
        functools.partial(envs.GatedEnv, gate),
        envs.CountingEnv,
    ]
    vector = make(ProcessVectorEnv, factories, num_workers=3, batch_size=1, safety=DROP)
    vector.reset()
    vector.send([1, 1, 1])
    seen = {}
    while 0 not in seen:
        observations, *_, infos = vector.recv()
        seen[int(infos["env_id"][0])] = bool(infos.get("valid", [True])[0])
        if not seen.get(2, False) or 0 in seen:
            continue
        vector.send([1], [2])
    assert seen[0] is False
    assert 1 not in seen
    envs.open_gate(gate)
    while 1 not in seen:
        observations, *_, infos = vector.recv()
        seen[int(infos["env_id"][0])] = True
    np.testing.assert_array_equal(observations, [[1, 1]])


def test_a_drop_keeps_no_half_of_an_observation_that_is_being_written(make, gate, tmp_path):
    """Environment 0 takes its worker along while environment 2, which will fail, is writing."""
    written = tmp_path / "written"

    def dies():
        while not written.exists():
            time.sleep(0.001)
        envs.kill_self()

    def fails():
        written.touch()
        with open(gate, "rb") as pipe:
            pipe.read(1)
        envs.boom()

    factories = [functools.partial(envs.HalvesEnv, fault) for fault in (dies, None, fails, None)]
    vector = make(ProcessVectorEnv, factories, num_workers=2, batch_size=2, safety=DROP)
    vector.reset()
    vector.send([1] * 4)
    *_, infos = vector.recv()
    assert (infos["env_id"].tolist(), infos["valid"].tolist()) == ([0, 1], [False, False])
    envs.open_gate(gate)
    *_, infos = vector.recv()
    assert (infos["env_id"].tolist(), infos["valid"].tolist()) == ([2, 3], [False, True])
    np.testing.assert_array_equal(infos["final_obs"][0]["a"], [1, 0])


def test_fewer_environments_than_a_batch_end_it(make):
    factories = [functools.partial(envs.FaultyEnv, envs.kill_self, "step", 2)] * 3
    factories.append(envs.CountingEnv)
    vector = make(ProcessVectorEnv, factories, num_workers=4, batch_size=2, safety=DROP)
    vector.reset()
    vector.send([1] * 4)

    def go_on():
        for _ in range(20):
            *_, infos = vector.recv()
            vector.send([1, 1], infos["env_id"])

    with pytest.raises(WorkerDiedError, match=r"with fewer left than a batch \(2\)"):
        go_on()
