"""Environments that raise are begun anew or dropped: the batch stays whole."""

from __future__ import annotations

import functools

import envs_for_tests as envs
import numpy as np
import pytest
from failing import ALL, DROP, RESTART, step, steps_to_fault, with_fault
from gymnasium import spaces
from gymnasium.wrappers import TransformObservation

from starling.envs import restarts
from starling.envs.safety import Safety
from starling.envs.serial import SerialVectorEnv
from starling.envs.vector_env import heeding
from starling.errors import UserError, WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks", "no_pauses")]


@ALL
def test_an_environment_that_raises_begins_anew(make, backend, caplog):
    vector = make(backend, with_fault(envs.boom), num_workers=2, seed=4, safety=RESTART)
    observations, rewards, terminated, truncated, infos = steps_to_fault(vector)
    np.testing.assert_array_equal(observations, [[1, 3], [1, 0], [1, 3]])
    np.testing.assert_array_equal(rewards, [1, 0, 1])
    np.testing.assert_array_equal(terminated, [False] * 3)
    np.testing.assert_array_equal(truncated, [False, True, False])
    np.testing.assert_array_equal(infos["valid"], [True, False, True])
    np.testing.assert_array_equal(infos["final_obs"][1], [1, 2])
    assert vector.faults == {"env_errors": 1, "restarts": 1, "lost_steps": 1}
    assert "environment 1 failed in step()" in caplog.text
    seed = vector.get_attr("seed_used")[1]
    assert f"environments [1] begin anew, with seeds [{seed}]" in caplog.text
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 4], [1, 1], [1, 4]])
    assert "valid" not in infos


@ALL
def test_an_environment_that_raises_is_dropped(make, backend):
    vector = make(backend, with_fault(envs.boom), num_workers=2, safety=DROP)
    observations, rewards, _, truncated, infos = steps_to_fault(vector)
    for later in range(4):
        np.testing.assert_array_equal(observations[1], [1, 2])  # the last that was good
        np.testing.assert_array_equal(rewards, [1, 0, 1])
        assert truncated[1] == (later == 0)
        np.testing.assert_array_equal(infos["valid"], [True, False, True])
        observations, rewards, _, truncated, infos = step(vector)
    np.testing.assert_array_equal(observations, [[2, 2], [1, 2], [2, 2]])
    assert vector.faults == {"env_errors": 1, "dropped_envs": 1, "lost_steps": 1}


@ALL
def test_without_any_environment_there_is_no_going_on(make, backend):
    vector = make(backend, with_fault(envs.boom, n=1, broken=0), safety=DROP)
    with pytest.raises(WorkerError, match=r"no environment is left.*environment 0.*boom"):
        steps_to_fault(vector)
    with pytest.raises(WorkerError, match="no longer be used"):
        vector.reset()


@ALL
@pytest.mark.parametrize("safety", [RESTART, DROP], ids=["restart", "drop"])
def test_a_step_is_kept_if_only_the_reset_after_it_failed(make, backend, safety):
    class FailsAtTheSecondReset(envs.CountingEnv):
        def reset(self, **kwargs):
            if self.episodes == 1:
                self.episodes += 1
                raise ValueError("boom")
            return super().reset(**kwargs)

    factories = [functools.partial(FailsAtTheSecondReset, 2, True), envs.CountingEnv]
    vector = make(backend, factories, safety=safety)
    vector.reset()
    step(vector)
    observations, rewards, terminated, truncated, infos = step(vector)
    dropped = safety is DROP
    np.testing.assert_array_equal(observations[0], [1, 1 if dropped else 0])  # if not, a new one's
    np.testing.assert_array_equal(rewards, [1, 1])
    np.testing.assert_array_equal(terminated, [True, False])
    assert not truncated.any()
    assert "valid" not in infos
    np.testing.assert_array_equal(infos["final_obs"][0], [1, 2])
    _, rewards, terminated, *_, infos = step(vector)
    assert ("valid" in infos) == dropped
    assert rewards[0] == (not dropped)
    assert not terminated.any()
    assert vector.faults == {"env_errors": 1, "dropped_envs" if dropped else "restarts": 1}


@ALL
def test_no_step_is_lost_if_a_reset_fails(make, backend, tmp_path):
    def fails_once():
        if not (tmp_path / "failed").exists():
            (tmp_path / "failed").touch()
            envs.boom()

    factories = [functools.partial(envs.FaultyEnv, fails_once, "reset"), envs.CountingEnv]
    vector = make(backend, factories, num_workers=2, safety=RESTART)
    vector.reset()
    assert vector.faults == {"env_errors": 1, "restarts": 1}
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    assert "valid" not in infos


@ALL
@pytest.mark.parametrize("where", ["reset", "step"])
def test_restarts_come_to_an_end(make, backend, where):
    def fails_always():
        return envs.FaultyEnv(envs.boom, where, step=1)

    safety = Safety(on_env_error="restart", max_restarts=3)
    vector = make(backend, [envs.CountingEnv, fails_always], safety=safety)
    with pytest.raises(WorkerError, match=rf"after 3 restarts.*in {where}.*ValueError: boom"):
        [vector.reset(), *(step(vector) for _ in range(9))]
    assert vector.faults["env_errors"] == 4
    with pytest.raises(WorkerError, match=r"no longer be used.*after 3 restarts"):
        vector.reset()


@ALL
def test_pauses_between_restarts_end_when_they_are_asked_to(make, backend, monkeypatch, tmp_path):
    """The simulator has gone for a while; what it is stopped in, a rollout say, is given up."""
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 600.0)
    monkeypatch.setattr(restarts, "_LONGEST_PAUSE", 600.0)
    gone = tmp_path / "gone"

    def fault():
        gone.touch()
        envs.boom()

    def new_env():
        if gone.exists():
            raise OSError("the simulator has gone")
        return envs.FaultyEnv(fault)

    vector = make(backend, [new_env] * 2, num_workers=2, safety=RESTART)
    vector.reset()
    step(vector)
    step(vector)
    later = []
    with heeding(vector, gone.exists):
        step(vector)
        later.append("a step")
    assert not later
    with pytest.raises(WorkerError, match=r"given up; call reset"):
        step(vector)
    gone.unlink()
    vector.reset()
    step(vector)


def test_restarts_of_long_ago_do_not_count(make, monkeypatch):
    monkeypatch.setattr(restarts, "RESTART_WINDOW", 20)
    factory = functools.partial(envs.FaultyEnv, envs.boom, "step", 8)  # 16 rows from fault to fault
    safety = Safety(on_env_error="restart", max_restarts=4)
    vector = make(SerialVectorEnv, [factory] * 2, safety=safety)
    vector.reset()
    for _ in range(100):
        step(vector)
    assert vector.faults["restarts"] > 20


def test_a_failed_restart_is_tried_again(make, tmp_path):
    """The constructor fails twice once the environment has failed."""
    made = tmp_path / "made"

    def new_env():
        with made.open("a") as file:
            file.write("x")
        if made.stat().st_size in (2, 3):
            raise OSError("not yet")
        return envs.FaultyEnv(envs.boom)

    vector = make(SerialVectorEnv, [new_env], safety=RESTART)
    observations, *_ = steps_to_fault(vector)
    np.testing.assert_array_equal(observations, [[1, 0]])
    assert vector.faults == {"env_errors": 3, "restarts": 1, "lost_steps": 1}


def test_what_a_restart_converts_is_told_though_another_has_to_be_tried_again(make, tmp_path):
    made = tmp_path / "made"

    def new_env():
        with made.open("a") as file:
            file.write("x")
        number, env = made.stat().st_size, envs.FaultyEnv(envs.boom)
        if number == 4:
            raise OSError("not yet")
        return TransformObservation(env, np.float64, env.observation_space) if number == 3 else env

    vector = make(SerialVectorEnv, [new_env] * 2, num_workers=1, safety=RESTART)
    steps_to_fault(vector)
    assert vector.faults == {"env_errors": 3, "restarts": 2, "lost_steps": 2}
    with pytest.warns(UserWarning, match="observation: float64 given"):
        step(vector)


def test_other_spaces_than_before_are_refused(make, tmp_path):
    made = tmp_path / "made"

    def new_env():
        env = envs.FaultyEnv(envs.boom)
        if made.exists():
            env.observation_space = spaces.Box(0, 1, (3,), np.float32)
        made.touch()
        return env

    vector = make(SerialVectorEnv, [new_env], safety=RESTART)
    with pytest.raises(UserError, match="same observation_space"):
        steps_to_fault(vector)


def test_a_restored_environment_that_fails_ends_with_what_it_was_restored_to(make):
    first, second = (
        make(
            SerialVectorEnv,
            [functools.partial(envs.FaultyEnv, envs.boom, "step", fails_at)] * 2,
            safety=RESTART,
            episode_seeds=True,
        )
        for fails_at in (6, 3)
    )
    first.reset(seed=3)
    step(first)
    step(first)
    second.restore(first.state())
    *_, infos = step(second)  # the third
    np.testing.assert_array_equal(list(infos["final_obs"]), [[1, 2], [1, 2]])


@ALL
def test_what_is_called_by_name_is_not_begun_anew(make, backend):
    vector = make(backend, [envs.CountingEnv] * 2, num_workers=2, safety=RESTART)
    vector.reset()
    with pytest.raises(WorkerError, match=r"environment \d failed in no_such_thing\(\)"):
        vector.call("no_such_thing")
    observations, *_ = step(vector)
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    assert not vector.faults
