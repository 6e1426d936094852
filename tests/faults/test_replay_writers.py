"""Writers of a replay in processes of their own, some of which are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing import resource_tracker

import numpy as np
import pytest
from leaks import ends_within
from measured import record
from replay_records import contents, rollout, torn, write, write_until_killed

from starling.errors import UserError
from starling.storage.replay import Replay
from starling.storage.replay_writers import ReplayWriter, WriterConnections
from starling.storage.shared_replay import RateLimiter, SharedReplay

STEPS, ENVS, WRITERS = 50, 5, 4
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("tracker", "no_leaks")]
context = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def tracker():
    """Starts the process that the first spawn would leave behind for all others."""
    resource_tracker.ensure_running()


class Crew:
    """A replay and its writers."""

    def __init__(self, capacity, limiter=None, **options):
        self.replay = SharedReplay(Replay(capacity, ENVS * WRITERS, **options), WRITERS, limiter)
        self.connections = WriterConnections(self.replay)
        self.processes = []

    def start(self, function, *args):
        with self.connections.connect() as end:
            process = context.Process(target=function, args=(end, *args))
            process.start()
        self.processes.append(process)
        return process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connections.close()
        for process in self.processes:
            process.join(20)
            code = process.exitcode
            process.close()
            assert code is not None


def check_contents(replay, rollouts):
    """That each writer's rollouts are there, each record once."""
    found = contents(replay.state())
    assert len(found) == len(np.unique(found, axis=0)), "duplicated"
    for writer, count in enumerate(rollouts):
        own = found[found[:, 0] == writer]
        for env in range(ENVS):
            steps = np.sort(own[own[:, 1] == env][:, 2])
            np.testing.assert_array_equal(steps, np.arange(count * STEPS), "lost")


def learn(replay, until):
    """Draws until there were so many inserts; returns how many rows were torn."""
    damaged = 0
    while replay.inserted < until:
        try:
            batch = replay.sample(128, 4, timeout=0.5)
        except TimeoutError:  # perhaps the last came just now
            continue
        assert batch is not None
        damaged += torn(batch)
    return damaged


@pytest.mark.parametrize(
    "rollouts", [40, pytest.param(4000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_nothing_is_torn_duplicated_or_lost(rollouts):
    total = WRITERS * rollouts * STEPS * ENVS
    with Crew(total, RateLimiter(1.0, 1000, slack=2000)) as crew:
        for writer in range(WRITERS):
            crew.start(write, writer, rollouts, STEPS, ENVS)
        damaged = learn(crew.replay, total)
        assert damaged == 0
        for process in crew.processes:
            process.join(20)
            assert process.exitcode == 0
        replay = crew.replay
        assert replay.sampled / (replay.inserted - 1000) == pytest.approx(1.0, rel=0.1)
        assert replay.duplicates == 0
        check_contents(replay, [rollouts] * WRITERS)
        lost = total - len(replay)
        assert lost == 0
        record("written", records=total, torn=damaged, duplicated=replay.duplicates, lost=lost)


def test_a_writer_that_is_killed_costs_only_what_it_was_sending():
    rollouts, rows = 40, STEPS * ENVS
    with Crew(10**6, RateLimiter(1.0, 1000, slack=2000)) as crew:
        others = [crew.start(write, writer, rollouts, STEPS, ENVS) for writer in range(3)]
        doomed = crew.start(write_until_killed, 3, STEPS, ENVS)
        damaged = learn(crew.replay, 20 * rows)
        while crew.replay._newest[3] is None:
            damaged += learn(crew.replay, crew.replay.inserted + 1)
        os.kill(doomed.pid, signal.SIGKILL)
        assert ends_within(doomed.pid, 10)
        # The learner goes on at the rate of the others, until they have ended.
        left = crew.replay._newest[3][1]
        damaged += learn(crew.replay, (3 * rollouts + left + 1) * rows)
        for process in others:
            process.join(20)
            assert process.exitcode == 0
        came = crew.replay._newest[3][1] + 1
        check_contents(crew.replay, [rollouts] * 3 + [came])

        crew.start(write, 3, 5, STEPS, ENVS, 1)  # begins anew, from its number 0
        damaged += learn(crew.replay, (3 * rollouts + came + 5) * rows)
        assert damaged == 0
        found = contents(crew.replay.state())
        assert (found[:, 2] >= 10**9).sum() == 5 * rows


def half(message):
    return message[: len(message) // 2]


def sent(writer, sequence):
    """The bytes of a rollout's message."""
    parts = []

    class Recorder:
        def sendall(self, data):
            parts.append(bytes(data))
            raise OSError

    ReplayWriter(Recorder()).add(rollout(writer, sequence, STEPS, ENVS))
    return parts[0]


@pytest.mark.parametrize("damage", ["half", "header", "sizes", "structure", "object"])
def test_a_damaged_message_adds_nothing(damage, caplog):
    message = sent(1, 0)
    damaged = {
        "half": half(message),
        "header": message[:7],
        "sizes": b"\xff" * 64,
        "structure": message[:16] + b"}" + message[17:],
        "object": message.replace(json.dumps("<i8").encode(), json.dumps("|O8").encode()[:5], 1),
    }[damage]
    with Crew(10_000) as crew:
        with crew.connections.connect() as end:
            thread = crew.connections._serving[-1][0]
            end.sendall(damaged)
            end.shutdown(1)
            thread.join(20)
            assert not thread.is_alive()
        assert len(crew.replay) == crew.replay.inserted == 0
        assert ("left out" in caplog.text) == (damage != "header")
        with crew.connections.connect() as end:  # others are none the worse for it
            writer = ReplayWriter(end)
            assert writer.add(rollout(2, 0, STEPS, ENVS)) == STEPS * ENVS
            assert writer.add(rollout(2, 0, STEPS, ENVS)) == 0
            with pytest.raises(UserError, match="from writer 9 does not fit"):
                writer.add(rollout(9, 0, STEPS, ENVS))


def test_priorities_and_trees_travel():
    replay = Replay(10_000, ENVS * WRITERS, prioritized=True, alpha=1.0)
    connections = WriterConnections(SharedReplay(replay, WRITERS))
    one = rollout(0, 0, STEPS, ENVS)
    nested = one._replace(
        observations={"a": (one.observations,), "b": one.observations[..., 0]},
        final_observations={"a": (one.final_observations,), "b": one.final_observations[..., 0]},
        valid=np.ones((STEPS, ENVS), bool),
        action_masks=np.ones((STEPS, ENVS, 5), bool),
        priorities=np.full((STEPS, ENVS), 1e-9),
    )
    nested.priorities[30, 2] = 1e9
    with connections.connect() as end:
        added = ReplayWriter(end).add(nested)
        connections.close()
    assert added is not None
    batch = replay.sample(100)
    assert (batch.observations["a"][0][0, :, 1:3] == [2, 30]).all()
    assert batch.next_action_masks is not None


def test_a_writer_that_waits_is_told_that_the_replay_has_ended():
    with Crew(10**6, RateLimiter(1.0, 1000)) as crew:
        process = crew.start(write_until_killed, 0, STEPS, ENVS)
        learn(crew.replay, 1000)
        crew.connections.close()
        process.join(20)
        assert process.exitcode == 1
