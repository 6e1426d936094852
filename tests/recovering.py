"""What the tests of environments that recover from faults have in common."""

from __future__ import annotations

import numpy as np

from starling.envs.safety import Safety

RESTART, DROP = Safety(on_env_error="restart"), Safety(on_env_error="drop")


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
