"""Several writers and a learner: who waits for whom, and what of their numbers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_records import contents, rollout, torn

from starling.errors import UserError
from starling.storage.replay import Replay
from starling.storage.shared_replay import RateLimiter, SharedReplay

pytestmark = pytest.mark.timeout(60)


@settings(max_examples=100, deadline=None)
@given(
    ratio=st.floats(0.05, 50),
    min_size=st.integers(1, 2000),
    rows=st.integers(1, 500),
    count=st.integers(1, 3000),
    seed=st.integers(0, 10**6),
)
def test_the_ratio_is_held_and_nobody_waits_for_ever(ratio, min_size, rows, count, seed):
    limiter = RateLimiter(ratio, min_size)
    random = np.random.default_rng(seed)
    inserted = sampled = 0
    for _ in range(2000):
        may_insert = limiter.may_insert(inserted, sampled)
        may_sample = limiter.may_sample(inserted, sampled, count)
        assert may_insert or may_sample
        # For a while only one of them has time.
        if may_insert and (not may_sample or random.random() < 0.5):
            inserted += rows
        else:
            sampled += count
        target = ratio * (inserted - min_size)
        assert inserted >= min_size or not sampled
        assert target - sampled <= limiter.slack + ratio * rows
        assert sampled - max(target, 0) <= max(limiter.slack, count)
    if inserted > max(3 * min_size, 30 * rows, 30 * count / ratio):
        assert sampled / (inserted - min_size) == pytest.approx(ratio, rel=0.1)


def shared(limiter=None, writers=4, capacity=100_000, **options):
    return SharedReplay(Replay(capacity, 5 * writers, **options), writers, limiter)


def in_threads(*functions):
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    return threads


def test_writers_in_threads_lose_and_tear_nothing():
    replay, damaged = shared(RateLimiter(2.0, 1000, slack=500)), []

    def write(writer):
        for sequence in range(100):
            replay.add(rollout(writer, sequence, 20, 5))

    threads = in_threads(*(lambda w=w: write(w) for w in range(4)))
    while replay.sampled < 2 * (40_000 - 1000):
        batch = replay.sample(50, 4, timeout=30)
        assert batch is not None
        damaged.append(torn(batch))
    for thread in threads:
        thread.join(30)
    assert replay.inserted == len(replay) == 40_000
    assert replay.sampled / (replay.inserted - 1000) == pytest.approx(2.0, rel=0.1)
    assert sum(damaged) == 0
    assert len(damaged) > 300
    found = contents(replay.state())
    assert len(found) == len(np.unique(found, axis=0)) == 40_000
    for writer in range(4):
        assert set(found[found[:, 0] == writer][:, 2].tolist()) == set(range(2000))


@pytest.mark.parametrize("who", ["writer", "learner"])
def test_stop_ends_waiting(who):
    replay, given = shared(RateLimiter(1.0, 100)), []
    if who == "writer":
        sequence = 0
        while replay._limiter.may_insert(replay.inserted, replay.sampled):
            replay.add(rollout(0, sequence, 20, 5))
            sequence += 1
        threads = in_threads(lambda: given.append(replay.add(rollout(0, sequence, 20, 5))))
    else:
        threads = in_threads(lambda: given.append(replay.sample(10)))
    threads[0].join(0.2)
    assert threads[0].is_alive()
    replay.stop()
    threads[0].join(10)
    assert given == [None]
    assert replay.add(rollout(1, 0, 20, 5)) is None
    assert replay.sample(10) is None


def test_a_learner_does_not_wait_for_ever():
    replay = shared(RateLimiter(1.0, 150))
    replay.add(rollout(0, 0, 20, 5))
    with pytest.raises(TimeoutError, match=r"for 0\.01 s, which has had 100 transitions, and 0 s"):
        replay.sample(10, timeout=0.01)
    replay.add(rollout(0, 1, 20, 5))
    batch = replay.sample(10, timeout=0.01)
    assert batch is not None
    assert batch.returns.shape == (1, 10)


def test_rollouts_that_came_already_are_left_out():
    replay = shared()
    assert replay.add(rollout(2, 0, 20, 5)) == 100
    assert replay.add(rollout(2, 0, 20, 5)) == 0
    assert replay.add(rollout(2, 1, 20, 5)) == 100
    assert replay.add(rollout(2, 0, 20, 5)) == 0
    assert replay.add(rollout(2, 0, 20, 5, restarts=1)) == 100
    assert replay.add(rollout(2, 2, 20, 5)) == 0  # of before the restart
    assert (len(replay), replay.duplicates) == (300, 3)


@pytest.mark.parametrize("following", [{"sequence": 3}, {"sequence": 0, "restarts": 1}])
def test_nothing_crosses_what_is_missing(following):
    replay = shared(n_step=3, gamma=1.0)
    before = rollout(1, 0, 20, 5)._replace(terminated=np.zeros((20, 5), bool))
    assert replay.add(before) == 18 * 5
    after = rollout(1, steps=20, envs=5, **following)
    assert replay.add(after) >= 2 * 5 + 18 * 5  # the two that waited are cut
    batch = replay.sample(100, 20)
    assert batch is not None
    t, next_t = batch.observations[..., 2], batch.next_observations[..., 2]
    last = (t >= 18) & (t < 20)
    assert last.any()
    assert (next_t[last] == 20).all()
    np.testing.assert_array_equal(batch.returns[last], np.where(t == 18, 18 + 19, 19)[last])


def test_what_is_saved_is_no_copy_and_nobody_writes_meanwhile():
    replay = shared()
    replay.add(rollout(0, 0, 20, 5))
    with replay.paused():
        state = replay.state()
        before = {name: np.array(array) for name, array in state.items()}
        (thread,) = in_threads(lambda: replay.add(rollout(1, 0, 20, 5)))
        thread.join(0.2)
        assert thread.is_alive()
        for name, array in state.items():
            np.testing.assert_array_equal(array, before[name])
    thread.join(30)
    assert len(replay) == 200
    again = replay.state()
    assert sum(np.shares_memory(again[name], state[name]) for name in state) > 5


def test_a_restored_replay_goes_on_with_writers_that_begin_anew():
    replay, again = shared(), shared()
    replay.add(rollout(0, 0, 20, 5))
    again.restore(replay.state())
    assert again.add(rollout(0, 0, 20, 5)) == 100
    assert len(again) == 200


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="3 writers cannot have equally many of 20"):
        SharedReplay(Replay(1000, 20), 3)
    with pytest.raises(UserError, match="from writer 4 does not fit into a replay of 4 writers"):
        shared().add(rollout(4, 0, 20, 5))
    with pytest.raises(UserError, match="of 6 environments from writer 1"):
        shared().add(rollout(1, 0, 20, 6))
    with pytest.raises(UserError, match="batches of 256 need a min_size of as many"):
        shared(RateLimiter(1.0, 100)).sample(256)
    for ratio, slack in ((0, None), (np.nan, None), (np.inf, None), (1.0, np.nan)):
        with pytest.raises(UserError, match=f"samples_per_insert {ratio} .* slack {slack}"):
            RateLimiter(ratio, 10, slack)
