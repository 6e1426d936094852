"""Vector environments of the user's, in every autoreset mode, against the serial backend."""

from __future__ import annotations

import multiprocessing

import envs_for_tests as envs
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as wrappers

from starling.envs.adapter import VectorEnvAdapter
from starling.envs.make import make_vec
from starling.envs.serial import SerialVectorEnv
from starling.errors import UserError

N = 4
SEEDS = [11, 12, 13, 14]

pytestmark = pytest.mark.timeout(60)


def cart_pole():
    # short enough that some episodes are truncated and others terminate
    return gym.make("CartPole-v1", max_episode_steps=15)


def nested():
    return envs.SampleEnv(envs.NESTED, spaces.Discrete(3))


def sync(factory, mode, **options):
    return SyncVectorEnv([factory] * N, autoreset_mode=mode, **options)


def action_of(env_index, step):
    """Actions that depend on how often an environment was stepped, and on nothing else."""
    return (7 * step + 3 * env_index + step // 3) % 2


def flat(observation):
    if isinstance(observation, dict):
        return [x for value in observation.values() for x in flat(value)]
    if isinstance(observation, tuple):
        return [x for value in observation for x in flat(value)]
    return [np.asarray(observation)]


def row(batch, i):
    return [array[i] for array in flat(batch)]


def episodes(vector, steps):
    """Every environment's transitions, rows that are no experience left out.

    Returns:
        Per environment a list of (observation, action, reward, terminated, truncated, next
        observation): the last observation where an episode ends, not the first of the next.
    """
    found = [[] for _ in range(N)]
    counts = [0] * N
    observations, _ = vector.reset(seed=SEEDS)
    for _ in range(steps):
        before = [row(observations, i) for i in range(N)]
        actions = np.array([action_of(i, counts[i]) for i in range(N)])
        observations, rewards, terminations, truncations, infos = vector.step(actions)
        assert rewards.dtype == np.float64
        assert (terminations.dtype, truncations.dtype) == (np.bool_, np.bool_)
        valid = infos.get("valid", np.ones(N, bool))
        for i in range(N):
            if not valid[i]:
                continue
            counts[i] += 1
            ended = terminations[i] or truncations[i]
            after = flat(infos["final_obs"][i]) if ended else row(observations, i)
            end = (bool(terminations[i]), bool(truncations[i]))
            found[i].append((before[i], actions[i], rewards[i], *end, after))
    return found


def assert_same_episodes(ours, oracle):
    """As far as the shorter of the two goes, and that is far enough to have several episodes."""
    for mine, theirs in zip(ours, oracle, strict=True):
        length = min(len(mine), len(theirs))
        assert sum(a[3] or a[4] for a in mine[:length]) >= 2
        for a, b in zip(mine[:length], theirs[:length], strict=True):
            assert a[1:5] == b[1:5]
            for x, y in zip((*a[0], *a[5]), (*b[0], *b[5]), strict=True):
                np.testing.assert_array_equal(x, y)


MODES = list(AutoresetMode)


@pytest.mark.parametrize("factory", [cart_pole, nested])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_episodes_as_the_serial_backend(factory, mode):
    with SerialVectorEnvs(factory) as oracle:
        expected = episodes(oracle, 70)
    ours = VectorEnvAdapter(sync(factory, mode))
    assert_same_episodes(episodes(ours, 80), expected)
    ours.close()


class SerialVectorEnvs:
    """The oracle, closed again."""

    def __init__(self, factory):
        self.vector = SerialVectorEnv([factory] * N)

    def __enter__(self):
        return self.vector

    def __exit__(self, *_):
        self.vector.close()


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("mode", MODES)
def test_arrays_that_the_environment_reuses_are_copied(mode):
    """Gymnasium without copies writes every step into the same arrays."""
    with SerialVectorEnvs(cart_pole) as oracle:
        expected = episodes(oracle, 70)
    ours = VectorEnvAdapter(sync(cart_pole, mode, copy=False))
    assert_same_episodes(episodes(ours, 80), expected)
    first, _ = ours.reset(seed=SEEDS)
    kept = first.copy()
    ours.step(np.ones(N, int))
    np.testing.assert_array_equal(first, kept)


def test_gymnasiums_processes_can_be_used():
    ours = make_vec(AsyncVectorEnv([cart_pole] * N, autoreset_mode=AutoresetMode.SAME_STEP))
    with SerialVectorEnvs(cart_pole) as oracle:
        assert_same_episodes(episodes(ours, 70), episodes(oracle, 70))
    ours.close()
    ours.close()
    assert multiprocessing.active_children() == []


def test_the_next_episode_starts_in_the_same_step_where_that_can_be():
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        ours = VectorEnvAdapter(sync(lambda: envs.CountingEnv(length=3), mode))
        ours.reset()
        for step in range(1, 10):
            observations, _, _, truncations, infos = ours.step(np.ones(N, int))
            assert "valid" not in infos
            episode, within = 1 + step // 3, step % 3
            np.testing.assert_array_equal(observations, [[episode, within]] * N)
            if within == 0:
                assert truncations.all()
                np.testing.assert_array_equal(list(infos["final_obs"]), [[episode - 1, 3]] * N)
            else:
                assert infos == {}


def test_only_those_that_ended_are_reset():
    lengths = iter([2, 3, 4, 5])
    ours = VectorEnvAdapter(
        sync(lambda: envs.CountingEnv(length=next(lengths)), AutoresetMode.DISABLED)
    )
    ours.reset()
    for _ in range(4):
        observations = ours.step(np.ones(N, int))[0]
    np.testing.assert_array_equal(observations, [[3, 0], [2, 1], [2, 0], [1, 4]])


def test_with_next_step_the_reset_is_marked_and_its_action_ignored():
    ours = VectorEnvAdapter(
        sync(lambda: envs.CountingEnv(length=2), AutoresetMode.NEXT_STEP), infos="all"
    )
    ours.reset()
    seen = []
    for _ in range(5):
        observations, rewards, _, truncations, infos = ours.step(np.ones(N, int))
        seen.append(
            (*observations[0].tolist(), rewards[0], truncations[0], bool(infos["valid"][0]))
        )
    assert seen == [
        (1, 1, 1.0, False, True),
        (1, 2, 1.0, True, True),
        (2, 0, 0.0, False, False),
        (2, 1, 1.0, False, True),
        (2, 2, 1.0, True, True),
    ]


def test_a_reset_in_between_leaves_nothing_to_be_marked():
    ours = VectorEnvAdapter(sync(lambda: envs.CountingEnv(length=2), AutoresetMode.NEXT_STEP))
    ours.reset()
    ours.step(np.ones(N, int))
    ours.step(np.ones(N, int))
    mask = np.array([True, False, False, False])
    options = {"reset_mask": mask}
    ours.reset(options=options)
    assert list(options) == ["reset_mask"], "the user's dictionary was emptied"
    infos = ours.step(np.ones(N, int))[-1]
    np.testing.assert_array_equal(infos["valid"], mask)


# ---- infos


class Scoring(envs.CountingEnv):
    def step(self, action):
        return *super().step(action)[:4], {"score": self.steps}


@pytest.mark.parametrize("mode", MODES)
def test_infos_of_ended_episodes_are_always_there_and_others_where_asked_for(mode):
    few = VectorEnvAdapter(sync(lambda: Scoring(length=2), mode))
    many = VectorEnvAdapter(sync(lambda: Scoring(length=2), mode), infos="all")
    for vector, going_on in ((few, False), (many, True)):
        vector.reset()
        infos = vector.step(np.ones(N, int))[-1]
        assert ("score" in infos) == going_on
        assert "final_obs" not in infos
        infos = vector.step(np.ones(N, int))[-1]
        np.testing.assert_array_equal(infos["final_info"]["score"], [2] * N)
        np.testing.assert_array_equal(infos["final_info"]["_score"], [True] * N)
        np.testing.assert_array_equal(infos["_final_info"], [True] * N)
        np.testing.assert_array_equal(infos["_final_obs"], [True] * N)


@pytest.mark.parametrize("mode", MODES)
def test_action_masks_are_those_of_the_observation(mode):
    with SerialVectorEnvs(envs.MaskedEnv) as oracle:
        oracle.reset()
        expected = [oracle.step(np.zeros(N, int)) for _ in range(8)]
    ours = VectorEnvAdapter(sync(envs.MaskedEnv, mode))
    _, infos = ours.reset()
    np.testing.assert_array_equal(infos["action_mask"], [[0, 1, 1]] * N)
    masks = {tuple(e[0][0]): e[-1]["action_mask"][0] for e in expected}
    for _ in range(8):
        observations, _, _, _, infos = ours.step(np.zeros(N, int))
        if tuple(observations[0]) in masks:
            np.testing.assert_array_equal(infos["action_mask"][0], masks[tuple(observations[0])])


class NothingAllowedAtTheEnd(envs.MaskedEnv):
    def _mask(self):
        return super()._mask() * (self.steps < self.length)


@pytest.mark.parametrize("mode", MODES)
def test_an_end_may_allow_nothing(mode):
    ours = VectorEnvAdapter(sync(NothingAllowedAtTheEnd, mode))
    ours.reset()
    for _ in range(8):
        assert ours.step(np.zeros(N, int))[-1]["action_mask"].any(1).all()


def test_statistics_of_gymnasiums_wrapper_arrive():
    wrapped = wrappers.RecordEpisodeStatistics(sync(cart_pole, AutoresetMode.NEXT_STEP))
    ours = make_vec(wrapped)
    ours.reset(seed=SEEDS)
    infos = {}
    while "final_info" not in infos:
        infos = ours.step(np.ones(N, int))[-1]
    ended = infos["_final_info"]
    assert (infos["final_info"]["episode"]["l"][ended] > 0).all()


# ---- modes that are not named, or not kept


class Vector(gym.vector.VectorEnv):
    """Counts to 2, in whatever mode it says or does not say."""

    single_observation_space = spaces.Box(0, 9, (1,), np.float32)
    single_action_space = spaces.Discrete(2)
    num_envs = 2
    metadata = {}  # noqa: RUF012

    def __init__(self, same_step, key="final_obs", **metadata):
        self.same_step, self.key, self.metadata = same_step, key, metadata
        self.observation_space = spaces.Box(0, 9, (2, 1), np.float32)
        self.action_space = spaces.MultiDiscrete([2, 2])

    def reset(self, *, seed=None, options=None):
        self.seed, self.count = seed, 0
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions):
        infos = {}
        if self.count == 2:
            self.count = -1
        self.count += 1
        ended = np.full(2, self.count == 2)
        if ended.all() and self.same_step:
            if self.key:
                infos[self.key] = np.full((2, 1), self.count, np.float32)
            self.count = 0
        observations = np.full((2, 1), self.count, np.float32)
        return observations, np.ones(2, np.float32), np.zeros(2, bool), ended, infos


@pytest.mark.parametrize("key", ["final_obs", "final_observation"])
def test_final_observations_show_that_an_unnamed_mode_is_same_step(key):
    ours = VectorEnvAdapter(Vector(same_step=True, key=key))
    ours.reset()
    seen = [ours.step(np.zeros(2, int)) for _ in range(4)]
    assert [step[0][0, 0] for step in seen] == [1, 0, 1, 0]
    for infos in (seen[1][-1], seen[3][-1]):
        np.testing.assert_array_equal(list(infos["final_obs"]), [[2], [2]])
        assert "valid" not in infos


def test_without_them_it_is_next_step_as_gymnasiums_default_is():
    ours = VectorEnvAdapter(Vector(same_step=False))
    ours.reset()
    with pytest.warns(UserWarning, match=r'metadata\["autoreset_mode"\]') as warned:
        seen = [ours.step(np.zeros(2, int)) for _ in range(6)][:4]
    assert len(warned) == 1
    assert [bool(step[-1]["valid"][0]) for step in seen] == [True, True, False, True]
    np.testing.assert_array_equal(list(seen[1][-1]["final_obs"]), [[2], [2]])


def test_a_mode_given_by_its_name():
    ours = VectorEnvAdapter(Vector(same_step=True, autoreset_mode="SameStep"))
    ours.reset()
    ours.step(np.zeros(2, int))
    assert ours.step(np.zeros(2, int))[-1]["_final_obs"].all()
    with pytest.raises(UserError, match="'sometimes'; it must be NextStep, SameStep, Disabled"):
        VectorEnvAdapter(Vector(same_step=True, autoreset_mode="sometimes"))


def test_same_step_without_final_observations_is_refused():
    ours = VectorEnvAdapter(Vector(same_step=True, key="", autoreset_mode=AutoresetMode.SAME_STEP))
    ours.reset()
    ours.step(np.zeros(2, int))
    with pytest.raises(UserError, match=r"Vector ended an episode .* infos\['final_obs'\]"):
        ours.step(np.zeros(2, int))


# ---- through make_vec


def test_make_vec_takes_it_as_it_is():
    inner = Vector(same_step=True)
    ours = make_vec(inner, seed=5)
    assert ours.num_envs == ours.batch_size == 2
    assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert ours.single_observation_space == inner.single_observation_space
    ours.reset()
    assert inner.seed == 5
    ours.reset()
    assert inner.seed is None
    ours.reset(seed=7)
    assert inner.seed == 7
    assert make_vec(inner, 2).num_envs == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 3}, "num_envs is 3, but the Vector has 2"),
        ({"backend": "serial"}, "backend cannot be chosen for a Vector"),
        ({"num_workers": 2}, "num_workers cannot be chosen"),
        ({"env_kwargs": {"x": 1}}, "env_kwargs cannot be chosen"),
        ({"batch_size": 1}, "batch_size cannot be chosen"),
        ({"episode_seeds": True}, r"episode_seeds \(exact_resume\) cannot be chosen"),
        ({"step_timeout": 5}, "step_timeout cannot be chosen"),
        ({"step_timeout": -1}, "step_timeout cannot be chosen"),
        ({"autoreset_mode": "NEXT_STEP"}, "autoreset_mode cannot be chosen"),
        ({"autoreset_mode": "sometimes"}, "autoreset_mode sometimes cannot be had"),
        ({"on_env_error": "drop"}, "drop cannot be had with a Vector that exists.* give an id"),
        ({"worker_max_rss": 5}, "which a Vector that exists has not: give an id or a factory"),
        ({"infos": "some"}, "infos is 'some'"),
    ],
)
def test_what_cannot_be_changed_any_more(options, message):
    with pytest.raises(UserError, match=message):
        make_vec(Vector(same_step=True), **options)


def test_misuse_is_an_error():
    ours = VectorEnvAdapter(Vector(same_step=True))
    with pytest.raises(UserError, match=r"reset\(\) comes before"):
        ours.step(np.zeros(2, int))
    ours.reset()
    with pytest.raises(UserError, match="nothing to receive"):
        ours.recv()
    with pytest.raises(UserError, match=r"shape \(3,\) given, \(2,\) expected"):
        ours.step(np.zeros(3, int))
    with pytest.raises(UserError, match="leave out env_ids"):
        ours.send(np.zeros(1, int), [0])
    ours.send(np.zeros(2, int))
    with pytest.raises(UserError, match="under way"):
        ours.send(np.zeros(2, int))
    ours.recv()
    ours.close()
    with pytest.raises(UserError, match="closed"):
        ours.step(np.zeros(2, int))


def test_a_space_that_cannot_be_handled():
    inner = Vector(same_step=True)
    inner.single_observation_space = spaces.Text(5)
    with pytest.raises(UserError, match="Text"):
        VectorEnvAdapter(inner)


def test_attributes_and_pictures_are_the_environments_own():
    ours = VectorEnvAdapter(
        sync(lambda: envs.CountingEnv(render_mode="rgb_array"), AutoresetMode.SAME_STEP)
    )
    ours.reset()
    ours.set_attr("weight", [1.0, 2.0, 3.0, 4.0])
    assert ours.get_attr("weight") == (1.0, 2.0, 3.0, 4.0)
    np.testing.assert_array_equal(ours.step(np.ones(N, int))[1], [1.0, 2.0, 3.0, 4.0])
    assert ours.call("render")[0].shape == ours.render()[0].shape == (2, 2, 3)
