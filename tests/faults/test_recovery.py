"""Environments that fail are begun anew or dropped: the batch stays whole, and nothing is torn."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time

import envs_for_tests as envs
import numpy as np
import pytest
from gymnasium import spaces
from leaks import children
from test_workers import ALL, with_fault

from starling.envs import restarts
from starling.envs.process import ProcessVectorEnv
from starling.envs.safety import Safety
from starling.envs.serial import SerialVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.envs.vector_env import heeding
from starling.errors import StepTimeoutError, UserError, WorkerDiedError, WorkerError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]

RESTART, DROP = Safety(on_env_error="restart"), Safety(on_env_error="drop")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 0.0)


def step(vector):
    return vector.step(np.ones(vector.num_envs, np.int64))


def kill_worker(vector, w):
    """Kills a worker that has nothing to do."""
    victim = vector._workers._crew[w].process
    victim.kill()
    victim.wait()


def steps_to_fault(vector):
    """Three steps, of which the third is the one that fails; returns what that gave."""
    vector.reset()
    return [step(vector) for _ in range(3)][-1]


# ---- one environment raises


@ALL
def test_an_environment_that_raises_begins_anew(backend, caplog):
    vector = backend(with_fault(envs.boom), num_workers=2, seed=4, safety=RESTART)
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
    vector.close()


@ALL
def test_an_environment_that_raises_is_dropped(backend):
    vector = backend(with_fault(envs.boom), num_workers=2, safety=DROP)
    observations, rewards, _, truncated, infos = steps_to_fault(vector)
    for later in range(4):
        np.testing.assert_array_equal(observations[1], [1, 2])  # the last that was good
        np.testing.assert_array_equal(rewards, [1, 0, 1])
        assert truncated[1] == (later == 0)
        np.testing.assert_array_equal(infos["valid"], [True, False, True])
        observations, rewards, _, truncated, infos = step(vector)
    np.testing.assert_array_equal(observations, [[2, 2], [1, 2], [2, 2]])
    assert vector.faults == {"env_errors": 1, "dropped_envs": 1, "lost_steps": 1}
    vector.close()


@ALL
def test_without_any_environment_there_is_no_going_on(backend):
    vector = backend(with_fault(envs.boom, n=1, broken=0), safety=DROP)
    with pytest.raises(WorkerError, match=r"no environment is left.*environment 0.*boom"):
        steps_to_fault(vector)
    with pytest.raises(WorkerError, match="no longer be used"):
        vector.reset()
    vector.close()


@ALL
@pytest.mark.parametrize("safety", [RESTART, DROP], ids=["restart", "drop"])
def test_a_step_is_kept_if_only_the_reset_after_it_failed(backend, safety):
    class FailsAtTheSecondReset(envs.CountingEnv):
        def reset(self, **kwargs):
            if self.episodes == 1:
                self.episodes += 1
                raise ValueError("boom")
            return super().reset(**kwargs)

    factories = [functools.partial(FailsAtTheSecondReset, 2, True), envs.CountingEnv]
    vector = backend(factories, safety=safety)
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
    vector.close()


@ALL
def test_no_step_is_lost_if_a_reset_fails(backend, tmp_path):
    def fails_once():
        if not (tmp_path / "failed").exists():
            (tmp_path / "failed").touch()
            envs.boom()

    factories = [functools.partial(envs.FaultyEnv, fails_once, "reset"), envs.CountingEnv]
    vector = backend(factories, num_workers=2, safety=RESTART)
    vector.reset()
    assert vector.faults == {"env_errors": 1, "restarts": 1}
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    assert "valid" not in infos
    vector.close()


@ALL
@pytest.mark.parametrize("where", ["reset", "step"])
def test_restarts_come_to_an_end(backend, where):
    def fails_always():
        return envs.FaultyEnv(envs.boom, where, step=1)

    safety = Safety(on_env_error="restart", max_restarts=3)
    vector = backend([envs.CountingEnv, fails_always], safety=safety)
    with pytest.raises(WorkerError, match=rf"after 3 restarts.*in {where}.*ValueError: boom"):
        [vector.reset(), *(step(vector) for _ in range(9))]
    assert vector.faults["env_errors"] == 4
    with pytest.raises(WorkerError, match=r"no longer be used.*after 3 restarts"):
        vector.reset()
    vector.close()


@ALL
def test_pauses_between_restarts_end_when_they_are_asked_to(backend, monkeypatch, tmp_path):
    """The simulator has gone for a while; what it is stopped in, a rollout say, is given up."""
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 600.0)
    monkeypatch.setattr(restarts, "_LONGEST_PAUSE", 600.0)
    gone = tmp_path / "gone"

    def fault():
        gone.touch()
        envs.boom()

    def make():
        if gone.exists():
            raise OSError("the simulator has gone")
        return envs.FaultyEnv(fault)

    vector = backend([make] * 2, num_workers=2, safety=RESTART)
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
    vector.close()


def test_restarts_of_long_ago_do_not_count(monkeypatch):
    monkeypatch.setattr(restarts, "RESTART_WINDOW", 20)
    factory = functools.partial(envs.FaultyEnv, envs.boom, "step", 8)  # 16 rows from fault to fault
    safety = Safety(on_env_error="restart", max_restarts=4)
    vector = SerialVectorEnv([factory] * 2, safety=safety)
    vector.reset()
    for _ in range(100):
        step(vector)
    assert vector.faults["restarts"] > 20
    vector.close()


def test_a_failed_restart_is_tried_again(tmp_path):
    """The constructor fails twice once the environment has failed."""
    made = tmp_path / "made"

    def make():
        with made.open("a") as file:
            file.write("x")
        if made.stat().st_size in (2, 3):
            raise OSError("not yet")
        return envs.FaultyEnv(envs.boom)

    vector = SerialVectorEnv([make], safety=RESTART)
    observations, *_ = steps_to_fault(vector)
    np.testing.assert_array_equal(observations, [[1, 0]])
    assert vector.faults == {"env_errors": 3, "restarts": 1, "lost_steps": 1}
    vector.close()


def test_other_spaces_than_before_are_refused(tmp_path):
    made = tmp_path / "made"

    def make():
        env = envs.FaultyEnv(envs.boom)
        if made.exists():
            env.observation_space = spaces.Box(0, 1, (3,), np.float32)
        made.touch()
        return env

    vector = SerialVectorEnv([make], safety=RESTART)
    with pytest.raises(UserError, match="same observation_space"):
        steps_to_fault(vector)
    vector.close()


# ---- a worker dies or hangs


def killed_in_the_write():
    """Dies between two leaves of an observation, of which the first has been written."""
    space = spaces.Dict({"a": envs.CountingEnv.observation_space, "b": spaces.Discrete(2)})

    class Deadly(dict):
        def __getitem__(self, key):
            return envs.kill_self() if key == "b" else super().__getitem__(key)

    class Env(envs.CountingEnv):
        observation_space = space

        def _observation(self):
            values = {"a": super()._observation(), "b": 0}
            return Deadly(values) if (self.episodes, self.steps) == (1, 3) else values

    return Env()


@pytest.mark.parametrize("fault", [envs.kill_self, functools.partial(os._exit, 7)])
def test_a_worker_that_dies_is_replaced(fault, caplog):
    vector = ProcessVectorEnv(with_fault(fault), num_workers=2, seed=4, safety=RESTART)
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
    vector.close()


def test_what_a_dying_worker_had_half_written_is_never_delivered():
    safety = Safety(on_env_error="restart", max_restarts=1)
    vector = ProcessVectorEnv([killed_in_the_write] * 2, num_workers=2, safety=safety)
    vector.reset()
    step(vector)
    step(vector)
    with pytest.raises(WorkerError, match=r"after 1 restarts.*signal 9"):  # both die
        step(vector)
    vector.close()
    vector = ProcessVectorEnv([killed_in_the_write], num_workers=1, safety=RESTART)
    observations, *_, infos = steps_to_fault(vector)
    np.testing.assert_array_equal(infos["final_obs"][0]["a"], [1, 2])
    np.testing.assert_array_equal(observations["a"], [[1, 0]])
    vector.close()


def test_a_worker_killed_between_steps_is_replaced():
    vector = ProcessVectorEnv([envs.CountingEnv] * 3, num_workers=3, safety=RESTART)
    vector.reset()
    step(vector)
    kill_worker(vector, 1)
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 2], [1, 0], [1, 2]])
    np.testing.assert_array_equal(infos["valid"], [True, False, True])
    vector.close()


def test_the_state_of_a_lost_worker_is_that_in_which_it_is_replaced():
    vector = ProcessVectorEnv(
        [envs.CountingEnv] * 3, num_workers=3, seed=4, episode_seeds=True, safety=RESTART
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
    vector.close()


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
def test_a_worker_that_dies_unnoticed_is_replaced_when_it_is_restored(where, tmp_path):
    """It was killed just before, or dies in the steps that bring its episode back."""
    factories = [envs.CountingEnv] * 3
    factories[1] = functools.partial(DiesWhenArmed, tmp_path / "armed", once=True)
    vector = ProcessVectorEnv(factories, num_workers=3, episode_seeds=True, safety=RESTART)
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
    vector.close()


def test_a_worker_that_dies_whenever_it_is_restored_ends_it(tmp_path):
    factory = functools.partial(DiesWhenArmed, tmp_path / "armed", once=False)
    safety = Safety(on_env_error="restart", max_restarts=2)
    vector = ProcessVectorEnv([factory], episode_seeds=True, safety=safety)
    vector.reset(seed=4)
    step(vector)
    states = vector.state()
    (tmp_path / "armed").touch()
    with pytest.raises(WorkerDiedError, match=r"after 2 restarts.*signal 9"):
        vector.restore(states)
    vector.close()


def test_a_worker_that_dies_while_another_is_replaced_is_noticed(tmp_path):
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

    vector = ProcessVectorEnv([First, second], num_workers=2, step_timeout=10, safety=RESTART)
    armed.touch()
    steps_to_fault(vector)
    observations, *_, infos = step(vector)
    np.testing.assert_array_equal(observations, [[1, 0], [1, 1]])
    np.testing.assert_array_equal(infos["valid"], [False, True])
    assert vector.faults["worker_deaths"] == vector.faults["env_errors"] == 1
    vector.close()


def test_a_worker_that_dies_is_dropped_with_what_it_had():
    vector = ProcessVectorEnv(with_fault(envs.kill_self), num_workers=2, safety=DROP)
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
    vector.close()


def test_a_worker_that_dies_when_an_environment_is_dropped_is_dropped_as_well():
    class Env(envs.FaultyEnv):
        def close(self):
            envs.kill_self()

    factories = [functools.partial(Env, envs.boom), envs.CountingEnv, envs.CountingEnv]
    vector = ProcessVectorEnv(factories, num_workers=2, safety=DROP)
    steps_to_fault(vector)
    *_, infos = step(vector)
    np.testing.assert_array_equal(infos["valid"], [False, False, True])
    vector.close()


def test_what_is_left_after_a_drop_can_be_asked_and_reset():
    vector = ProcessVectorEnv(with_fault(envs.kill_self), num_workers=2, safety=DROP)
    steps_to_fault(vector)
    assert vector.get_attr("length") == (None, None, 5)
    vector.set_attr("length", 7)
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations[2], [2, 0])
    step(vector)
    vector.close()


def test_a_drop_touches_no_environment_that_is_under_way(tmp_path):
    """Environment 0 is dropped while environment 1 is at a gate, in partial batches."""
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)
    factories = [
        functools.partial(envs.FaultyEnv, envs.kill_self, "step", 1),
        functools.partial(envs.GatedEnv, gate),
        envs.CountingEnv,
    ]
    vector = ProcessVectorEnv(factories, num_workers=3, batch_size=1, safety=DROP)
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
    with open(gate, "wb") as pipe:
        pipe.write(b"!")
    while 1 not in seen:
        observations, *_, infos = vector.recv()
        seen[int(infos["env_id"][0])] = True
    np.testing.assert_array_equal(observations, [[1, 1]])
    vector.close()


def test_fewer_environments_than_a_batch_end_it():
    factories = [functools.partial(envs.FaultyEnv, envs.kill_self, "step", 2)] * 3
    factories.append(envs.CountingEnv)
    vector = ProcessVectorEnv(factories, num_workers=4, batch_size=2, safety=DROP)
    vector.reset()
    vector.send([1] * 4)

    def go_on():
        for _ in range(20):
            *_, infos = vector.recv()
            vector.send([1, 1], infos["env_id"])

    with pytest.raises(WorkerDiedError, match=r"with fewer left than a batch \(2\)"):
        go_on()
    vector.close()


def test_a_death_in_a_partial_reset_ends_it():
    """The worker's other environments were in an episode that nobody could end rightly."""
    vector = ProcessVectorEnv([envs.CountingEnv] * 4, num_workers=2, safety=RESTART)
    vector.reset()
    step(vector)
    kill_worker(vector, 0)
    mask = np.array([True, False, False, False])
    with pytest.raises(WorkerDiedError, match="other episodes were under way"):
        vector.reset(options={"reset_mask": mask})
    vector.close()


def test_a_restored_environment_that_fails_ends_with_what_it_was_restored_to():
    factories = [functools.partial(envs.FaultyEnv, envs.boom, "step", 6)] * 2
    first = SerialVectorEnv(factories, safety=RESTART, episode_seeds=True)
    first.reset(seed=3)
    step(first)
    step(first)
    second = SerialVectorEnv(
        [functools.partial(envs.FaultyEnv, envs.boom)] * 2, safety=RESTART, episode_seeds=True
    )
    second.restore(first.state())
    *_, infos = step(second)  # the third
    np.testing.assert_array_equal(list(infos["final_obs"]), [[1, 2], [1, 2]])
    first.close()
    second.close()


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_worker_that_hangs_is_replaced_and_no_late_answer_is_taken(batch_size):
    vector = ProcessVectorEnv(
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
    vector.close()


def test_a_thread_that_hangs_cannot_be_replaced(tmp_path):
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)
    factories = [functools.partial(envs.GatedEnv, gate), envs.GatedEnv]
    vector = ThreadVectorEnv(factories, num_workers=2, step_timeout=0.2, safety=RESTART)
    vector.reset()
    with pytest.raises(StepTimeoutError, match="use backend='process'"):
        vector.step([0, 0])
    with open(gate, "wb") as pipe:
        pipe.write(b"!")
    vector.close()


def test_a_worker_that_dies_at_every_start_ends_it():
    def make(path):
        env = envs.FaultyEnv(envs.kill_self)
        if os.path.exists(path):
            envs.kill_self()
        open(path, "w").close()
        return env

    path = f"/tmp/starling-test-{os.getpid()}"
    safety = Safety(on_env_error="restart", max_restarts=3)
    vector = ProcessVectorEnv([functools.partial(make, path)], safety=safety)
    try:
        with pytest.raises(WorkerDiedError, match=r"after 3 restarts.*signal 9"):
            steps_to_fault(vector)
    finally:
        os.remove(path)
        vector.close()
    assert vector.faults["worker_deaths"] == 4


@ALL
def test_what_is_called_by_name_is_not_begun_anew(backend):
    vector = backend([envs.CountingEnv] * 2, num_workers=2, safety=RESTART)
    vector.reset()
    with pytest.raises(WorkerError, match=r"environment \d failed in no_such_thing\(\)"):
        vector.call("no_such_thing")
    observations, *_ = step(vector)
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1]])
    assert not vector.faults
    vector.close()


def test_a_worker_that_dies_at_a_call_ends_it():
    class Env(envs.CountingEnv):
        def end(self):
            envs.kill_self()

    vector = ProcessVectorEnv([Env] * 2, num_workers=2, safety=RESTART)
    vector.reset()
    with pytest.raises(WorkerDiedError, match="signal 9"):
        vector.call("end")
    with pytest.raises(WorkerError, match=r"no longer be used.*signal 9"):
        step(vector)
    vector.close()


# ---- what environments do to their process


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_grows_is_replaced_and_its_episodes_are_cut(workers, caplog):
    first = ProcessVectorEnv([envs.LeakyEnv] * 2, num_workers=1)
    limit = first.worker_memory[0] + 50
    first.close()
    safety = Safety(worker_max_rss=limit)
    vector = ProcessVectorEnv([envs.LeakyEnv] * 2, num_workers=workers, safety=safety)
    vector.reset()
    lengths, largest = [], 0.0
    for _ in range(20_000):
        vector._recovery._next_look = 0.0
        observations, rewards, _, truncated, infos = step(vector)
        largest = max(largest, *vector.worker_memory)
        np.testing.assert_array_equal(rewards, [1, 1])
        assert "valid" not in infos
        assert truncated[0] == truncated[1]
        if truncated[0]:
            np.testing.assert_array_equal(observations, [[1, 0]] * 2)
            lengths.append(infos["final_obs"][0][1])
            if len(lengths) == 3:
                break
    assert len(lengths) == 3
    assert max(lengths) < 40 * workers
    assert largest < limit + 10
    assert vector.faults == {"recycled_workers": 3 * workers}
    assert "another takes its place" in caplog.text
    vector.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fault", [envs.boom, envs.kill_self])
@pytest.mark.parametrize("on_env_error", ["raise", "restart", "drop"])
def test_a_large_worker_that_cannot_be_replaced_at_once(fault, on_env_error, tmp_path):
    """The steps that led there are whole, whatever comes of it."""
    made, failed = tmp_path / "made", tmp_path / "failed"

    def make():
        if made.exists() and not failed.exists():
            failed.touch()
            fault()
        made.touch()
        return envs.LeakyEnv()

    vector = ProcessVectorEnv(
        [make, envs.CountingEnv],
        num_workers=2,
        safety=Safety(on_env_error, worker_max_rss=1e6),
    )
    vector.reset()
    vector._recovery._most_memory = vector._workers.memory_of(0) + (10 << 20)

    def step_until_it_is_too_large():
        for k in range(1, 1000):
            vector._recovery._next_look = 0.0
            result = step(vector)
            if vector.faults:
                return k, result
        return None

    if on_env_error == "raise":
        with pytest.raises(WorkerError, match=r"could not be made.*boom|signal 9"):
            step_until_it_is_too_large()
        vector.close()
        return
    k, (observations, rewards, _, truncated, infos) = step_until_it_is_too_large()
    np.testing.assert_array_equal(rewards, [1, 1])
    assert truncated[0]
    assert "valid" not in infos
    np.testing.assert_array_equal(infos["final_obs"][0], [1, k])
    kind = "env_errors" if fault is envs.boom else "worker_deaths"
    then = "restarts" if on_env_error == "restart" else "dropped_envs"
    replaced = {"recycled_workers": 1} if on_env_error == "restart" else {}
    assert vector.faults == {kind: 1, then: 1, **replaced}
    if on_env_error == "restart":
        np.testing.assert_array_equal(observations[0], [1, 0])
    *_, infos = step(vector)
    assert ("valid" in infos) == (on_env_error == "drop")
    vector.close()


def test_a_limit_that_no_worker_can_keep_is_refused():
    with pytest.raises(UserError, match=r"worker_max_rss is 5 MB, and a worker process takes \d+"):
        ProcessVectorEnv([envs.CountingEnv], safety=Safety(worker_max_rss=5))
    with pytest.raises(UserError, match="worker_max_rss needs worker processes"):
        SerialVectorEnv([envs.CountingEnv], safety=Safety(worker_max_rss=500))


def test_a_greedy_environment_harms_nobody():
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
import envs_for_tests as envs
from starling.envs.process import ProcessVectorEnv
here = os.getcwd()
vector = ProcessVectorEnv([envs.GreedyEnv] * 2, num_workers=2)
vector.reset()
for k in range(1, 5):
    assert vector.step([0, 0])[0].tolist() == [[1, k]] * 2
assert os.getcwd() == here
vector.close()
print("done")
"""
    folder = os.path.dirname(envs.__file__)
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == "done\n"
    assert "xxxxxxxx" in done.stderr


# ---- slow ones


class SlowEnv(envs.CountingEnv):
    """Computes for a millisecond at each step."""

    def step(self, action):
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        return super().step(action)


@ALL
def test_a_slow_worker_is_known(backend):
    """How much slower it is than the others shows in what training reports."""
    vector = backend([SlowEnv, envs.CountingEnv], num_workers=2)
    vector.reset()
    for _ in range(50):
        step(vector)
    busy = vector.busy_seconds
    assert busy is not None
    assert busy[0] >= 0.05
    assert busy[1] < busy[0]
    vector.close()
    assert vector.busy_seconds is None


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv])
def test_nobody_waits_for_a_slow_environment_in_partial_batches(backend, tmp_path):
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)
    factories = [functools.partial(envs.GatedEnv, gate), envs.GatedEnv]
    vector = backend(factories, num_workers=2, batch_size=1)
    vector.reset()
    vector.send([0, 0])
    for k in range(1, 20):
        observations, *_, infos = vector.recv()
        assert infos["env_id"].tolist() == [1]
        np.testing.assert_array_equal(observations, [[1, k]])
        vector.send([0], [1])
    vector.recv()
    with open(gate, "wb") as pipe:
        pipe.write(b"!")
    observations, *_, infos = vector.recv()
    assert infos["env_id"].tolist() == [0]
    np.testing.assert_array_equal(observations, [[1, 1]])
    vector.close()
