"""Environments that fail at random moments: all backends lose the same, and agree on all else."""

from __future__ import annotations

import functools

import envs_for_tests as envs
import numpy as np
import pytest
from any_spaces import SPACES
from comparing import actions_for, assert_same, rollout
from gymnasium.spaces import flatten
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.envs.process import ProcessVectorEnv
from starling.envs.safety import Safety
from starling.envs.serial import SerialVectorEnv
from starling.envs.spaces import samples
from starling.envs.thread import ThreadVectorEnv
from starling.errors import WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks", "no_pauses")]


def assert_recovered_alike(space, seed, on_env_error, on_invalid_data, other, workers):
    """Backends agree to the bit on rollouts full of faults, and what they lost."""
    safety = Safety(on_env_error, 10_000, None, on_invalid_data)
    factories = [functools.partial(envs.UnreliableEnv, space)] * 4
    found = []
    for backend, num_workers in ((SerialVectorEnv, 1), (other, workers)):
        vector = backend(factories, seed=seed, num_workers=num_workers, safety=safety)
        try:
            found.append((rollout(vector, actions_for(vector, 60, seed)), dict(vector.faults)))
        except WorkerError as error:
            found.append(str(error).partition(":")[0])
        finally:
            vector.close()
    assert_same(*found)


@settings(max_examples=30, deadline=None)
@given(
    space=SPACES,
    seed=st.integers(0, 2**31),
    on_env_error=st.sampled_from(["restart", "drop"]),
    on_invalid_data=st.sampled_from(["replace", "truncate", "off"]),
    workers=st.integers(1, 3),
)
def test_backends_agree_on_any_faults(space, seed, on_env_error, on_invalid_data, workers):
    faults = on_env_error, on_invalid_data
    assert_recovered_alike(space, seed, *faults, ThreadVectorEnv, workers)


@settings(max_examples=6, deadline=None)
@given(space=SPACES, seed=st.integers(0, 2**31))
def test_processes_agree_on_any_faults(space, seed):
    assert_recovered_alike(space, seed, "restart", "truncate", ProcessVectorEnv, 2)


# ---- in partial batches


def steps_of_each(space, seed, on_invalid_data, backend, batch_size):
    """What 4 environments give in 30 steps each, in whichever order they are ready."""
    vector = backend(
        [functools.partial(envs.UnreliableEnv, space)] * 4,
        seed=seed,
        num_workers=4,
        batch_size=batch_size,
        safety=Safety("restart", 10_000, None, on_invalid_data),
    )
    actions = np.random.default_rng(seed).integers(3, size=(30, 4))
    steps = [[] for _ in range(4)]
    try:
        vector.reset()
        vector.send(actions[0])
        while min(map(len, steps)) < 30:
            observations, rewards, terminated, truncated, infos = vector.recv()
            ids = infos.get("env_id", np.arange(4)).tolist()
            valid = infos.get("valid", np.ones(len(ids), bool))
            finals = infos.get("final_obs", [None] * len(ids))
            for k, (env, seen) in enumerate(zip(ids, samples(space, observations), strict=True)):
                final = None if finals[k] is None else flatten(space, finals[k])
                row = np.array([rewards[k], terminated[k], truncated[k], valid[k]])
                steps[env].append((flatten(space, seen), row, final))
            vector.send([actions[len(steps[env]) % 30, env] for env in ids], ids)
        return [given[:30] for given in steps]
    finally:
        vector.close()


@settings(max_examples=20, deadline=None)
@given(
    space=SPACES,
    seed=st.integers(0, 2**31),
    on_invalid_data=st.sampled_from(["replace", "truncate", "off"]),
    backend=st.sampled_from([SerialVectorEnv, ThreadVectorEnv]),
    batch_size=st.sampled_from([1, 2, 3]),
)
def test_partial_batches_lose_the_same(space, seed, on_invalid_data, backend, batch_size):
    whole = steps_of_each(space, seed, on_invalid_data, SerialVectorEnv, None)
    assert_same(steps_of_each(space, seed, on_invalid_data, backend, batch_size), whole)


@settings(max_examples=4, deadline=None)
@given(space=SPACES, seed=st.integers(0, 2**31), batch_size=st.sampled_from([1, 2]))
def test_partial_batches_of_processes_lose_the_same(space, seed, batch_size):
    whole = steps_of_each(space, seed, "truncate", SerialVectorEnv, None)
    assert_same(steps_of_each(space, seed, "truncate", ProcessVectorEnv, batch_size), whole)
