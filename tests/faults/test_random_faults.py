"""Environments that fail at random moments: all backends lose the same, and agree on all else."""

from __future__ import annotations

import functools

import envs_for_tests as envs
import numpy as np
import pytest
from any_spaces import SPACES
from comparing import assert_same
from faults_by_hand import flat, steps_by_hand
from gymnasium import spaces
from gymnasium.spaces import flatten
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from starling.envs.process import ProcessVectorEnv
from starling.envs.safety import Safety
from starling.envs.serial import SerialVectorEnv
from starling.envs.spaces import samples
from starling.envs.thread import ThreadVectorEnv
from starling.errors import WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks", "no_pauses")]


RATES = {"restart": 0.05, "drop": 0.01}  # of faults, so that most runs do not lose everything
ACTIONS = np.random.default_rng(1).integers(3, size=(60, 4))


def lived(backend, factory, seed, on_env_error, on_invalid_data, workers=1, actions=ACTIONS):
    """What 4 environments gave and which faults were counted by then, and how that ended."""
    safety = Safety(on_env_error, 10_000, None, on_invalid_data)
    vector = backend([factory] * 4, seed=seed, num_workers=workers, safety=safety)
    steps, end = [], "went on"
    try:
        for own in (None, *actions):
            result = vector.reset() if own is None else vector.step(own)
            steps.append((result, +vector.faults))
    except WorkerError as error:  # names whichever environment was the last to fail
        end = type(error), str(error).partition(":")[0], error.step
    finally:
        vector.close()
    return steps, end, +vector.faults


def assert_recovered_alike(space, seed, on_env_error, on_invalid_data, other, workers):
    """Backends agree to the bit on rollouts full of faults, and what they lost."""
    factory = functools.partial(envs.UnreliableEnv, space, RATES[on_env_error])
    faults = on_env_error, on_invalid_data
    found = lived(SerialVectorEnv, factory, seed, *faults)
    event(f"{on_env_error}: {found[1] if isinstance(found[1], str) else 'no environment is left'}")
    assert_same(lived(other, factory, seed, *faults, workers), found)


ON_ENV_ERROR = st.sampled_from(["restart", "drop"])
ANY_FAULTS = {
    "space": SPACES,
    "seed": st.integers(0, 2**31),
    "on_env_error": ON_ENV_ERROR,
    "on_invalid_data": st.sampled_from(["replace", "truncate", "off"]),
}


@settings(max_examples=20, deadline=None)
@given(**ANY_FAULTS, workers=st.integers(1, 3))
def test_backends_agree_on_any_faults(space, seed, on_env_error, on_invalid_data, workers):
    faults = on_env_error, on_invalid_data
    assert_recovered_alike(space, seed, *faults, ThreadVectorEnv, workers)


@settings(max_examples=4, deadline=None)
@given(space=SPACES, seed=st.integers(0, 2**31), on_env_error=ON_ENV_ERROR)
def test_processes_agree_on_any_faults(space, seed, on_env_error):
    assert_recovered_alike(space, seed, on_env_error, "truncate", ProcessVectorEnv, 2)


def test_most_runs_lose_environments_and_go_on():
    factory = functools.partial(envs.UnreliableEnv, spaces.Box(0, 9, (3,)), RATES["drop"])
    runs = [lived(SerialVectorEnv, factory, seed, "drop", "truncate") for seed in range(20)]
    dropped = [faults["dropped_envs"] for _, _, faults in runs]
    assert sum(0 < number < 4 for number in dropped) >= 14
    assert all((end == "went on") == (n < 4) for (_, end, _), n in zip(runs, dropped, strict=True))


# ---- against a plain loop


def each(space, result):
    """A result of `reset` or `step`, taken apart: what each of 4 environments gave."""
    observations, *rest, infos = result
    rewards, terminated, truncated = rest or np.zeros((3, 4))
    valid, finals = infos.get("valid", np.ones(4, bool)), infos.get("final_obs", [None] * 4)
    rows = np.transpose([rewards, terminated, truncated, valid]).tolist()
    finals = [None if final is None else flat(final) for final in finals]
    return list(zip(map(flat, samples(space, observations)), rows, finals, strict=True))


def assert_as_by_hand(space, found, expected, actions):
    """What a vector environment lost is what a plain loop lost, and all else is the same."""
    steps, end, _ = found
    assert (end == "went on") == (len(expected) == len(actions) + 1)
    assert len(steps) == len(expected)
    for (result, counted), (by_hand, counted_by_hand) in zip(steps, expected, strict=True):
        assert_same(counted, counted_by_hand)
        for gave, wanted in zip(each(space, result), by_hand, strict=True):
            assert_same(gave[::2], wanted[::2])
            np.testing.assert_array_equal(gave[1], wanted[1])


@settings(max_examples=20, deadline=None)
@given(**ANY_FAULTS, rate=st.sampled_from([0.01, 0.05, 0.2]))
def test_a_plain_loop_loses_the_same(space, seed, on_env_error, on_invalid_data, rate):
    factory = functools.partial(envs.UnreliableEnv, space, rate)
    rules = on_env_error, on_invalid_data
    expected = steps_by_hand(factory, seed, ACTIONS, *rules)
    assert_as_by_hand(space, lived(SerialVectorEnv, factory, seed, *rules), expected, ACTIONS)


@settings(max_examples=7, deadline=None)
@given(**ANY_FAULTS, workers=st.integers(1, 3))
def test_a_plain_loop_loses_the_same_with_workers_that_die(
    space, seed, on_env_error, on_invalid_data, workers
):
    """Among the other faults; what shares a worker with the one that kills it is lost with it."""
    factory, actions = functools.partial(envs.UnreliableEnv, space, 0.02, 0.01), ACTIONS[:30]
    rules = on_env_error, on_invalid_data
    expected = steps_by_hand(factory, seed, actions, *rules, workers)
    ended, deaths = len(expected) <= len(actions), expected[-1][1]["worker_deaths"]
    assume(ended or 0 < deaths < 4)  # to start workers takes time
    event(f"{on_env_error}: {'no environment is left' if ended else f'{deaths} deaths'}")
    found = lived(ProcessVectorEnv, factory, seed, *rules, workers, actions)
    assert_as_by_hand(space, found, expected, actions)


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
