"""Workers that die are replaced: nothing is torn, and nothing waits for the dead."""

from __future__ import annotations

import functools
import os

import envs_for_tests as envs
import numpy as np
import pytest
from failing import RESTART, kill_worker, step, steps_to_fault, with_fault
from leaks import children

from starling.envs.process import ProcessVectorEnv
from starling.envs.safety import Safety
from starling.errors import WorkerDiedError, WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks", "no_pauses")]


@pytest.mark.parametrize("fault", [envs.kill_self, functools.partial(os._exit, 7)])
def test_a_worker_that_dies_is_replaced(make, fault, caplog):
    vector = make(ProcessVectorEnv, with_fault(fault), num_workers=2, seed=4, safety=RESTART)
    before = children()
    observations, rewards, _, truncated, infos = steps_to_fault(vector)
    # environment 0 had made its step, and shared the worker
    np.testing.assert_array_equal(observations, [[1, 0], [1, 0], [1, 3]])
    np.testing.assert_array_equal(rewards, [0, 0, 1])
    np.testing.assert_array_equal(truncated, [True, True, False])
    np.testing.assert_array_equal(infos["valid"], [False, False, True])
    np.testing.assert_array_equal(list(infos["final_obs"][:2]), [[1, 2], [1, 2]])
    assert vector.faults == {"worker_deaths": 1, "restarts": 1, "lost_steps": 2}
    assert len(children()) == len(before)
    assert children() != before
    assert "environment 1" in caplog.text
    observations, *_ = step(vector)
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1], [1, 4]])
    seeds = vector.get_attr("seed_used")
    assert len(set(seeds)) == 3


def test_what_a_dying_worker_had_half_written_is_never_delivered(make):
    safety = Safety(on_env_error="restart", max_restarts=1)
    killed_in_the_write = functools.partial(envs.HalvesEnv, envs.kill_self, step=3)
    vector = make(ProcessVectorEnv, [killed_in_the_write] * 2, num_workers=2, safety=safety)
    vector.reset()
    step(vector)
    step(vector)
    with pytest.raises(WorkerError, match=r"after 1 restarts.*signal 9"):  # both die
        step(vector)
    vector = make(ProcessVectorEnv, [killed_in_the_write], num_workers=1, safety=RESTART)
    observations, *_, infos = steps_to_fault(vector)
    np.testing.assert_array_equal(infos["final_obs"][0]["a"], [1, 2])
    np.testing.assert_array_equal(observations["a"], [[1, 0]])


def test_a_worker_killed_between_steps_is_replaced(make):
    vector = make(ProcessVectorEnv, [envs.CountingEnv] * 3, num_workers=3, safety=RESTART)
    vector.reset()
    step(vector)
    kill_worker(vector, 1)
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 2], [1, 0], [1, 2]])
    np.testing.assert_array_equal(infos["valid"], [True, False, True])


def test_a_worker_that_dies_while_another_is_replaced_is_noticed(make, tmp_path):
    """Environment 1 fails, and when it is made anew the idle worker of environment 0 is killed."""
    victim, armed = tmp_path / "pid", tmp_path / "armed"

    class First(envs.CountingEnv):
        def __init__(self):
            super().__init__()
            victim.write_text(str(os.getpid()))

    def second():
        if armed.exists():
            armed.unlink()
            envs.kill_and_wait(int(victim.read_text()))
        return envs.FaultyEnv(envs.boom)

    vector = make(ProcessVectorEnv, [First, second], num_workers=2, step_timeout=10, safety=RESTART)
    armed.touch()
    steps_to_fault(vector)
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 0], [1, 1]])
    np.testing.assert_array_equal(infos["valid"], [False, True])
    assert vector.faults["worker_deaths"] == vector.faults["env_errors"] == 1


def test_a_death_in_a_partial_reset_ends_it(make):
    """The worker's other environments were in an episode that nobody could end rightly."""
    vector = make(ProcessVectorEnv, [envs.CountingEnv] * 4, num_workers=2, safety=RESTART)
    vector.reset()
    step(vector)
    kill_worker(vector, 0)
    mask = np.array([True, False, False, False])
    with pytest.raises(WorkerDiedError, match="other episodes were under way"):
        vector.reset(options={"reset_mask": mask})


def test_a_worker_that_dies_at_every_start_ends_it(make, tmp_path):
    def new_env():
        env = envs.FaultyEnv(envs.kill_self)
        if (tmp_path / "made").exists():
            envs.kill_self()
        (tmp_path / "made").touch()
        return env

    safety = Safety(on_env_error="restart", max_restarts=3)
    vector = make(ProcessVectorEnv, [new_env], safety=safety)
    with pytest.raises(WorkerDiedError, match=r"after 3 restarts.*signal 9"):
        steps_to_fault(vector)
    assert vector.faults["worker_deaths"] == 4


def test_a_worker_that_dies_at_a_call_ends_it(make):
    class Env(envs.CountingEnv):
        def end(self):
            envs.kill_self()

    vector = make(ProcessVectorEnv, [Env] * 2, num_workers=2, safety=RESTART)
    vector.reset()
    with pytest.raises(WorkerDiedError, match="signal 9"):
        vector.call("end")
    with pytest.raises(WorkerError, match=r"no longer be used.*signal 9"):
        step(vector)


# ---- states


def test_the_state_of_a_lost_worker_is_that_in_which_it_is_replaced(make):
    vector = make(
        ProcessVectorEnv,
        [envs.CountingEnv] * 3,
        num_workers=3,
        seed=4,
        episode_seeds=True,
        safety=RESTART,
    )
    vector.reset()
    step(vector)
    kill_worker(vector, 1)
    states = vector.state()
    assert [len(state["actions"]) for state in states] == [1, 0, 1]
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 2], [1, 0], [1, 2]])
    np.testing.assert_array_equal(infos["valid"], [True, False, True])
    assert vector.state()[1] == states[1]
    kill_worker(vector, 2)
    vector.state()
    observations, _ = vector.restore(states)
    np.testing.assert_array_equal(observations, [[2, 1], [2, 0], [2, 1]])
    assert vector.faults == {"worker_deaths": 2, "restarts": 2, "lost_steps": 1}


class DiesWhenArmed(envs.CountingEnv):
    """Dies in a step while a file is there, which it takes along if that is to be once."""

    def __init__(self, armed, once):
        super().__init__()
        self.armed, self.once = armed, once

    def step(self, action):
        if self.armed.exists():
            if self.once:
                self.armed.unlink()
            envs.kill_self()
        return super().step(action)


@pytest.mark.parametrize("where", ["idle", "in a step"])
def test_a_worker_that_dies_unnoticed_is_replaced_when_it_is_restored(make, where, tmp_path):
    """It was killed just before, or dies in the steps that bring its episode back."""
    factories = [envs.CountingEnv] * 3
    factories[1] = functools.partial(DiesWhenArmed, tmp_path / "armed", once=True)
    vector = make(ProcessVectorEnv, factories, num_workers=3, episode_seeds=True, safety=RESTART)
    vector.reset(seed=4)
    step(vector)
    states = vector.state()
    if where == "idle":
        kill_worker(vector, 1)
    else:
        (tmp_path / "armed").touch()
    observations, _ = vector.restore(states)
    np.testing.assert_array_equal(observations, [[2, 1]] * 3)
    assert vector.state() == states
    assert vector.faults == {"worker_deaths": 1, "restarts": 1}
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[2, 2]] * 3)
    assert "valid" not in infos


def test_a_worker_that_dies_whenever_it_is_restored_ends_it(make, tmp_path):
    factory = functools.partial(DiesWhenArmed, tmp_path / "armed", once=False)
    safety = Safety(on_env_error="restart", max_restarts=2)
    vector = make(ProcessVectorEnv, [factory], episode_seeds=True, safety=safety)
    vector.reset(seed=4)
    step(vector)
    states = vector.state()
    (tmp_path / "armed").touch()
    with pytest.raises(WorkerDiedError, match=r"after 2 restarts.*signal 9"):
        vector.restore(states)
