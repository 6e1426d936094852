"""Numbers that are not finite, and masks that allow nothing, never get past the environments."""

from __future__ import annotations

import functools
import os

import envs_for_tests as envs
import numpy as np
import pytest
from failing import ALL, BACKENDS, step, steps_to_fault
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from jax import numpy as jnp

from starling.envs.adapter import VectorEnvAdapter
from starling.envs.make import make_vec
from starling.envs.process import ProcessVectorEnv
from starling.envs.safety import Safety
from starling.envs.seeding import child_seeds
from starling.envs.serial import SerialVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.errors import WorkerError
from starling.training.parallel_ppo import ParallelPPO

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore:observation.*converted:UserWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def giving(value, where, dtype=np.float32):
    """A factory whose environment gives `value` in its third step."""
    low, high = -np.inf, np.inf
    if np.issubdtype(dtype, np.integer):
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    free = spaces.Box(low, high, (2,), dtype)

    class Env(envs.CountingEnv):
        observation_space = spaces.Dict({"few": spaces.Box(-1, 9, (2,), np.float32), "free": free})

        def _observation(self):
            bad = where != "reward" and (self.episodes, self.steps) == (1, 3)
            values = {"few": super()._observation(), "free": super()._observation()}
            return {**values, where: np.array([value, 1])} if bad else values

        def step(self, action):
            result = super().step(action)
            bad = where == "reward" and self.steps == 3
            return result[0], value if bad else 1.0, *result[2:]

    return Env


def adapted(env_fns, *, num_workers=1, mode=AutoresetMode.NEXT_STEP, **options):
    """A vector environment that exists."""
    return VectorEnvAdapter(SyncVectorEnv(env_fns, autoreset_mode=mode), **options)


ADAPTED = [functools.partial(adapted, mode=mode) for mode in AutoresetMode]


@pytest.mark.parametrize("backend", [*BACKENDS, adapted])
@pytest.mark.parametrize("where", ["few", "free", "reward"])
@pytest.mark.parametrize("value", [*NOT_FINITE, 1e300])
def test_invalid_data_is_an_error(backend, where, value):
    safety = Safety(first_env=10)  # of a run
    factories = [giving(0.0, where), giving(value, where)]
    vector = backend(factories, num_workers=2, seed=3, safety=safety)
    named = "reward" if where == "reward" else f"observation '{where}'"
    with pytest.raises(WorkerError, match=f"environment 11.*{named}") as info:
        steps_to_fault(vector)
    check_told(info.value, 11, 3)
    assert info.value.seed == (3 if backend is adapted else child_seeds(3, 2)[1])
    vector.reset()
    step(vector)
    vector.close()


def check_told(error, index, at):
    assert (error.env_index, error.step) == (index, at)
    assert f"(worker pid {error.pid}, seed {error.seed}, step {at})" in str(error)
    assert error.pid > 0


class Sick:
    """Written in JAX: is paid NaN in its third step, but for the environment that draws 0."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, key):
        return jnp.zeros(1), jnp.zeros(1)

    def step(self, state, action):
        state = state + 1
        reward = jnp.where((state[0] == 3) & (action == 1), jnp.nan, 1.0)
        return state, jnp.zeros(1), reward, False, False


@pytest.mark.parametrize(("seed", "told"), [(7, 7), ([5, 6], 6)])
def test_invalid_data_of_a_compiled_environment_are_told_with_seed_and_step(seed, told):
    vector = make_vec(Sick(), 2, "compiled", first_env=4)
    vector.reset(seed=seed)
    for _ in range(2):
        step(vector)
    with pytest.raises(WorkerError, match=r"environment 5 gave nan as its reward") as info:
        vector.step(np.array([0, 1]))
    check_told(info.value, 5, 3)
    assert info.value.seed == told
    vector.close()


@pytest.mark.parametrize("batch_size", [4, 2])
def test_invalid_data_of_envpool_are_told_with_seed_and_step(monkeypatch, batch_size):
    pytest.importorskip("envpool")
    vector = make_vec("CartPole-v1", 4, "envpool", seed=3, batch_size=batch_size, first_env=8)
    receive = vector._receive

    def spoilt():
        state, rewards, *ends = receive()
        ids = state[vector._layout.env_id]
        rewards[(ids == 2) & (vector._guard.steps[ids] == 3)] = np.nan
        return state, rewards, *ends

    monkeypatch.setattr(vector, "_receive", spoilt)
    vector.reset()
    vector.send([1] * 4)

    def go_on():
        for _ in range(20):
            *_, infos = vector.recv()
            vector.send([1] * batch_size, infos.get("env_id"))

    with pytest.raises(WorkerError, match=r"environment 10 gave nan as its reward") as info:
        go_on()
    check_told(info.value, 10, 3)
    assert info.value.seed == child_seeds(3, 4)[2]
    vector.close()


@ALL
@pytest.mark.parametrize("value", [*NOT_FINITE, 1e300])
def test_invalid_data_is_replaced(backend, value):
    safety = Safety(on_invalid_data="replace")
    factories = [giving(value, where) for where in ("few", "free", "reward")]
    vector = backend(factories, num_workers=2, safety=safety)
    observations, rewards, *_, infos = steps_to_fault(vector)
    assert "valid" not in infos
    nearest = 0.0 if np.isnan(value) else np.clip(value, -1, 9)
    np.testing.assert_array_equal(observations["few"], [[nearest, 1], [1, 3], [1, 3]])
    np.testing.assert_array_equal(observations["free"], [[1, 3], [0, 1], [1, 3]])
    np.testing.assert_array_equal(rewards, [1, 1, 0])
    assert vector.faults == {"invalid_data": 3}
    vector.close()


@ALL
@pytest.mark.parametrize("value", [*NOT_FINITE, 1e300])
def test_invalid_data_truncates_the_episode(backend, value):
    safety = Safety(on_invalid_data="truncate")
    factories = [giving(value, where) for where in ("few", "free", "reward")] + [giving(0, "few")]
    vector = backend(factories, num_workers=2, safety=safety)
    observations, rewards, _, truncated, infos = steps_to_fault(vector)
    np.testing.assert_array_equal(infos["valid"], [False, False, False, True])
    np.testing.assert_array_equal(truncated, [True, True, True, False])
    np.testing.assert_array_equal(rewards, [0, 0, 0, 1])
    np.testing.assert_array_equal(observations["free"], [[2, 0], [2, 0], [2, 0], [1, 3]])
    for final in infos["final_obs"][:3]:
        np.testing.assert_array_equal(final["few"], [1, 2])
    assert vector.faults == {"invalid_data": 3, "lost_steps": 3}
    vector.close()


@pytest.mark.parametrize(
    ("dtype", "value", "fitting"),
    [
        (np.int64, 2**31, 2**31 - 1),
        (np.int64, -(2**31) - 1, -(2**31)),
        (np.uint64, 2**32, 2**32 - 1),
        (np.float64, -1e39, -3e38),
    ],
)
def test_numbers_that_32_bits_cannot_hold_are_invalid(dtype, value, fitting):
    vector = SerialVectorEnv([giving(fitting, "free", dtype), giving(value, "free", dtype)])
    message = (
        r"environment 1 gave .* as its observation 'free', more than 32 bits can hold \(worker"
    )
    with pytest.raises(WorkerError, match=message):
        steps_to_fault(vector)
    vector.close()
    safety = Safety(on_invalid_data="replace")
    vector = SerialVectorEnv([giving(v, "free", dtype) for v in (fitting, value)], safety=safety)
    observations, *_ = steps_to_fault(vector)
    np.testing.assert_array_equal(observations["free"], np.array([[fitting, 1], [0, 1]], dtype))
    assert vector.faults == {"invalid_data": 1}
    vector.close()


@ALL
def test_without_a_guard_data_pass(backend):
    vector = backend([giving(np.nan, "free")], safety=Safety(on_invalid_data="off"))
    observations, *_ = steps_to_fault(vector)
    np.testing.assert_array_equal(observations["free"], [[np.nan, 1]])
    assert not vector.faults
    vector.close()


def ending(terminates):
    """A factory whose environment observes NaN in its third step, and ends there."""
    return functools.partial(giving(np.nan, "free"), 3, terminates)


@pytest.mark.parametrize("backend", [*BACKENDS, *ADAPTED])
def test_a_final_observation_is_looked_at_only_where_it_counts(backend):
    """One that ended in a failure is not learnt from: simulators that blow up end like this."""
    if backend is not ADAPTED[0]:  # where it is the observation, too
        vector = backend([ending(True)])
        *_, terminated, _, infos = steps_to_fault(vector)
        assert terminated[0]
        assert np.isnan(infos["final_obs"][0]["free"][0])
        vector.close()
    vector = backend([ending(False)])
    with pytest.raises(WorkerError, match=r"environment 0 gave nan as its observation 'free'"):
        steps_to_fault(vector)
    vector.close()


@pytest.mark.parametrize("backend", [*BACKENDS, *ADAPTED])
def test_a_final_observation_is_replaced(backend):
    vector = backend([ending(False)], safety=Safety(on_invalid_data="replace"))
    *_, infos = steps_to_fault(vector)
    np.testing.assert_array_equal(infos["final_obs"][0]["free"], [0, 1])
    assert vector.faults == {"invalid_data": 1}
    vector.close()


def test_a_final_observation_of_a_compiled_environment_is_looked_at():
    class Env(Sick):
        def step(self, state, action):
            state = state + 1
            return state, jnp.where(state == 3, jnp.nan, 0.0), 0.0, False, state[0] == 3

    vector = make_vec(Env(), 1, "compiled")
    with pytest.raises(WorkerError, match="environment 0 gave nan as its observation"):
        steps_to_fault(vector)
    vector.close()


def test_observations_outside_of_their_space_end_no_run(tmp_path, shared_programs):
    class Env(envs.CountingEnv):  # whose counts grow
        observation_space = spaces.Box(-1, 1, (2,), np.float32)

    small = {"num_envs": 4, "num_steps": 16, "mini_batch_size": 64, "hidden_sizes": (8,)}
    options = {"log_dir": str(tmp_path), "tensorboard": False, "preset": "none"}
    with ParallelPPO(Env, **small, **options, backend="serial") as agent:
        result = agent.train(128, quiet=True)
        assert (result.status, result.steps, agent.state.skipped) == ("completed", 128, 0)


@ALL
def test_an_episode_that_never_begins_well_is_an_error(backend):
    class Env(envs.CountingEnv):
        def _observation(self):
            return super()._observation() * (np.nan if self.episodes > 1 else 1)

    vector = backend([functools.partial(Env, 2)], safety=Safety(on_invalid_data="truncate"))
    with pytest.raises(WorkerError, match=r"environment 0 gave nan.*set .* to replace or off$"):
        steps_to_fault(vector)
    vector.close()


@ALL
def test_a_mask_that_allows_nothing_is_an_error(backend):
    class Env(envs.MaskedEnv):
        def _mask(self):
            return np.zeros(3, np.int8) if self.steps == 3 else super()._mask()

    vector = backend([envs.MaskedEnv, Env], num_workers=2, seed=3)
    with pytest.raises(WorkerError, match="environment 1 gave an action mask that allows nothing"):
        steps_to_fault(vector)
    vector.close()


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_masks_of_steps_that_are_under_way_are_not_looked_at(backend, tmp_path):
    """Environment 0 allows nothing, but its worker is still at a gate, in environment 1."""
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    class Env(envs.GatedEnv):
        def __init__(self, gate=None, allowed=1):
            super().__init__(gate)
            self.allowed = allowed

        def step(self, action):
            return *super().step(action)[:4], {"action_mask": np.full(2, self.allowed, np.int8)}

    factories = [functools.partial(Env, allowed=0), functools.partial(Env, gate), Env, Env]
    vector = backend(factories, num_workers=2, batch_size=2)
    vector.reset()
    vector.send([1] * 4)
    for _ in range(3):
        *_, infos = vector.recv()
        assert infos["env_id"].tolist() == [2, 3]
        vector.send([1] * 2, [2, 3])
    vector.recv()
    with open(gate, "wb") as pipe:
        pipe.write(b"!")
    with pytest.raises(WorkerError, match="environment 0 gave an action mask that allows nothing"):
        vector.recv()
    vector.close()


# ---- an episode that is cut, and whose environment fails to begin another


def paid_too_much(fault, length=100):
    """Two factories; the second's is paid infinity in its third step, and fails when then reset."""

    class Env(envs.CountingEnv):
        def reset(self, **kwargs):
            if self.steps == 3:
                fault()
            return super().reset(**kwargs)

        def step(self, action):
            result = super().step(action)
            return result[0], float("inf") if self.steps == 3 else 1.0, *result[2:]

    return [functools.partial(envs.CountingEnv, 100), functools.partial(Env, length)]


@ALL
def test_a_cut_episode_whose_environment_fails_in_reset_is_the_last_of_it(backend):
    safety = Safety("drop", on_invalid_data="truncate")
    vector = backend(paid_too_much(envs.boom), num_workers=2, safety=safety)
    *_, truncated, infos = steps_to_fault(vector)
    np.testing.assert_array_equal(truncated, [False, True])
    for k in range(4, 6):
        np.testing.assert_array_equal(infos["valid"], [True, False])
        observations, rewards, _, truncated, infos = step(vector)
        np.testing.assert_array_equal(observations, [[1, k], [1, 2]])
        np.testing.assert_array_equal(rewards, [1, 0])
        assert not truncated.any()
    expected = {"invalid_data": 1, "lost_steps": 1, "env_errors": 1, "dropped_envs": 1}
    assert vector.faults == expected
    vector.close()


@ALL
@pytest.mark.parametrize("policy", ["replace", "truncate"])
def test_the_last_step_before_a_reset_that_fails_is_looked_at(backend, policy):
    lost = policy == "truncate"
    safety = Safety("drop", on_invalid_data=policy)
    vector = backend(paid_too_much(envs.boom, length=3), num_workers=2, safety=safety)
    _, rewards, _, truncated, infos = steps_to_fault(vector)
    np.testing.assert_array_equal(rewards, [1, 0])
    np.testing.assert_array_equal(truncated, [False, True])
    np.testing.assert_array_equal(infos.get("valid", [True, True]), [True, not lost])
    np.testing.assert_array_equal(infos["final_obs"][1], [1, 2 if lost else 3])
    expected = {"invalid_data": 1, "env_errors": 1, "dropped_envs": 1}
    assert vector.faults == expected | ({"lost_steps": 1} if lost else {})
    vector.close()


@ALL
def test_a_cut_episode_whose_environment_fails_in_reset_is_an_error(backend):
    safety = Safety(on_invalid_data="truncate")
    vector = backend(paid_too_much(envs.boom), num_workers=2, safety=safety)
    with pytest.raises(WorkerError, match=r"environment 1 failed in reset.*boom"):
        steps_to_fault(vector)
    with pytest.raises(WorkerError, match="call reset"):
        step(vector)
    vector.close()


@pytest.mark.parametrize("on_env_error", ["restart", "drop"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_when_a_cut_episode_is_reset_is_replaced(on_env_error, workers):
    safety = Safety(on_env_error, on_invalid_data="truncate")
    factories = [*paid_too_much(envs.kill_self), envs.CountingEnv]
    vector = ProcessVectorEnv(factories, num_workers=1 + workers, safety=safety)
    observations, *_, infos = steps_to_fault(vector)
    together = workers == 1
    dropped = on_env_error == "drop"
    np.testing.assert_array_equal(infos["valid"], [not together, False, True])
    first = [1, 3] if not together else [1, 2] if dropped else [1, 0]
    np.testing.assert_array_equal(observations, [first, [1, 2] if dropped else [1, 0], [1, 3]])
    assert vector.faults["worker_deaths"] == vector.faults["invalid_data"] == 1
    assert vector.faults["dropped_envs"] == dropped * (1 + together)
    *_, infos = step(vector)
    assert ("valid" in infos) == dropped
    vector.close()
