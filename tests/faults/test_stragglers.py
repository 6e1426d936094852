"""Environments that are much slower than the others: who waits for them, and who does not."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import envs_for_tests as envs
import gymnasium as gym
import numpy as np
import pytest
from counters import metrics_of
from failing import ALL, step

from starling.envs.process import ProcessVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.training import actor_pool
from starling.training.async_ppo import AsyncPPO
from starling.training.policy_lag import lag_class
from starling.training.trainer import Iteration

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]

T, ACTORS = 16, 3
SMALL: dict[str, Any] = {
    "num_envs": 6,
    "num_steps": T,
    "num_actors": ACTORS,
    "mini_batch_size": 32,
    "epochs": 2,
    "hidden_sizes": (8,),
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 10**9,
    "log_interval": 1,
    "save_interval": 0,
}


def first_waits(wait: Callable[[], Any]) -> type[gym.Env]:
    """Environments of which the first that is made waits in each step."""
    made = itertools.count()

    class Env(gym.Wrapper):
        def __init__(self):
            super().__init__(gym.make("CartPole-v1"))
            self.first = next(made) == 0

        def step(self, action):
            if self.first:
                wait()
            return self.env.step(action)

    return Env


@pytest.mark.parametrize("max_policy_lag", [T // 4, 4 * T])
def test_a_slow_actor_starves_no_other(tmp_path, shared_programs, max_policy_lag):
    """It makes one step per update: a learner that waited for it would wait for ever."""
    updates, late = threading.Semaphore(0), max_policy_lag < T
    lags: list[list[int]] = [[] for _ in range(ACTORS)]  # of each actor's rollouts
    before: list[int] = []  # rollouts of each, when the slow one's first came

    def note(it: Iteration) -> bool:
        for rollout in it.agent._pool.taken:
            lags[rollout.origin.worker].append(it.agent.version - 1 - rollout.origin.version)
        if lags[0] and not before:
            before[:] = map(len, lags)
        updates.release()
        return not lags[0] or not (late or min(lags[0]) <= max_policy_lag)

    settings = {**SMALL, "max_policy_lag": max_policy_lag, "log_dir": str(tmp_path)}
    with AsyncPPO(first_waits(updates.acquire), **settings) as agent:
        try:
            assert agent.train(callbacks=note, quiet=True).status == "callback"
        finally:
            updates.release(10_000)  # it has to end its rollout
        lines = metrics_of(agent.run)
        busy = [actor.envs.busy_seconds.sum() for actor in agent._pool.actors]
    assert lags[0][0] >= T
    assert min(before[1:]) >= T  # each of the others was learnt from in every update
    assert sum(before[1:]) >= ACTORS * T
    assert max(line["async/policy_lag_max"] for line in lines) <= max_policy_lag
    assert lines[-1]["async/dropped"] == sum(lag > max_policy_lag for lag in itertools.chain(*lags))
    learnt_from = [lag for lag in itertools.chain(*lags) if lag <= max_policy_lag]
    expected = Counter(map(lag_class, learnt_from))
    assert {name: lines[-1].get(name) for name in expected} == expected
    assert len(expected) > 1
    assert late == (min(lags[0]) > max_policy_lag)
    assert int(np.argmax(busy)) == 0
    assert any(1 < line["perf/straggler"] <= ACTORS for line in lines if "perf/straggler" in line)


@ALL
def test_a_slow_worker_is_known(make, backend):
    """How much slower it is than the others shows in what training reports."""
    vector = make(backend, [envs.SlowEnv, envs.CountingEnv], num_workers=2)
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
def test_nobody_waits_for_a_slow_environment_in_partial_batches(make, backend, gate):
    factories = [functools.partial(envs.GatedEnv, gate), envs.GatedEnv]
    vector = make(backend, factories, num_workers=2, batch_size=1)
    vector.reset()
    vector.send([0, 0])
    for k in range(1, 20):
        observations, *_, infos = vector.recv()
        assert infos["env_id"].tolist() == [1]
        np.testing.assert_array_equal(observations, [[1, k]])
        vector.send([0], [1])
    vector.recv()
    envs.open_gate(gate)
    observations, *_, infos = vector.recv()
    assert infos["env_id"].tolist() == [0]
    np.testing.assert_array_equal(observations, [[1, 1]])


class Told(logging.Handler):
    """Lets go of an environment that hangs once somebody has said so."""

    def __init__(self, event: threading.Event):
        super().__init__(logging.WARNING)
        self.event, self.said = event, []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        self.event.set()


def test_an_actor_whose_environment_hangs_is_told_of_once(tmp_path, shared_programs, monkeypatch):
    monkeypatch.setattr(actor_pool, "_TELL_AFTER", 0.2)
    told = Told(threading.Event())
    logger = logging.getLogger("starling.training.actor_pool")
    logger.addHandler(told)
    settings = {**SMALL, "log_dir": str(tmp_path), "max_policy_lag": 10**6}
    try:
        with AsyncPPO(first_waits(told.event.wait), **settings) as agent:
            agent.train(quiet=True, stop=lambda: bool(told.said) and 0 in finished(agent))
    finally:
        told.event.set()
        logger.removeHandler(told)
    hanging = [text for text in told.said if text.startswith("actor 0 has handed over nothing")]
    assert len(hanging) == 1
    assert "backend process" in hanging[0]


def finished(agent: AsyncPPO) -> set[int]:
    """Actors that have handed over a rollout."""
    pool = agent._pool
    return set() if pool is None else {a.index for a in pool.actors if a.collector.sequence}
