"""Actors that collect while the policy learns: what they hand over, and how they end."""

from __future__ import annotations

import threading
import traceback
from typing import Any
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
from counters import metrics_of
from envs_for_tests import CountingEnv

import starling
from starling.errors import StarlingError, UserError, WorkerError
from starling.reporting.metrics import METRICS
from starling.storage.rollout import Rollout, RolloutBuffer, join_rollouts
from starling.training import actor_pool
from starling.training.async_ppo import AsyncPPO
from starling.training.parallel_ppo import ParallelPPO
from starling.training.policy_lag import lag_class
from starling.training.trainer import Iteration

pytestmark = pytest.mark.usefixtures("no_leaks")

N, T = 4, 16
SMALL = {
    "num_envs": N,
    "num_steps": T,
    "num_actors": 2,
    "mini_batch_size": 32,
    "epochs": 2,
    "hidden_sizes": (8,),
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 4 * N * T,
    "log_interval": 1,
    "save_interval": 0,
}


@pytest.fixture
def make(tmp_path, shared_programs, no_actors_left, closed_at_the_end):
    """Makes agents that are closed in the end, after which no thread may be left."""

    def make_agent(env: Any = "CartPole-v1", kind: Any = AsyncPPO, **settings: Any) -> Any:
        if "resume" not in settings:
            settings = {**SMALL, "log_dir": str(tmp_path), **settings}
        if kind is ParallelPPO:
            settings = {k: v for k, v in settings.items() if k not in ("num_actors", "serial")}
        return closed_at_the_end(kind(env, **settings))

    return make_agent


def never() -> bool:
    return False


# --- in turns, on one thread -------------------------------------------------------------------


@pytest.mark.parametrize("num_actors", [1, 2])
def test_in_turns_it_learns_what_parallel_ppo_learns(make, num_actors):
    """The lag is 0, and with one actor even the noise is the same."""
    ours = make(serial=True, num_actors=num_actors)
    ours.train(quiet=True)
    assert [line["async/policy_lag_max"] for line in metrics_of(ours.run)] == [0] * 4
    again = make(serial=True, num_actors=num_actors)
    again.train(quiet=True)
    np.testing.assert_array_equal(ours.state.params, again.state.params)
    parallel = make(kind=ParallelPPO)
    parallel.train(quiet=True)
    difference = np.abs(ours.state.params - parallel.state.params).max()
    assert (difference < 1e-5) == (num_actors == 1)
    assert ours.step == parallel.step == 4 * N * T


def test_normalisers_follow_every_actor_by_itself(make):
    settings = {"normalize_rewards": True, "normalize_observations": True, "num_actors": 1}
    ours, parallel = make(serial=True, **settings), make(kind=ParallelPPO, **settings)
    for agent in (ours, parallel):
        agent.train(quiet=True)
    np.testing.assert_allclose(ours.state.params, parallel.state.params, atol=1e-5)
    for name in ("observation_statistics", "reward_statistics"):
        mine, theirs = getattr(ours.state, name), getattr(parallel.state, name)
        np.testing.assert_allclose(mine.mean, theirs.mean, rtol=1e-5)
        np.testing.assert_allclose(mine.std, theirs.std, rtol=1e-5)


@pytest.mark.parametrize("num_actors", [1, 2])
def test_compiled_environments_are_collected_from_in_a_program(make, num_actors):
    ours = make(serial=True, num_actors=num_actors, backend="compiled")
    parallel = make(kind=ParallelPPO, backend="compiled")
    for agent in (ours, parallel):
        agent.train(quiet=True)
    assert ours.step == 4 * N * T
    difference = np.abs(ours.state.params - parallel.state.params).max()
    assert (difference < 1e-5) == (num_actors == 1)


def test_a_vector_environment_that_exists_has_one_actor(make):
    agent = make(gym.make_vec("CartPole-v1", N), num_actors=None, backend="auto")
    assert agent.train(quiet=True).steps >= 4 * N * T


# --- on threads of their own -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["serial", "process", "compiled", "envpool"])
def test_rollouts_arrive_once_each_in_order_and_not_too_old(make, backend):
    settings = {"num_envs": 6, "num_actors": 3, "timesteps": 6 * T * 30, "backend": backend}
    agent = make(max_policy_lag=2, num_workers=3, **settings)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ages = []

    def note(iteration: Iteration) -> None:
        for rollout in agent._pool.taken:
            seen[rollout.origin.worker].append(rollout.origin.sequence)
        ages.append(agent._pool.lags)

    agent.train(quiet=True, callbacks=note)
    for numbers in seen.values():
        assert numbers == list(range(len(numbers)))
    assert sum(map(len, seen.values())) == 90 + agent._pool.dropped
    assert max(map(max, ages)) <= 2
    assert max(map(max, ages)) >= 1  # they did collect while it learnt
    rows = (agent.run / "episodes.csv").read_text().splitlines()[1:]
    ends = [int(row.split(",")[0]) for row in rows]
    assert ends == sorted(ends)
    assert agent.step == 6 * T * 30


def test_rollouts_that_are_too_old_are_dropped_and_counted(make):
    agent = make(max_policy_lag=0, timesteps=N * T * 20)
    result = agent.train(quiet=True)
    lines = metrics_of(agent.run)
    assert lines[-1]["async/dropped"] > 0
    assert max(line["async/policy_lag_max"] for line in lines) == 0
    counted = {name: n for name, n in lines[-1].items() if name in LAG_CLASSES}
    assert counted == {"async/policy_lag_0": 20 * agent.make_collector().num_parts}
    assert result.steps == N * T * 20  # what was dropped does not count
    dropped = np.array([line["async/dropped"] for line in lines])
    assert (np.diff(dropped) >= 0).all()


LAG_CLASSES = [lag_class(lag) for lag in (0, 1, 2, 3, 5, 9, 17)]


def test_lags_are_counted_in_classes_that_are_defined():
    assert set(LAG_CLASSES) < set(METRICS)
    assert len(set(LAG_CLASSES)) == 7
    named = {2: "2", 4: "3_to_4", 8: "5_to_8", 16: "9_to_16", 10**6: "above_16"}
    assert {lag: lag_class(lag).removeprefix("async/policy_lag_") for lag in named} == named


class Counting(CountingEnv):
    """Tells how many steps all of its kind have made."""

    steps = 0

    def step(self, action):
        Counting.steps += 1
        return super().step(action)


def test_actors_wait_for_a_learner_that_is_busy(make):
    Counting.steps = 0
    agent = make(Counting)
    pool = agent.make_collector()
    pool.reset(0)
    for thread, actor in zip(pool._threads, pool.actors, strict=True):
        while actor.collector.sequence < 2:
            thread.join(0.01)
        actor.free.put(None)  # comes after the two buffers that it has
        thread.join()
    assert Counting.steps == 2 * N * T


def test_episodes_are_counted_whole_also_where_parts_were_dropped(make):
    agent = make(CountingEnv, max_policy_lag=0, timesteps=N * T * 10)  # of 5 steps
    agent.train(quiet=True)
    rows = (agent.run / "episodes.csv").read_text().splitlines()[1:]
    assert len(rows) > 100
    assert {int(row.split(",")[2]) for row in rows} == {5}


class Failing(gym.Wrapper):
    """Fails at the 100th step of the first environment, once."""

    failures, steps, made = 0, 0, 0

    def __init__(self):
        super().__init__(gym.make("CartPole-v1"))
        self.first = Failing.made == 0
        Failing.made += 1

    def step(self, action):
        Failing.steps += self.first
        if self.first and Failing.steps == 100:
            Failing.failures += 1
            raise ArithmeticError("the pole broke")
        return self.env.step(action)


@pytest.fixture
def failing():
    Failing.failures = Failing.steps = Failing.made = 0
    return Failing


def test_what_ends_an_actor_ends_the_run_with_its_traceback(make, failing):
    agent = make(failing, timesteps=N * T * 50)
    with pytest.raises(Exception, match="the pole broke") as caught:
        agent.train(quiet=True)
    text = "".join(traceback.format_exception(caught.value))
    assert "in step" in text
    assert "actor 0 of 2" in text


@pytest.mark.parametrize("serial", [False, True])
def test_an_actor_that_failed_begins_anew_if_it_may(make, failing, serial):
    agent = make(failing, timesteps=N * T * 20, actor_restarts=1, serial=serial)
    result = agent.train(quiet=True)
    assert (failing.failures, result.status, result.steps) == (1, "completed", N * T * 20)
    assert metrics_of(agent.run)[-1]["faults/actor_restarts"] == 1
    unfinished = agent._before.statistics._running_lengths.copy()
    agent.train(total_timesteps=N * T * 21, quiet=True, stop=lambda: True)
    np.testing.assert_array_equal(agent._before.statistics._running_lengths, unfinished)


class Gated(Failing):
    """Fails as that does, and is made again once the gate is open."""

    gate, open = threading.Event(), 0

    def __init__(self):
        super().__init__()
        Gated.open += 1
        if Failing.made > N:
            assert self.gate.wait(60)

    def close(self):
        Gated.open -= 1
        super().close()


@pytest.fixture
def gated(failing):
    Gated.gate.clear()
    Gated.open = 0
    return Gated


def test_nobody_waits_while_an_actor_gets_other_environments(make, gated):
    """The other one makes whole updates alone until then."""
    agent = make(gated, timesteps=10**6, actor_restarts=1)
    alone = []

    def open_later(iteration: Iteration) -> bool:
        workers = {rollout.origin.worker for rollout in agent._pool.taken}
        if agent._pool.restarted:
            alone.append(workers == {1})
        if sum(alone) == 5:
            gated.gate.set()
        return not any(rollout.origin.restarts for rollout in agent._pool.taken)

    assert agent.train(quiet=True, callbacks=open_later).status == "callback"
    assert sum(alone) >= 5
    assert metrics_of(agent.run)[-1]["faults/actor_restarts"] == 1


def until_it_failed(iteration: Iteration) -> bool:
    return not iteration.agent._pool.restarted  # pyright: ignore


def test_a_run_may_end_while_an_actor_gets_other_environments(make, gated):
    agent = make(gated, timesteps=10**6, actor_restarts=1)
    assert agent.train(quiet=True, callbacks=until_it_failed).status == "callback"
    closing = agent._pool._closing
    opener = threading.Thread(target=lambda: closing.wait(60) and gated.gate.set())
    opener.start()  # what is made comes when nobody wants it any more
    agent.close()
    opener.join()
    assert gated.open == 0


def test_a_run_may_go_on_whose_actor_got_no_other_environments(make, gated, monkeypatch):
    monkeypatch.setattr(gated, "gate", Mock(wait=Mock(return_value=False)))
    agent = make(gated, timesteps=10**6, actor_restarts=1)
    with pytest.raises(WorkerError, match="environment 0 could not be made"):
        agent.train(quiet=True)
    gated.gate.wait.return_value = True
    seen = set()

    def until_both_were_seen(iteration: Iteration) -> bool:
        seen.update(rollout.origin.worker for rollout in agent._pool.taken)
        return len(seen) < 2

    assert agent.train(quiet=True, callbacks=until_both_were_seen).status == "callback"
    assert metrics_of(agent.run)[-1]["faults/actor_restarts"] == 1


class SlowToReset(Failing):
    """Fails as that does; those made later are slow to begin episodes."""

    gate, open = threading.Event(), 0

    def __init__(self):
        super().__init__()
        SlowToReset.open += 1
        self.late = Failing.made > N

    def reset(self, **options):
        assert not self.late or self.gate.wait(60)
        return super().reset(**options)

    def close(self):
        SlowToReset.open -= 1
        super().close()


def test_two_threads_never_have_one_actor(make, failing, monkeypatch):
    SlowToReset.gate.clear()
    SlowToReset.open = 0
    agent = make(SlowToReset, timesteps=10**6, actor_restarts=1)
    result = agent.train(quiet=True, stop=lambda: agent._pool.restarted > 0)
    assert result.status == "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(actor_pool, "_TELL_AFTER", 0.1)
        with pytest.raises(StarlingError, match="starling-actor-0 did not end its step within"):
            agent.train(quiet=True)
    SlowToReset.gate.set()
    seen = set()

    def until_both_were_seen(iteration: Iteration) -> bool:
        seen.update(rollout.origin.worker for rollout in agent._pool.taken)
        return len(seen) < 2

    assert agent.train(quiet=True, callbacks=until_both_were_seen).status == "callback"
    agent.close()
    assert SlowToReset.open == 0


class ShortLived(CountingEnv):
    """One of the first actor's lives, and those that take its place do not."""

    made = 0

    def __init__(self):
        super().__init__()
        ShortLived.made += 1
        self.steps_left = 20 if ShortLived.made == 1 or ShortLived.made > N else 10**9

    def step(self, action):
        self.steps_left -= 1
        if not self.steps_left:
            raise ArithmeticError("too soon")
        return super().step(action)


@pytest.mark.parametrize("serial", [False, True])
def test_pauses_grow_until_an_actor_gives_a_rollout(make, monkeypatch, serial):
    """With 20 steps it gives one of 16."""
    ShortLived.made, pauses = 0, []
    monkeypatch.setattr(actor_pool, "_wait", lambda pause, stop: pauses.append(pause) or True)
    with pytest.raises(WorkerError, match="too soon"):
        make(ShortLived, actor_restarts=4, serial=serial, timesteps=10**6).train(quiet=True)
    assert pauses == [0.0] * 4
    ShortLived.made, pauses[:] = 0, []
    agent = make(ShortLived, actor_restarts=4, serial=serial, timesteps=10**6, num_steps=32)
    with pytest.raises(WorkerError, match="too soon"):
        agent.train(quiet=True)
    assert pauses == pytest.approx([0.0, 0.1, 0.2, 0.4])


def test_a_stop_while_waiting_ends_the_run_and_another_call_goes_on(make):
    agent = make(timesteps=N * T * 10)
    asked = iter(range(10**9))
    result = agent.train(quiet=True, stop=lambda: next(asked) > 5)
    assert result.status == "stopped"
    assert agent.train(quiet=True).status == "completed"
    assert agent.step == N * T * 10


def test_a_run_is_resumed(make):
    agent = make()
    agent.train(quiet=True)
    agent.close()
    resumed = make(None, resume=agent.run, timesteps=8 * N * T)
    assert resumed.step == 4 * N * T
    assert resumed.sampler.next_table >= 8
    resumed.train(quiet=True)
    assert (resumed.step, resumed.iteration) == (8 * N * T, 8)


class Waiting(CountingEnv):
    """Does next to nothing in a step, and takes its time."""

    def step(self, action):
        threading.Event().wait(0.002)
        return super().step(action)


def test_environments_that_wait_get_several_actors(make):
    assert make(num_actors=None).config.num_actors == 1
    assert make(Waiting, num_actors=None, num_envs=12).config.num_actors == 6
    assert make(Waiting, num_actors=None, num_envs=12, backend="process").config.num_actors == 1


def test_a_loaded_policy_is_of_the_class_that_trained_it(make):
    agent = make()
    agent.train(quiet=True)
    loaded = starling.load(agent.run)
    assert type(loaded) is AsyncPPO
    np.testing.assert_array_equal(loaded.state.params, agent.state.params)
    loaded.close()


def test_bad_input_is_refused(make):
    with pytest.raises(UserError, match="num_actors 3 does not divide num_envs 4: use 2 or 4"):
        make(num_actors=3)
    with pytest.raises(UserError, match="exact_resume does not go with async_ppo"):
        make(exact_resume=True)
    with pytest.raises(UserError, match="algo async_ppo is trained by AsyncPPO, not ParallelPPO"):
        make(kind=ParallelPPO, algo="async_ppo")


# --- joining -----------------------------------------------------------------------------------


def collected(width: int, offset: int, ends: list[tuple[int, int]]) -> Rollout:
    """Three steps of environments whose observations say time and environment."""
    buffer = RolloutBuffer(3, width)
    names = offset + np.arange(width)

    def observed(t: int) -> dict[str, np.ndarray]:
        return {"at": np.stack([np.full(width, t), names], -1)}

    buffer.begin(observed(0))
    for t in range(3):
        truncated = np.array([(t, n) in ends for n in range(width)])
        finals = np.array([{"at": np.array([100 + t, name])} for name in names], object)
        flags = (np.zeros(width, bool), truncated, {"final_obs": finals})
        buffer.add(names + 10 * t, observed(t + 1), names.astype(float), *flags)
    return buffer.finish()._replace(log_probs=np.tile(names, (3, 1)), reward_sums=names)


def test_joined_rollouts_stand_side_by_side_with_their_final_observations():
    left, right = collected(2, 0, [(1, 1)]), collected(3, 2, [(0, 0), (2, 2)])
    joined = join_rollouts([left, right])
    assert joined.rewards.shape == (3, 5)
    np.testing.assert_array_equal(joined.rewards, np.tile(np.arange(5), (3, 1)))
    np.testing.assert_array_equal(joined.observations["at"][2, :, 1], np.arange(5))
    np.testing.assert_array_equal(joined.log_probs, joined.rewards)
    np.testing.assert_array_equal(joined.reward_sums, np.arange(5))
    real = joined.final_index < 15
    found = {
        int(index): tuple(row)
        for index, row in zip(
            joined.final_index[real], joined.final_observations["at"][real], strict=True
        )
    }
    assert found == {1 * 5 + 1: (101, 1), 0 * 5 + 2: (100, 2), 2 * 5 + 4: (102, 4)}
    assert joined.truncated.reshape(-1)[list(found)].all()
    assert len(joined.final_index) == 16  # padded like any other
    assert join_rollouts([left]) is left


def test_rollouts_without_final_observations_are_joined_without():
    parts = [collected(2, offset, []) for offset in (0, 2)]
    parts = [part._replace(final_observations=None, final_index=None) for part in parts]
    joined = join_rollouts(parts)
    assert joined.final_observations is joined.final_index is None
    np.testing.assert_array_equal(joined.rewards[0], np.arange(4))
