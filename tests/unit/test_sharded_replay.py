"""Shards of a replay and the learner's side of them, in one process: as one replay would be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from replay_oracle import Environments, StackedEnvironments
from replay_records import contents, rollout, torn
from scipy import stats

from starling.errors import CheckpointError, StarlingError, UserError, WorkerDiedError
from starling.storage.replay import Replay
from starling.storage.replay_shard import ReplayShard
from starling.storage.rollout import Origin
from starling.storage.shared_replay import SharedReplay
from starling.training import ray_cluster, sharded_replay, shards
from starling.training.sharded_replay import ShardedReplay

GAMMA, N = 0.9, 2


class RayError(Exception):
    """The first of Ray's exceptions; the others are made of its names for them."""

    def __init__(self, message: str = "", cause: Exception | None = None):
        super().__init__(message)
        self.cause = cause


def errors_of_ray() -> dict[str, type[RayError]]:
    """Its exceptions by their names, each with the base that it has there."""
    bases = {"RayError": RayError}
    names = {
        "RayError": (
            *("GetTimeoutError", "RayTaskError", "RayActorError", "ObjectLostError"),
            *("OutOfMemoryError", "NodeDiedError", "WorkerCrashedError", "RuntimeEnvSetupError"),
            *("ActorUnschedulableError", "ObjectStoreFullError", "OutOfDiskError"),
            *("LocalRayletDiedError", "RaySystemError"),
        ),
        "RayActorError": ("ActorDiedError", "ActorUnavailableError"),
        "ObjectLostError": ("OwnerDiedError", "ObjectReconstructionFailedError"),
    }
    for base, derived in names.items():
        bases |= {name: type(name, (bases[base],), {}) for name in derived}
    return bases


ERRORS = errors_of_ray()


class Here(ray_cluster.Cluster):
    """Ray, of which everything happens in this process and at once, and a cluster of that."""

    exceptions = SimpleNamespace(**ERRORS)

    def __init__(self):
        self.handles: list[Handle] = []
        self.ray, self.stop = self, lambda: False

    def is_initialized(self) -> bool:
        return True

    def is_lost(self) -> bool:
        return False

    def get(self, answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, handle: Handle) -> None:
        handle.dead = True


class Handle:
    def __init__(self, ray: Here, actor: Any):
        self.ray, self.actor, self.dead = ray, actor, False
        self.said: list[Exception] = []  # and not what was asked for, one after the other
        ray.handles.append(self)

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            if self.dead:
                return ERRORS["ActorDiedError"]("killed")
            if self.said:
                return self.said.pop(0)
            return getattr(self.actor, method)(*arguments)

        return SimpleNamespace(remote=call)


def sharded(shards=2, writers=5, rows=50, envs=N, restarts=9, **options) -> ShardedReplay:
    """Of shards with unequally many of the writers; each environment has so many rows."""
    here = Here()
    options = {"n_step": 3, "gamma": GAMMA, "prioritized": True, **options}

    def settings(n: int) -> dict[str, Any]:
        return {"capacity": rows * envs * n, "num_envs": envs * n, **options}

    def new_shard(of: range) -> Handle:
        return Handle(here, ReplayShard(of.start, len(of), settings(len(of))))

    whole: Any = Replay(**settings(writers))
    return ShardedReplay(here, new_shard, whole, shards, writers, restarts)  # type: ignore[arg-type]


def handles(replay: ShardedReplay) -> list[Handle]:
    return [shard.handle for shard in replay._shards]


def single(writers=5, rows=50, envs=N, **options) -> SharedReplay:
    options = {"n_step": 3, "gamma": GAMMA, "prioritized": True, **options}
    return SharedReplay(Replay(rows * envs * writers, envs * writers, **options), writers)


def fill(*replays: Any, rollouts=4, steps=20, environments=Environments, **options) -> None:
    """Has each writer w add w rollouts more than some, with priorities of their own."""
    random = np.random.default_rng(0)
    for writer in range(5):
        source = environments(num_envs=N, seed=writer, masks=True, **options)
        for sequence in range(rollouts + writer if rollouts else 0):
            made = source.rollout(steps)._replace(origin=Origin(0, writer, sequence))
            made = made._replace(priorities=random.uniform(0.1, 2.0, (steps, N)))
            assert len({replay.add(made) for replay in replays}) == 1


def pixels(**options):
    return StackedEnvironments(3, (4, 2), **options)


def check_same(one: Any, other: Any, without: tuple[str, ...] = ()) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - set(without):
        np.testing.assert_array_equal(one[name], other[name], name)


# ---- what is in it


@pytest.mark.parametrize("prioritized", [False, True])
def test_what_writers_made_is_there_once(prioritized):
    replay = sharded(3, rows=1000, n_step=1, prioritized=prioritized)
    for sequence in range(4):
        for writer in range(5):
            made = rollout(writer, sequence, 20, N)
            assert replay.add(made) == 20 * N
            assert replay.add(made) == 0
    assert replay.inserted == len(replay) == 5 * 4 * 20 * N
    assert replay.duplicates == 20
    found = contents(replay.state())
    assert len(found) == len(np.unique(found, axis=0)) == len(replay)
    for writer in range(5):
        assert set(found[found[:, 0] == writer][:, 2].tolist()) == set(range(80))
    batch = replay.sample(50, 40)
    assert batch is not None
    assert torn(batch) == 0
    assert set(batch.observations[..., 0].ravel().tolist()) == set(range(5))
    assert replay.sampled == 2000


@pytest.mark.parametrize("environments", [Environments, pixels])
@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("rollouts", [0, 1, 4])
def test_its_state_is_that_of_one_replay_and_can_be_shared_out_anew(environments, shards, rollouts):
    stacked = {"frame_stack": 3} if environments is pixels else {}
    replay, one = sharded(shards, **stacked), single(**stacked)
    fill(replay, one, rollouts=rollouts, environments=environments)
    state = one.state()
    check_same(replay.state(), state)
    for other in (sharded(3, **stacked), single(**stacked)):
        other.restore(dict(state))
        assert len(other) == len(one)
        check_same(other.state(), state)
    with pytest.raises(CheckpointError, match="n_step 3 there and 2 here"):
        sharded(3, n_step=2).restore(state)


def test_shards_that_are_empty_or_without_masks_are_saved_with_the_others():
    replay, one = sharded(5), single()
    for writer in (1, 3):
        made = Environments(N, writer, masks=writer == 3).rollout(20)
        made = made._replace(origin=Origin(0, writer, 0))
        assert replay.add(made) == one.add(made)
    state = replay.state()
    restored = single()
    restored.restore(dict(state))
    check_same(restored.state(), state)
    again = sharded(2)
    again.restore(state)
    assert len(again) == len(replay) == len(one)
    np.testing.assert_array_equal(state["masks"], one.state()["masks"])
    batch = replay.sample(20, 10)
    assert batch is not None
    shards = batch.indices >> 44
    assert set(shards.ravel().tolist()) == {1, 3}
    assert batch.next_action_masks[shards == 1].all()
    assert not batch.next_action_masks[shards == 3].all()


def test_cuts_end_what_is_under_way_in_all_shards():
    replay, one = sharded(3), single()
    fill(replay, one, rollouts=1)
    replay.cut()
    one.cut()
    check_same(replay.state(), one.state())


# ---- how it is drawn


def keys_of(state: Any) -> np.ndarray:
    """Transitions that can be sampled, each by a number of its own, in the order of the state."""
    found = contents(state)
    return found[:, 0] * 10**6 + found[:, 1] * 10**4 + found[:, 2]


def drawn_keys(batch: Any) -> np.ndarray:
    shown = batch.observations
    return shown[..., 0] * 10**6 + shown[..., 1] * 10**4 + shown[..., 2]


def of_unequal_shards(**options) -> ShardedReplay:
    """A replay of three shards, of which one has most."""
    replay = sharded(3, writers=3, rows=100, n_step=1, **options)
    for writer, rollouts in enumerate((1, 9, 3)):
        for sequence in range(rollouts):
            replay.add(rollout(writer, sequence, 10, N))
    return replay


def counts(replay: ShardedReplay, keys: np.ndarray) -> tuple[np.ndarray, Any]:
    batch = replay.sample(50, 4000, beta=0.7)
    order = np.argsort(keys)
    places = order[np.searchsorted(keys[order], drawn_keys(batch))]
    return np.bincount(places.ravel(), minlength=len(keys)), (places, batch)


def test_uniform_draws_favour_no_shard():
    replay = of_unequal_shards(prioritized=False)
    found, (_, batch) = counts(replay, keys_of(replay.state()))
    assert stats.chisquare(found).pvalue > 0.01
    assert (batch.weights == 1).all()


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_priorities_decide_how_often_and_weights_make_up_for_it(alpha):
    replay = of_unequal_shards(alpha=alpha)
    keys = keys_of(replay.state())
    priorities = np.random.default_rng(3).uniform(0.01, 2.0, len(keys))
    given = dict(zip(keys.tolist(), priorities, strict=True))
    for _ in range(20):  # until each has been drawn
        batch = replay.sample(50, 10)
        assert batch is not None
        new = [given[key] for key in drawn_keys(batch).ravel().tolist()]
        replay.set_priorities(batch.indices, np.reshape(new, batch.indices.shape))
    np.testing.assert_allclose(replay.state()["weights"], priorities**alpha)
    shares = priorities**alpha / (priorities**alpha).sum()
    for _ in range(2):  # those drawn before and those under way know less
        replay.sample(50, 4000, beta=0.7)
    found, (places, batch) = counts(replay, keys)
    assert stats.chisquare(found, shares * found.sum()).pvalue > 0.01
    weights = (len(keys) * shares[places]) ** -0.7
    np.testing.assert_allclose(batch.weights, weights / weights.max(1, keepdims=True), rtol=1e-5)


def test_weights_are_right_while_shards_know_more_than_the_learner():
    replay = of_unequal_shards(alpha=1.0)
    keys = keys_of(replay.state())
    everything = replay.sample(50, 100)
    assert everything is not None
    large = everything.observations[..., 0] == 0
    replay.set_priorities(everything.indices, np.where(large, 5.0, 0.5))
    replay._under_way = None  # what comes next is drawn from these, by the shares of before
    batch = replay.sample(200_000, 1, beta=1.0)
    assert batch is not None
    order = np.argsort(keys)
    places = np.searchsorted(keys[order], drawn_keys(batch)).ravel()
    total = np.bincount(places, batch.weights.ravel().astype(np.float64))
    np.testing.assert_allclose(total / total.mean(), 1.0, atol=0.2)


def test_what_was_drawn_ahead_is_used_in_turn():
    replay = of_unequal_shards()
    shapes = []
    asked = [(3, 10), (5, 10), (1, 10), (1, 10), (7, 10), (2, 10), (2, 20)]
    for count, size in asked:
        batch = replay.sample(size, count)
        assert batch is not None
        assert torn(batch) == 0
        shapes.append(batch.indices.shape)
    assert shapes == asked
    assert replay.sampled == 190 + 40


def test_what_was_drawn_before_a_rollout_came_says_nothing_of_it():
    replay = of_unequal_shards()
    for sequence in range(1, 30):
        assert replay.sample(10, 2) is not None
        inserted = replay.inserted
        assert replay.add(rollout(0, sequence, 10, N)) == 20
        assert replay.inserted == inserted + 20
        replay.sample(10, 2)
        assert len(replay) == len(contents(replay.state()))


# ---- what is lost


def test_a_lost_shard_is_replaced_by_an_empty_one_and_nothing_of_it_comes_back():
    replay = of_unequal_shards()
    batch = replay.sample(50, 20)
    assert batch is not None
    before = replay.inserted
    handles(replay)[1].dead = True
    assert replay.add(rollout(1, 9, 10, N)) == 20
    assert replay.faults == {"replay_shards_lost": 1}
    assert len(replay) == 20 * (1 + 1 + 3)
    assert replay.inserted == before + 20
    weights = replay.state()["weights"].copy()
    lost = batch.observations[..., 0] == 1
    replay.set_priorities(batch.indices[lost], np.full(lost.sum(), 7.0))
    np.testing.assert_array_equal(replay.state()["weights"], weights)
    for _ in range(3):
        again = replay.sample(50, 20)
    assert torn(again) == 0
    ours = again.observations[..., 0] == 1
    assert set(again.observations[ours][:, 2].tolist()) == set(range(90, 100))
    assert len(set(again.indices[ours].tolist()) & set(batch.indices.ravel().tolist())) == 0


def test_minibatches_of_a_lost_shard_are_drawn_anew():
    replay = of_unequal_shards()
    assert replay.sample(50, 2) is not None
    replay._under_way = None
    handles(replay)[1].dead = True
    batch = replay.sample(50, 2)
    assert batch is not None
    assert set(batch.observations[..., 0].ravel().tolist()) == {0, 2}
    assert replay.faults == {"replay_shards_lost": 1}
    assert replay.sampled == 200


def test_where_all_is_lost_nothing_is_drawn():
    replay = of_unequal_shards()
    for handle in handles(replay):
        handle.dead = True
    assert replay.sample(50, 2) is None
    assert len(replay) == replay.sampled == 0
    assert replay.inserted == 20 * 13
    assert replay.add(rollout(0, 1, 10, N)) == 20
    assert replay.sample(50, 2) is not None


def test_what_is_lost_is_left_out_of_the_state():
    replay = of_unequal_shards()
    handles(replay)[1].dead = True
    state = replay.state()
    assert set(contents(state)[:, 0].tolist()) == {0, 2}
    assert state["counters"].tolist() == [20 * 13, 0]
    assert replay.faults == {"replay_shards_lost": 1}
    assert len(replay) == 20 * 4
    restored = sharded(2, writers=3, rows=100, n_step=1)
    restored.restore(state)
    assert len(restored) == 20 * 4


@pytest.mark.parametrize(
    "name",
    [
        *("ActorDiedError", "OutOfMemoryError", "NodeDiedError", "WorkerCrashedError"),
        *("OwnerDiedError", "ObjectReconstructionFailedError"),
    ],
)
def test_a_shard_is_lost_in_many_ways(name):
    replay = of_unequal_shards()
    handles(replay)[1].said.append(ERRORS[name]("no more"))
    assert replay.add(rollout(1, 9, 10, N)) == 20
    assert replay.faults == {"replay_shards_lost": 1}
    assert len(replay) == 20 * (1 + 1 + 3)


@pytest.mark.parametrize("where", ["add", "sample", "state"])
def test_a_shard_that_is_out_of_reach_for_a_while_keeps_what_it_has(monkeypatch, where):
    monkeypatch.setattr(shards, "_LOOK_EVERY", 0.0)
    replay, gone = of_unequal_shards(), ERRORS["ActorUnavailableError"]
    handles(replay)[1].said += [gone("no way there"), gone("nor there")]
    if where == "sample":
        assert replay.sample(50, 20) is not None
    elif where == "add":
        assert replay.add(rollout(1, 9, 10, N)) == 20
    state = replay.state()
    assert len(contents(state)) == len(replay) == 20 * (13 + (where == "add"))
    assert not replay.faults
    monkeypatch.setattr(shards, "_PATIENCE", 0.0)
    handles(replay)[1].said += [gone("no way there"), gone("nor there")]
    replay.cut()
    assert replay.faults == {"replay_shards_lost": 1}


def test_a_rollout_that_is_lost_before_a_shard_has_it_is_left_out(caplog):
    replay, errors = of_unequal_shards(), ERRORS
    lost = errors["RayTaskError"]("in add", errors["ObjectLostError"]("gone"))
    handles(replay)[1].said.append(lost)
    assert replay.add(rollout(1, 9, 10, N)) == 0
    assert "rollout of worker 1 did not come to its shard: ObjectLostError: gone" in caplog.text
    assert not replay.faults
    assert len(replay) == 20 * 13


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ERRORS["LocalRayletDiedError"]("gone"), "cluster cannot be used .* LocalRayletDied.*gone"),
        (ERRORS["RaySystemError"]("gone"), "cluster cannot be used .* RaySystemError: gone; .*her"),
        (OSError("Broken pipe"), "cluster cannot be used .* OSError: Broken pipe; .* --resume"),
        (ERRORS["OutOfDiskError"]("full"), "no room for what workers need: OutOfDisk.*: full; mak"),
        (ERRORS["RayTaskError"]("in add", MemoryError("too much")), "MemoryError: too much"),
        (ERRORS["RayTaskError"]("in add", UserError("too wide")), "^too wide$"),
    ],
)
def test_whatever_else_ray_raises_ends_the_run_as_one_of_our_errors(error, message):
    replay = of_unequal_shards()
    handles(replay)[1].said.append(error)
    with pytest.raises(StarlingError, match=message):
        replay.add(rollout(1, 9, 10, N))
    assert not replay.faults
    assert len(contents(replay.state())) == 20 * 13


def test_who_is_not_connected_any_more_connects_to_no_other_cluster(monkeypatch):
    replay = of_unequal_shards()
    monkeypatch.setattr(Here, "is_initialized", lambda _: False)
    with pytest.raises(WorkerDiedError, match=r"no longer connected to Ray; .* resume it"):
        replay.add(rollout(1, 9, 10, N))


def test_too_many_losses_end_the_run():
    replay = sharded(2, restarts=1)
    for handle in handles(replay):
        handle.dead = True
    assert replay.add(rollout(0, 0, 10, N)) > 0
    with pytest.raises(WorkerDiedError, match=r"2 shards .* worker_restarts is 1; .* shard 1: "):
        replay.add(rollout(4, 0, 10, N))


def test_who_waits_for_a_shard_that_hangs_can_be_stopped(monkeypatch, caplog):
    monkeypatch.setattr(shards, "_WHILE_STOPPING", 0.0)
    replay = of_unequal_shards()
    replay._shards._cluster.stop = iter([False, False, *[True] * 9]).__next__
    handles(replay)[1].said += [ERRORS["GetTimeoutError"]() for _ in range(9)]
    assert replay.sample(50, 20) is None
    assert "minibatches were not drawn: a shard of the replay has not answered for" in caplog.text
    assert replay.add(rollout(1, 9, 10, N)) == 0
    assert replay.add(rollout(2, 3, 10, N)) == 20
    assert not replay.faults
    assert set(contents(replay.state())[:, 0].tolist()) == {0, 2}
    assert replay.faults == {"replay_shards_lost": 1}
    assert len(replay) == 20 * (1 + 3 + 1)


def test_a_shard_that_never_starts_ends_the_run(monkeypatch):
    replay = sharded(2, restarts=100)
    monkeypatch.setattr(Handle, "__getattr__", no_memory)
    with pytest.raises(WorkerDiedError, match=r"6 shards .*, 6 in a row before they took anything"):
        replay.add(rollout(0, 0, 10, N))


def no_memory(handle: Handle, method: str) -> Any:
    lost = ERRORS["OutOfMemoryError"]("killed")
    return SimpleNamespace(remote=lambda *_: lost)


def test_what_one_machine_keeps_has_to_fit_into_its_memory_together(monkeypatch):
    replay, free = sharded(2), 7 * 10**9

    def new_replay(writers: int) -> Replay:
        return Replay(writers * N * 10**6, writers * N, n_step=3, prioritized=True)

    rows = np.zeros((1, 1, 100)), np.zeros((1, 1))
    one, other = handles(replay)
    one.actor.where = other.actor.where = lambda: ("a", free)
    with pytest.raises(
        UserError, match=r"on node a, a replay of 10,000,000 transitions .* 7\.0 GB"
    ):
        replay.check_memory(*rows, new_replay, saved=False)
    other.actor.where = lambda: ("b", free)
    replay.check_memory(*rows, new_replay, saved=False)
    monkeypatch.setattr(sharded_replay, "available_memory", lambda: free)
    message = r"takes 8\.\d GB, and 7\.0 GB are free: .*, or leave it out .* \(save_replay False\)"
    with pytest.raises(UserError, match=message):
        replay.check_memory(*rows, new_replay, saved=True)
