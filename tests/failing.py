"""What the tests of environments that fail have in common."""

from __future__ import annotations

import functools

import envs_for_tests as envs
import numpy as np
import pytest

from starling.envs.process import ProcessVectorEnv
from starling.envs.safety import Safety
from starling.envs.serial import SerialVectorEnv
from starling.envs.thread import ThreadVectorEnv

BACKENDS = [SerialVectorEnv, ThreadVectorEnv, ProcessVectorEnv]
ALL = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.backend)
RESTART, DROP = Safety(on_env_error="restart"), Safety(on_env_error="drop")


def with_fault(fault, where="step", n=3, broken=1):
    """Factories of n environments, of which one is broken."""
    factories = [envs.CountingEnv] * n
    factories[broken] = functools.partial(envs.FaultyEnv, fault, where)
    return [functools.partial(factory) for factory in factories]


def step(vector):
    return vector.step(np.ones(vector.num_envs, np.int64))


def steps_to_fault(vector):
    """Three steps, of which the third is the one that fails; returns what that gave."""
    vector.reset()
    return [step(vector) for _ in range(3)][-1]


def kill_worker(vector, w):
    """Kills a worker that has nothing to do."""
    victim = vector._workers._crew[w].process
    victim.kill()
    victim.wait()


def steps(vector, count):
    for _ in range(count):
        vector.step([0] * vector.num_envs)


def run_to_fault(fault, where, workers=3, **options):
    vector = ProcessVectorEnv(with_fault(fault, where), num_workers=workers, **options)
    try:
        vector.reset()
        steps(vector, 3)
    finally:
        vector.close()
