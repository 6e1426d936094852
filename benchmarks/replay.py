"""How fast a replay takes rollouts from four writers while batches are drawn from it."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from measuring import Row, arguments, in_turn, median, report, spread

from starling.storage.replay import Replay
from starling.storage.replay_writers import ReplayWriter, WriterConnections
from starling.storage.rollout import Origin, Rollout
from starling.storage.shared_replay import RateLimiter, SharedReplay

WRITERS, STEPS, ENVS = 4, 64, 32
CAPACITY, BATCH, BATCHES = 1_000_000, 256, 16
INSERTS, SAMPLES = 500_000, 1_000_000


def cartpole(writer: int) -> Rollout:
    """A rollout that can follow itself: it ends with the observations that it begins with."""
    random = np.random.default_rng(writer)
    observations = random.normal(size=(STEPS + 1, ENVS, 4)).astype(np.float32)
    observations[-1] = observations[0]
    ends = random.choice(3, (STEPS, ENVS), p=[0.98, 0.01, 0.01])
    index = np.flatnonzero(ends == 2).astype(np.int32)
    return Rollout(
        observations,
        random.integers(0, 2, (STEPS, ENVS)),
        np.ones((STEPS, ENVS), np.float32),
        ends == 1,
        ends == 2,
        random.normal(size=(len(index), 4)).astype(np.float32),
        index,
        origin=Origin(worker=writer),
    )


def fill(replay: SharedReplay | ReplayWriter, writer: int) -> None:
    """Adds rollouts until the replay is stopped."""
    rollout = cartpole(writer)
    while replay.add(rollout) is not None:
        origin = rollout.origin
        rollout = rollout._replace(origin=origin._replace(sequence=origin.sequence + 1))


def fill_from_process(connection: socket.socket, writer: int) -> None:
    with connection:
        fill(ReplayWriter(connection), writer)


@contextmanager
def writers(kind: str, replay: SharedReplay) -> Iterator[None]:
    """Four of them at work."""
    connections = WriterConnections(replay)
    started: list = []
    for writer in range(WRITERS):
        if kind == "threads":
            started.append(threading.Thread(target=fill, args=(replay, writer)))
            started[-1].start()
            continue
        with connections.connect() as end:
            context = multiprocessing.get_context("spawn")
            started.append(context.Process(target=fill_from_process, args=(end, writer)))
            started[-1].start()
    try:
        yield
    finally:
        connections.close()
        for one in started:
            one.join()


def rates(kind: str, prioritized: bool, seconds: float) -> tuple[float, float]:
    """Inserts and samples per second, at twice as many samples as inserts."""
    replay = Replay(CAPACITY, WRITERS * ENVS, n_step=3, prioritized=prioritized)
    shared = SharedReplay(replay, WRITERS, RateLimiter(2.0, 100_000))
    with writers(kind, shared):
        while replay.inserted < CAPACITY:  # the replay is full, and writers are warm
            shared.sample(BATCH, BATCHES, timeout=60)
        start, inserted, sampled = time.perf_counter(), replay.inserted, replay.sampled
        while time.perf_counter() - start < seconds:
            batch = shared.sample(BATCH, BATCHES, timeout=60)
            if prioritized and batch is not None:
                shared.set_priorities(batch.indices, batch.weights + 1e-3)
        took = time.perf_counter() - start
        return (replay.inserted - inserted) / took, (replay.sampled - sampled) / took


def rows_of(kind: str, prioritized: bool, measured: list[tuple[float, float]]) -> list[Row]:
    how = "by priority, set anew each time" if prioritized else "uniformly"
    what = f"four writers in {kind}, n_step 3, batches of {BATCH} drawn {how}"
    found = []
    for name, column, floor in (("Inserts", 0, INSERTS), ("Samples", 1, SAMPLES)):
        values = [pair[column] for pair in measured]
        asked = not prioritized
        found.append(
            Row(
                what=f"{name}, {what}",
                value=median(values),
                unit="transitions/s",
                floor=f">= {floor:,}" if asked else "",
                met=median(values) >= floor if asked else None,
                note=f"{spread(values)}; both at once, CartPole transitions, {CAPACITY:,} kept, "
                f"rollouts of {STEPS} x {ENVS}, {BATCHES} batches a call",
            )
        )
    return found


def memory() -> Row:
    """Bytes of a full replay of a million CartPole transitions."""
    replay = Replay(CAPACITY, ENVS, n_step=3, prioritized=True)
    rollout = cartpole(0)
    while len(replay) < 0.99 * CAPACITY:
        replay.add(rollout)
    return Row(
        what=f"Memory of {CAPACITY:,} CartPole transitions with priorities",
        value=replay.nbytes / 1e6,
        unit="MB",
        floor="< 100",
        met=replay.nbytes < 100e6,
        note="1 % of the steps were truncated, and their final observations are among it",
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    seconds, repeats = (1.0, 1) if options.quick else (5.0, options.repeats)
    sides = [(kind, by) for by in (False, True) for kind in ("threads", "processes")]
    measured = in_turn(
        repeats,
        {f"{kind} {by}": lambda kind=kind, by=by: rates(kind, by, seconds) for kind, by in sides},
    )
    rows = [row for kind, by in sides for row in rows_of(kind, by, measured[f"{kind} {by}"])]
    report([*rows, memory()])


if __name__ == "__main__":
    main()
