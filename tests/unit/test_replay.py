"""The replay: every field of what is drawn against plain lists, and how it is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import record
from replay_oracle import Environments, check, check_all
from scipy import stats

from starling.errors import CheckpointError, UserError
from starling.storage import n_step as ends
from starling.storage import replay_checks, replay_rings
from starling.storage.checkpoint import load_checkpoint, save_checkpoint
from starling.storage.replay import Replay
from starling.storage.rollout import Rollout

GAMMA = 0.9


def run(environments, replay, rollouts, steps, n_step, cut_at=()):
    """Feeds rollouts in, and checks everything after each."""
    kept = replay._settings["capacity"] // environments.num_envs
    before = inserted = 0
    for i in range(rollouts):
        if i in cut_at:
            environments.begin_anew()
            inserted += replay.cut()
        inserted += replay.add(environments.rollout(steps))
        expected = environments.expected(n_step, GAMMA, kept)
        check_all(replay, expected, environments)
        assert replay.inserted == inserted >= before
        before = inserted


@settings(max_examples=60, deadline=None)
@given(
    num_envs=st.integers(1, 4),
    steps=st.integers(1, 7),
    rollouts=st.integers(1, 12),
    n_step=st.integers(1, 5),
    spare=st.integers(0, 30),
    seed=st.integers(0, 10**6),
    next_step=st.booleans(),
    masks=st.booleans(),
    faults=st.booleans(),
    prioritized=st.booleans(),
    cut_at=st.sets(st.integers(1, 11), max_size=2),
)
def test_what_is_drawn_is_what_happened(
    num_envs, steps, rollouts, n_step, spare, seed, next_step, masks, faults, prioritized, cut_at
):
    environments = Environments(num_envs, seed, next_step, masks, faults)
    replay = Replay(
        (steps + n_step) * num_envs + spare,
        num_envs,
        n_step=n_step,
        gamma=GAMMA,
        prioritized=prioritized,
        seed=seed,
    )
    run(environments, replay, rollouts, steps, n_step, cut_at)


def faulty_n_step(environments, n_step=3):
    replay = Replay(4000, environments.num_envs, n_step=n_step, gamma=GAMMA)
    run(environments, replay, 4, 50, n_step)


@pytest.mark.parametrize("next_step", [False, True])
@pytest.mark.parametrize("wrong", ["over_an_end", "truncation_terminates", "next_across_an_end"])
def test_the_oracle_notices_what_is_wrong(monkeypatch, wrong, next_step):
    true_ends = ends.ends_of

    def wrong_ends(rollout):
        found = true_ends(rollout)
        if wrong == "over_an_end":
            found[(found != ends.NO_EXPERIENCE)] = ends.GOES_ON
        elif wrong == "truncation_terminates":
            aside = (found == ends.TRUNCATED) | (found == ends.TRUNCATED_ASIDE)
            found[aside] = ends.TERMINATED
        else:
            found[found == ends.TRUNCATED_ASIDE] = ends.TRUNCATED
        return found

    if not (next_step and wrong == "next_across_an_end"):
        with monkeypatch.context() as patch:
            patch.setattr(replay_rings, "ends_of", wrong_ends)
            with pytest.raises((AssertionError, UserError)):
                faulty_n_step(Environments(3, 5, next_step, faults=False))
    faulty_n_step(Environments(3, 5, next_step, faults=False))


# ---- how it is drawn


def filled(seed=1, rollouts=3, **options):
    environments = Environments(4, seed)
    replay = Replay(400, 4, gamma=GAMMA, n_step=3, seed=seed, **options)
    for _ in range(rollouts):
        replay.add(environments.rollout(40))
    return environments, replay


def drawn(replay, expected, draws=200_000, **options):
    """How often each transition came."""
    indices = replay.sample(20, draws // 20, **options).indices.ravel()
    places = {index: i for i, index in enumerate(sorted(expected))}
    return np.bincount([places[index] for index in indices.tolist()], minlength=len(expected))


@pytest.mark.parametrize("rollouts", [1, 2, 3, 7])
def test_uniform_draws_favour_nobody(rollouts):
    environments, replay = filled(rollouts=rollouts)
    expected = environments.expected(3, GAMMA, 100)
    assert stats.chisquare(drawn(replay, expected)).pvalue > 0.01


def test_a_few_among_many_that_are_no_experience_are_drawn_alike():
    environments = Environments(4, 0, faults=False)
    replay = Replay(40_000, 4, gamma=GAMMA, seed=1)
    rollout = environments.rollout(2000)
    valid = np.random.default_rng(0).random((2000, 4)) < 0.01
    added = replay.add(rollout._replace(valid=valid))
    assert added == len(replay) == valid.sum()
    t, n = np.nonzero(valid)
    counts = drawn(replay, (t * 4 + n).tolist())
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_priorities_decide_how_often_and_weights_make_up_for_it(alpha):
    environments, replay = filled(prioritized=True, alpha=alpha)
    expected = sorted(environments.expected(3, GAMMA, 100))
    priorities = np.random.default_rng(3).uniform(0.01, 2.0, len(expected))
    replay.set_priorities(np.array(expected), priorities)
    shares = priorities**alpha / (priorities**alpha).sum()
    # Strata make counts more even than independent draws: the statistic can only be smaller.
    chance = stats.chisquare(drawn(replay, expected), shares * 200_000).pvalue
    assert chance > 0.01
    record("drawn", p=float(chance), draws=200_000)

    batch = replay.sample(100, 3, beta=0.7)
    places = np.searchsorted(expected, batch.indices)
    weights = (len(expected) * shares[places]) ** -0.7
    np.testing.assert_allclose(batch.weights, weights / weights.max(1, keepdims=True), rtol=1e-6)
    assert batch.weights.max(1).tolist() == [1.0] * 3


def test_new_transitions_get_the_largest_priority_or_what_is_said():
    environments = Environments(1, 0, faults=False)
    replay = Replay(60, 1, gamma=GAMMA, n_step=2, prioritized=True, alpha=1.0)
    first = environments.rollout(10)._replace(terminated=np.zeros((10, 1), bool))
    first = first._replace(truncated=np.zeros((10, 1), bool))
    replay.add(first)
    replay.set_priorities(np.arange(9), np.full(9, 0.5))
    replay.set_priorities(np.array([3]), np.array([7.0]))
    second = first._replace(observations=first.observations[::-1])
    second.observations[0] = first.observations[-1]
    given = np.arange(1.0, 11.0)[:, None]
    assert replay.add(second._replace(priorities=given)) == 10
    assert replay.add(second._replace(observations=second.observations[::-1].copy())) == 10
    # Row 9 waited, came with none and gets the 9 of row 18; row 19 waited, and came with 10.
    expected = [0.5] * 3 + [7.0] + [0.5] * 5 + [9.0] + given[:, 0].tolist() + [10.0] * 9
    counts = drawn(replay, range(29), 100_000)
    assert stats.chisquare(counts, np.array(expected) / sum(expected) * 100_000).pvalue > 0.01


def test_priorities_of_rows_written_over_never_come_back():
    environments, replay = filled(prioritized=True)
    old = sorted(environments.expected(3, GAMMA, 100))
    gone, kept = np.array(old[:40]), np.array(old[-40:])
    replay.add(environments.rollout(40))
    before = replay.state()["weights"].copy()
    replay.set_priorities(gone, np.full(40, 1e6))
    np.testing.assert_array_equal(replay.state()["weights"], before)
    replay.set_priorities(np.concatenate([gone, kept]), np.full(80, 5.0))
    assert (replay.state()["weights"] != before).sum() == 40
    assert replay.state()["largest"] == [5.0]


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_wrong_priorities_are_refused(wrong):
    environments, replay = filled(prioritized=True)
    batch = replay.sample(2)
    with pytest.raises(UserError, match=r"is no priority: it has to be positive"):
        replay.set_priorities(batch.indices, np.array([[1.0, wrong]]))
    rollout = environments.rollout(40)
    priorities = np.ones((40, 4))
    valid = np.ones((40, 4), bool) if rollout.valid is None else rollout.valid
    priorities[tuple(np.argwhere(valid)[-1])] = wrong
    size = len(replay)
    with pytest.raises(UserError, match="is no priority"):
        replay.add(rollout._replace(priorities=priorities))
    assert len(replay) == size
    replay.add(rollout._replace(priorities=np.where(valid, 1.0, wrong)))


# ---- what is refused


def test_what_does_not_fit_is_refused():
    environments, replay = filled()
    with pytest.raises(UserError, match=r"set its capacity to 12 or more"):
        Replay(11, 4, n_step=2)
    small = Replay(20, 4)
    with pytest.raises(UserError, match=r"keeps 5 steps .* rollouts of 5 steps .* need 6: .* 24"):
        small.add(environments.rollout(5))
    with pytest.raises(UserError, match=r"batch of 1 transitions cannot be drawn from the 0"):
        small.sample(1)
    with pytest.raises(UserError, match=f"batch of 401 .* from the {len(replay)}"):
        replay.sample(401)
    with pytest.raises(UserError, match="num_envs 4"):
        replay.add(Environments(5, 0).rollout(3))
    with pytest.raises(UserError, match="without: make it with prioritized"):
        replay.set_priorities(np.array([0]), np.array([1.0]))
    for wrong in ({"n_step": 0}, {"frame_stack": 1}, {"gamma": 1.5}, {"alpha": -1}):
        with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
            Replay(100, 4, **wrong)
    with pytest.raises(UserError, match="num_envs 0"):
        Replay(100, 0)


def test_what_does_not_follow_is_refused_and_changes_nothing():
    environments, replay = filled()
    expected = environments.expected(3, GAMMA, 100)
    rollout = environments.rollout(4)
    stranger = Environments(4, 9).rollout(4)
    as_floats = rollout._replace(observations=rollout.observations.astype(float))
    lacking = rollout._replace(truncated=np.ones((4, 4), bool), valid=None)
    lacking = lacking._replace(terminated=np.zeros((4, 4), bool))
    for wrong, message in (
        (stranger, r"environments 0 to 3 does not begin .* call cut\(\)"),
        (as_floats, r"float64\[\].* before were .*int64\[\]"),
        (
            rollout._replace(observations=rollout.observations[:-1]),
            r"shape \(4, 4\), .* give 5 rows",
        ),
        (rollout._replace(actions=rollout.actions[:, :3]), r"actions .* shape \(4, 3\)"),
        (rollout._replace(truncated=rollout.truncated[:1]), r"truncated .* shape \(1, 4\)"),
        (
            rollout._replace(final_observations=np.zeros((4, 2))),
            r"final_observations .* \(4, 2\), .* give rows of \(\)",
        ),
        (lacking, "environment 0 of the rollout was truncated at step .* is missing"),
    ):
        with pytest.raises(UserError, match=message):
            replay.add(wrong)
        check_all(replay, expected, environments)
    replay.add(rollout)
    check_all(replay, environments.expected(3, GAMMA, 100), environments)


@pytest.mark.parametrize(("prioritized", "row"), [(False, 4023), (True, 4039)])
def test_a_replay_that_cannot_fit_into_memory_is_refused(monkeypatch, prioritized, row):
    monkeypatch.setattr(replay_checks, "available_memory", lambda: 10**9)
    rollout = Rollout(
        np.zeros((3, 2, 1000), np.float32),
        np.zeros((2, 2), np.int64),
        *(np.zeros((2, 2), dtype) for dtype in (np.float32, bool, bool)),
        np.zeros((0, 1000), np.float32),
        np.zeros(0, np.int32),
    )
    most = 10**9 // row - 2
    message = rf"1,000,000 transitions of {row:,} bytes takes 4\.0 GB, and 1\.0 GB are free: "
    with pytest.raises(UserError, match=rf"{message}lower buffer_size to {most:,} at most$"):
        Replay(1_000_000, 2, prioritized=prioritized).add(rollout)
    kind = rollout.observations, rollout.actions
    Replay(most, 2, prioritized=prioritized).check_memory(*kind)
    with pytest.raises(UserError):
        Replay(most + 2, 2, prioritized=prioritized).check_memory(*kind)
    monkeypatch.setattr(replay_checks, "available_memory", lambda: None)
    with pytest.raises(UserError, match=r"GB: lower buffer_size$"):
        Replay(10**15, 2, prioritized=prioritized).add(rollout)


# ---- what it takes, and keeping it


def cartpole(steps, envs, seed=0):
    random = np.random.default_rng(seed)
    return Rollout(
        random.normal(size=(steps + 1, envs, 4)).astype(np.float32),
        random.integers(0, 2, (steps, envs)),
        np.ones((steps, envs), np.float32),
        np.zeros((steps, envs), bool),
        np.zeros((steps, envs), bool),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int32),
    )


@pytest.mark.parametrize("prioritized", [False, True])
def test_a_million_cartpole_transitions_take_less_than_100_mb(prioritized):
    replay = Replay(1_000_000, 8, n_step=3, prioritized=prioritized)
    replay.add(cartpole(100, 8))
    assert 30e6 < replay.nbytes < 60e6
    batch = replay.sample(5)
    assert batch.actions.dtype == np.int64
    assert batch.observations.dtype == np.float32


def test_trees_keep_their_structure_and_types():
    random = np.random.default_rng(0)
    observations = {
        "pixels": random.integers(0, 255, (31, 2, 3, 3), np.uint8),
        "rest": (random.normal(size=(31, 2)), {"deep": np.arange(62).reshape(31, 2, 1)}),
    }
    actions = {"push": random.integers(0, 9, (30, 2)), "turn": (random.random((30, 2, 2)),)}
    flags = np.zeros((30, 2), bool)
    rollout = Rollout(observations, actions, np.ones((30, 2), np.float32), flags, flags, None, None)
    replay = Replay(200, 2)
    replay.add(rollout)
    restored = Replay(200, 2)
    restored.restore(replay.state())
    for batch in (replay.sample(20, 5), restored.sample(20, 5)):
        t, n = np.divmod(batch.indices, 2)
        pixels, (number, deeper) = batch.observations["pixels"], batch.observations["rest"]
        np.testing.assert_array_equal(pixels, observations["pixels"][t, n])
        np.testing.assert_array_equal(number, observations["rest"][0][t, n])
        following = batch.next_observations["rest"][1]["deep"]
        np.testing.assert_array_equal(following, deeper["deep"] + 2)
        np.testing.assert_array_equal(batch.actions["push"], actions["push"][t, n])
        np.testing.assert_array_equal(batch.actions["turn"][0], actions["turn"][0][t, n])
        assert (pixels.dtype, number.dtype) == (np.uint8, np.float64)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("next_step", [False, True])
@pytest.mark.parametrize("rollouts", [0, 1, 3, 5])
def test_a_restored_replay_goes_on_the_same(tmp_path, rollouts, next_step, prioritized):
    def new():
        return Replay(120, 3, n_step=2, gamma=GAMMA, prioritized=prioritized, seed=4)

    environments, replay = Environments(3, 2, next_step, masks=True), new()
    for _ in range(rollouts):
        replay.add(environments.rollout(15))
        batch = replay.sample(5)
        if prioritized:
            replay.set_priorities(batch.indices, np.random.default_rng(0).random((1, 5)) + 3)
    save_checkpoint(tmp_path, 7, {"replay": replay.state()}, {}, {})
    restored = new()
    restored.restore(load_checkpoint(tmp_path).arrays["replay"])
    assert (restored.inserted, restored.sampled) == (replay.inserted, replay.sampled)
    for _ in range(6):
        rollout = environments.rollout(15)
        assert replay.add(rollout) == restored.add(rollout)
        assert len(replay) == len(restored)
        batch, again = replay.sample(8, 2), restored.sample(8, 2)
        for one, other in zip(batch, again, strict=True):
            np.testing.assert_array_equal(one, other)
        check(again, environments.expected(2, GAMMA, 40), environments)
    for name, array in replay.state().items():
        np.testing.assert_array_equal(array, restored.state()[name], err_msg=name)
    record("restored", batches=12)


def test_a_checkpoint_of_other_settings_is_refused():
    _, replay = filled()
    with pytest.raises(CheckpointError, match=r"n_step 3 there and 1 here, gamma 0.9 there"):
        Replay(400, 4).restore(replay.state())
    with pytest.raises(ValueError, match="before anything is added"):
        replay.restore(replay.state())
