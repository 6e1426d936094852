"""What every backend that steps environments promises, with Gymnasium and `serial` as oracles."""

from __future__ import annotations

import functools
import json
import os
import warnings

import envs_for_tests as envs
import gymnasium as gym
import numpy as np
import pytest
from comparing import actions_for, assert_same, rollout
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as wrappers

from starling.envs.make import BACKENDS as REGISTRY
from starling.envs.make import load_backend
from starling.envs.process import ProcessVectorEnv
from starling.envs.seeding import child_seeds
from starling.envs.serial import SerialVectorEnv
from starling.envs.thread import ThreadVectorEnv
from starling.errors import UserError, WorkerError

BACKENDS = {
    name: backend
    for name, backend in ((name, load_backend(name)) for name in REGISTRY)
    # those others can only make what they know
    if not getattr(backend, "by_id", False) and not getattr(backend, "by_name", False)
}

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.fixture
def make(backend, closed_at_the_end):
    """Makes vector environments that are closed when the test ends."""

    def make_one(factory, n, **options):
        return closed_at_the_end(backend([factory] * n, **options))

    return make_one


# No functions of this file: workers would import it, and with it JAX.
nested = functools.partial(envs.SampleEnv, envs.NESTED)
pendulum = functools.partial(gym.make, "Pendulum-v1", max_episode_steps=7)
# short enough that some episodes are truncated and others terminate
cart_pole = functools.partial(gym.make, "CartPole-v1", max_episode_steps=25)


# ---- the same as Gymnasium


@pytest.mark.parametrize("factory", [cart_pole, nested], ids=["CartPole", "nested"])
def test_steps_as_gymnasium_does(make, factory):
    seeds = [11, 12, 13, 14, 15]
    vector = make(factory, 5, num_workers=2, infos="all")
    oracle = SyncVectorEnv([factory] * 5, autoreset_mode=AutoresetMode.SAME_STEP)
    actions = actions_for(oracle, 80)
    for ours, theirs in zip(
        rollout(vector, actions, seed=seeds), rollout(oracle, actions, seed=seeds), strict=True
    ):
        assert_same(ours, theirs)


def test_has_the_attributes_of_a_vector_environment(make, backend):
    vector = make(cart_pole, 3)
    oracle = SyncVectorEnv([cart_pole] * 3)
    assert isinstance(vector, gym.vector.VectorEnv)
    assert (vector.num_envs, vector.batch_size, vector.backend) == (3, 3, backend.backend)
    assert vector.single_observation_space == oracle.single_observation_space
    assert vector.observation_space == oracle.observation_space
    assert vector.action_space == oracle.action_space
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert vector.spec.id == "CartPole-v1"
    observations, _ = vector.reset(seed=0)
    assert vector.observation_space.contains(observations)


def test_next_step_mode_is_gymnasiums(make):
    seeds = [1, 2, 3]
    vector = make(nested, 3, num_workers=2, infos="all", autoreset_mode="NextStep")
    oracle = SyncVectorEnv([nested] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    actions = actions_for(oracle, 60)
    for ours, theirs in zip(
        rollout(vector, actions, seed=seeds), rollout(oracle, actions, seed=seeds), strict=True
    ):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("wrap", "mode"),
    [
        (wrappers.RecordEpisodeStatistics, "SameStep"),
        (wrappers.NormalizeReward, "SameStep"),
        (lambda env: wrappers.ClipReward(env, 0.0, 0.1), "SameStep"),
        (wrappers.DictInfoToList, "SameStep"),
        (lambda env: wrappers.RescaleAction(env, -1.0, 1.0), "SameStep"),
        (wrappers.FlattenObservation, "NextStep"),
        (wrappers.NormalizeObservation, "NextStep"),
        (lambda env: wrappers.RescaleObservation(env, -1.0, 1.0), "NextStep"),
    ],
)
def test_gymnasiums_wrappers_work(make, wrap, mode):
    """NormalizeObservation and its kind refuse SAME_STEP, whoever makes the environments."""
    ours = wrap(make(pendulum, 4, num_workers=2, infos="all", autoreset_mode=mode))
    theirs = wrap(SyncVectorEnv([pendulum] * 4, autoreset_mode=AutoresetMode(mode)))
    actions = [np.full((4, 1), 0.25, np.float32)] * 20
    for a, b in zip(
        rollout(ours, actions, seed=[1, 2, 3, 4]),
        rollout(theirs, actions, seed=[1, 2, 3, 4]),
        strict=True,
    ):
        for infos in (a[-1], b[-1]):
            if isinstance(infos, dict) and "episode" in infos:
                infos["episode"].pop("t")  # a duration
        assert_same(a, b)


# ---- seeds


def test_one_seed_gives_each_environment_its_own(make):
    vector = make(envs.CountingEnv, 4, num_workers=2)
    vector.reset(seed=5)
    assert vector.get_attr("seed_used") == tuple(child_seeds(5, 4))
    assert len(set(vector.get_attr("seed_used"))) == 4


def test_the_seed_given_at_the_start_serves_the_first_reset_only(make):
    vector = make(envs.CountingEnv, 2, seed=5)
    vector.reset()
    assert vector.get_attr("seed_used") == tuple(child_seeds(5, 2))
    vector.reset()
    assert vector.get_attr("seed_used") == (None, None)


def test_an_explicit_seed_wins_over_the_one_given_at_the_start(make):
    vector = make(envs.CountingEnv, 2, seed=5)
    vector.reset(seed=[7, None])
    assert vector.get_attr("seed_used") == (7, None)


def test_wrong_seeds_are_refused(make):
    vector = make(envs.CountingEnv, 2)
    with pytest.raises(UserError, match="3 seeds given for 2 environments"):
        vector.reset(seed=[1, 2, 3])
    with pytest.raises(UserError, match="negative"):
        vector.reset(seed=-1)


# ---- resets, ends and infos


def test_reset_mask_resets_some_and_leaves_the_others(make):
    vector = make(envs.CountingEnv, 4, num_workers=2)
    vector.reset()
    vector.step([1, 1, 1, 1])
    observations, _ = vector.reset(options={"reset_mask": np.array([False, False, True, False])})
    np.testing.assert_array_equal(observations, [[1, 1], [1, 1], [2, 0], [1, 1]])
    observations, *_ = vector.step([0, 0, 0, 0])
    np.testing.assert_array_equal(observations, [[1, 2], [1, 2], [2, 1], [1, 2]])


@pytest.mark.parametrize(
    "mask", [[True, False], np.array([1, 0]), np.array([True]), np.array([False, False])]
)
def test_wrong_reset_masks_are_refused(make, mask):
    vector = make(envs.CountingEnv, 2)
    vector.reset()
    with pytest.raises(UserError, match="reset_mask"):
        vector.reset(options={"reset_mask": mask})


def test_options_reach_the_environments(make):
    vector = make(nested, 2)
    _, infos = vector.reset(options={"level": 3})
    assert list(infos["options"]) == ["{'level': 3}"] * 2


@pytest.mark.parametrize("terminate", [False, True])
def test_an_end_delivers_both_observations(make, terminate):
    vector = make(functools.partial(envs.CountingEnv, 2, terminate), 2)
    vector.reset()
    vector.step([1, 0])
    observations, rewards, terminations, truncations, infos = vector.step([0, 1])
    np.testing.assert_array_equal(observations, [[2, 0], [2, 0]])
    np.testing.assert_array_equal(rewards, [0, 1])
    assert rewards.dtype == np.float64
    np.testing.assert_array_equal(terminations, [terminate] * 2)
    np.testing.assert_array_equal(truncations, [not terminate] * 2)
    np.testing.assert_array_equal(np.stack(list(infos["final_obs"])), [[1, 2], [1, 2]])
    np.testing.assert_array_equal(infos["_final_obs"], [True, True])
    *_, infos = vector.step([0, 0])
    assert "final_obs" not in infos


def test_only_the_infos_of_resets_and_ends_are_delivered(make):
    vector = make(nested, 3, num_workers=2)
    oracle = make(nested, 3, num_workers=2, infos="all")
    actions = actions_for(vector, 40)
    _, infos = vector.reset(seed=[1, 2, 3])
    assert infos["fresh"].all()
    oracle.reset(seed=[1, 2, 3])
    ended = 0
    for action in actions:
        *_, infos = vector.step(action)
        *_, everything = oracle.step(action)
        assert "steps" not in infos
        assert "steps" in everything or everything["_final_info"].all()
        if "final_info" in infos:
            ended += 1
            assert_same(infos["final_info"], everything["final_info"])
            np.testing.assert_array_equal(infos["_fresh"], infos["_final_obs"])
    assert ended > 3


def test_reused_arrays_are_not_aliased(make):
    vector = make(envs.MutatingEnv, 2)
    first, _ = vector.reset()
    action = np.full((2, 2), 0.5, np.float32)
    seen = [vector.step(action) for _ in range(4)]
    np.testing.assert_array_equal(first, [[1, 0], [1, 0]])
    steps = [[[1, 1]] * 2, [[1, 2]] * 2, [[2, 0]] * 2, [[2, 1]] * 2]
    np.testing.assert_array_equal([step[0] for step in seen], steps)
    np.testing.assert_array_equal(np.stack(list(seen[2][4]["final_obs"])), [[1, 3], [1, 3]])
    np.testing.assert_array_equal(action, np.full((2, 2), 0.5))
    assert all((step[1] == 1.0).all() for step in seen)


def test_copy_false_returns_the_buffers_themselves(make):
    vector = make(envs.CountingEnv, 2, copy=False)
    first, _ = vector.reset()
    second, *_ = vector.step([0, 0])
    assert np.shares_memory(first, second)
    np.testing.assert_array_equal(first, [[1, 1], [1, 1]])


def test_action_masks_belong_to_the_observations(make):
    vector = make(envs.MaskedEnv, 4, num_workers=2)
    observations, infos = vector.reset()
    for _ in range(7):
        expected = np.arange(3) != observations[:, 1:] % 3
        np.testing.assert_array_equal(infos["action_mask"], expected)
        assert infos["action_mask"].dtype == np.bool_
        observations, *_, infos = vector.step([0, 0, 0, 0])


# ---- send and recv


def test_serial_returns_what_was_sent_first():
    vector = SerialVectorEnv([envs.CountingEnv] * 6, batch_size=2)
    assert vector.num_workers == 3
    vector.reset()
    vector.send([0] * 4, env_ids=[4, 5, 0, 1])
    vector.send([0] * 2, env_ids=[2, 3])
    ids = [vector.recv()[4]["env_id"].tolist() for _ in range(3)]
    assert ids == [[4, 5], [0, 1], [2, 3]]
    vector.close()


@pytest.mark.parametrize("backend", [ThreadVectorEnv, ProcessVectorEnv], ids=["thread", "process"])
def test_recv_returns_those_that_are_ready_first(backend, tmp_path):
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)
    factories = [functools.partial(envs.GatedEnv, gate)] + [envs.GatedEnv] * 3
    vector = backend(factories, batch_size=1)
    assert vector.num_workers == 4
    vector.reset()
    vector.send([0, 1, 1, 0])
    first = {vector.recv()[4]["env_id"].item() for _ in range(3)}
    assert first == {1, 2, 3}
    vector.send([1], env_ids=[2])  # goes on while environment 0 still works
    observations, rewards, *_, infos = vector.recv()
    assert infos["env_id"] == [2]
    np.testing.assert_array_equal(observations, [[1, 2]])
    assert rewards == [1.0]
    with pytest.raises(UserError, match="under way"):
        vector.send([0], env_ids=[0])
    with open(gate, "wb") as pipe:
        pipe.write(b"!")
    assert vector.recv()[4]["env_id"] == [0]
    vector.close()


def test_every_environment_takes_its_own_steps_in_partial_batches(make):
    """Each environment's trajectory is that of a vector environment stepped in lock-step."""
    vector = make(nested, 6, num_workers=3, batch_size=4, seed=3)
    oracle = SerialVectorEnv([nested] * 6, seed=3, infos="final")
    actions = actions_for(oracle, 30)
    observations, _ = vector.reset()
    expected = rollout(oracle, actions)
    assert_same(observations, expected[0][0])
    taken = np.zeros(6, int)
    vector.send(actions[0])
    for _ in range(25):
        observations, rewards, terminations, truncations, infos = vector.recv()
        ids = infos["env_id"]
        assert len(ids) == 4
        taken[ids] += 1
        for row, i in enumerate(ids):
            step = expected[taken[i]]
            np.testing.assert_array_equal(rewards[row], step[1][i])
            np.testing.assert_array_equal(observations["joints"][row], step[0]["joints"][i])
            assert (terminations[row], truncations[row]) == (step[2][i], step[3][i])
            if terminations[row] or truncations[row]:
                assert_same(infos["final_obs"][row], step[4]["final_obs"][i])
                assert infos["final_info"]["steps"][row] == step[4]["final_info"]["steps"][i]
        rows = [gym.vector.utils.iterate(oracle.action_space, actions[t]) for t in taken[ids]]
        chosen = [list(row)[i] for row, i in zip(rows, ids, strict=True)]
        empty = gym.vector.utils.create_empty_array(oracle.single_action_space, 4)
        batch = gym.vector.utils.concatenate(oracle.single_action_space, chosen, empty)
        vector.send(batch, ids)
    oracle.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "between 1 and num_envs"),
        ({"batch_size": 7}, "between 1 and num_envs"),
        ({"batch_size": 2, "num_workers": 2}, "3 environments per worker"),
        ({"num_workers": 0}, "at least one worker"),
        ({"infos": "some"}, "final"),
        ({"step_timeout": 0}, "above 0"),
        ({"autoreset_mode": "Disabled"}, "SAME_STEP or NEXT_STEP"),
        ({"autoreset_mode": "NextStep", "episode_seeds": True}, "episode_seeds"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(UserError, match=message):
        make(envs.CountingEnv, 6, **options)


def test_no_environments_are_refused(make):
    with pytest.raises(UserError, match="num_envs is 0"):
        make(envs.CountingEnv, 0)


def test_calls_in_the_wrong_order_are_refused(make):
    vector = make(envs.CountingEnv, 2)
    with pytest.raises(WorkerError, match="reset"):
        vector.step([0, 0])
    vector.reset()
    with pytest.raises(UserError, match="send"):
        vector.recv()
    vector.send([0, 0])
    with pytest.raises(UserError, match="recv"):
        vector.send([0, 0])
    vector.recv()
    vector.close()
    vector.close()
    with pytest.raises(UserError, match="closed"):
        vector.step([0, 0])


def test_a_whole_batch_may_be_sent_in_parts(make):
    vector = make(envs.CountingEnv, 5, num_workers=2)  # 2 and 3 environments
    vector.reset()
    vector.send([1, 0, 1], env_ids=[2, 3, 4])
    vector.send([0, 1], env_ids=[0, 1])
    observations, rewards, *_, infos = vector.recv()
    np.testing.assert_array_equal(observations, [[1, 1]] * 5)
    np.testing.assert_array_equal(rewards, [0, 1, 1, 0, 1])
    assert "env_id" not in infos


def test_reset_gives_up_a_step_under_way(make):
    vector = make(envs.CountingEnv, 2)
    vector.reset()
    vector.send([0, 0])
    observations, _ = vector.reset()
    np.testing.assert_array_equal(observations, [[2, 0], [2, 0]])
    observations, *_ = vector.step([0, 0])
    np.testing.assert_array_equal(observations, [[2, 1], [2, 1]])


@pytest.mark.parametrize("ids", [[0], [0, 2], [1, 0], [0, 1, 0, 1], [7, 8]])
def test_env_ids_name_whole_workers(make, ids):
    vector = make(envs.CountingEnv, 4, num_workers=2, batch_size=2)
    vector.reset()
    with pytest.raises(UserError, match="whole workers"):
        vector.send([0] * len(ids), env_ids=ids)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(3, int), r"shape \(3,\) given, \(2,\) expected"),
        (np.zeros((2, 1), int), r"shape \(2, 1\) given, \(2,\) expected"),
        (np.array([0.5, 0.0]), "0.5.*does not fit"),
        (["left", "right"], "does not convert"),
    ],
)
def test_actions_that_do_not_fit_are_refused(make, actions, message):
    vector = make(envs.CountingEnv, 2)
    vector.reset()
    with pytest.raises(UserError, match=message):
        vector.step(actions)
    vector.step(np.zeros(2, np.uint8))  # another dtype, but values that fit; nothing was lost


def test_nested_actions_name_the_key(make):
    vector = make(nested, 2)
    vector.reset()
    action = vector.action_space.sample()
    with pytest.raises(UserError, match="'inner/0': shape"):
        vector.step({**action, "inner": (np.zeros(3, int), action["inner"][1])})
    del action["joints"]
    with pytest.raises(UserError, match="joints"):
        vector.step(action)


# ---- what environments return


@pytest.mark.filterwarnings("ignore:observation")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3, np.float32), r"shape \(3,\) given, \(2,\) expected"),
        (np.float32(1.0), r"shape \(\) given, \(2,\) expected"),
        ([1e300, 0.0], "1e.300.*does not fit into float32"),
        (None, "observation"),
        ("text", "observation"),
    ],
)
def test_observations_that_do_not_fit_are_errors(make, value, message):
    vector = make(functools.partial(envs.ObservingEnv, value), 2, num_workers=1)
    vector.reset()
    vector.step([0, 0])
    with pytest.raises(WorkerError, match=message) as caught:
        vector.step([0, 0])
    assert caught.value.env_index == 0
    with pytest.raises(WorkerError, match="reset"):
        vector.step([0, 0])
    vector.reset()
    vector.step([0, 0])


def test_a_wrong_leaf_is_named(make):
    space = spaces.Dict({"a": spaces.Box(0, 1, (2,)), "b": spaces.Tuple((spaces.Discrete(3),))})
    value = {"a": np.zeros(2, np.float32), "b": (np.zeros(4, int),)}
    vector = make(functools.partial(envs.ObservingEnv, value, space), 2)
    vector.reset()
    vector.step([0, 0])
    with pytest.raises(WorkerError, match=r"'b/0': shape \(4,\) given, \(\) expected"):
        vector.step([0, 0])


@pytest.mark.filterwarnings("ignore:observation")
@pytest.mark.parametrize("value", [[0.25, 0.5], np.array([0.25, 0.5]), (0, 1)])
def test_observations_of_another_dtype_are_converted(make, value):
    vector = make(functools.partial(envs.ObservingEnv, value), 2)
    vector.reset()
    vector.step([0, 0])
    observations, *_ = vector.step([0, 0])
    assert observations.dtype == np.float32
    np.testing.assert_array_equal(observations, [value, value])


def test_each_conversion_is_announced_once_wherever_it_is_made(backend):
    values = [np.zeros(2, np.float32), np.zeros(2), np.zeros(2), np.zeros(2, np.int16)]
    factories = [functools.partial(envs.ObservingEnv, value) for value in values]
    with warnings.catch_warnings(record=True, action="always") as caught:
        vector = backend(factories, num_workers=3)
        vector.reset()
        for _ in range(4):
            vector.step([0] * 4)
        vector.close()
    assert [str(one.message) for one in caught] == [
        "observation: float64 given where the space says float32; it is converted",
        "observation: int16 given where the space says float32; it is converted",
    ]


def test_a_conversion_that_is_made_an_error_costs_no_step(make):
    vector = make(functools.partial(envs.ObservingEnv, np.zeros(2)), 2)
    with warnings.catch_warnings(action="error"):
        vector.reset()
        for _ in range(2):
            vector.step([0, 0])
        with pytest.raises(UserWarning, match="it is converted"):
            vector.step([0, 0])
        vector.step([0, 0])
    assert vector.get_attr("steps") == (3, 3)


@pytest.mark.parametrize(
    "space",
    [spaces.Text(5), spaces.Dict({"t": spaces.Sequence(spaces.Discrete(2))})],
    ids=["Text", "Sequence"],
)
def test_spaces_without_arrays_are_refused(make, space):
    with pytest.raises(UserError, match="no array of fixed size"):
        make(functools.partial(envs.SampleEnv, space, spaces.Discrete(2)), 2)


def test_environments_must_be_alike(backend):
    other = functools.partial(envs.SampleEnv, spaces.Discrete(3), spaces.Discrete(2))
    with pytest.raises(UserError, match="same"):
        backend([envs.CountingEnv, envs.CountingEnv, other], num_workers=3)
    with pytest.raises(UserError, match="same"):
        backend([envs.CountingEnv, envs.CountingEnv, other], num_workers=1)


def test_bounds_that_are_nan_are_told_in_one_sentence(make):
    class Env(envs.CountingEnv):
        def __init__(self):
            super().__init__()
            self.action_space = spaces.Box(-1, 1, (2,))
            self.action_space.low[1] = np.nan  # a new Box would refuse it

    # Of several workers it is the one that is first.
    message = (
        "environment [01]: action_space has low nan and high 1.0 at position 1; low must be at"
    )
    with pytest.raises(UserError, match=message) as caught:
        make(Env, 2, num_workers=2)
    assert "need the same" not in str(caught.value)


def test_one_environment_cannot_serve_twice(make):
    env = envs.CountingEnv()
    with pytest.raises(UserError, match="must make a new one"):
        make(lambda: env, 2, num_workers=1)


# ---- reaching into the environments


def test_attributes_and_methods_can_be_reached(make):
    vector = make(functools.partial(envs.CountingEnv, render_mode="rgb_array"), 3, num_workers=2)
    vector.reset()
    vector.set_attr("weight", 2.0)
    assert vector.get_attr("weight") == (2.0, 2.0, 2.0)
    vector.set_attr("weight", [1.0, 2.0, 3.0])
    _, rewards, *_ = vector.step([1, 1, 1])
    np.testing.assert_array_equal(rewards, [1.0, 2.0, 3.0])
    frames = vector.render()
    assert len(frames) == 3
    np.testing.assert_array_equal(frames[2], np.ones((2, 2, 3)))
    with pytest.raises(WorkerError, match="no_such_thing"):
        vector.get_attr("no_such_thing")
    vector.step([1, 1, 1])  # a failed look-up broke no episode


# ---- exact resume


def test_a_restored_state_goes_on_as_the_original(make):
    options = {"num_workers": 2, "episode_seeds": True}
    vector = make(nested, 4, seed=2, **options)
    actions = actions_for(vector, 50)
    rollout(vector, actions[:23])
    states = json.loads(json.dumps(vector.state()))
    other = make(nested, 4, **options)
    observations, _ = other.restore(states)
    assert len({state["episode"] for state in states}) > 1
    assert max(len(state["actions"]) for state in states) > 1
    oracle = make(nested, 4, seed=2, **options)
    assert_same(observations, rollout(oracle, actions[:23])[-1][0])
    for action in actions[23:]:
        expected = vector.step(action)
        assert_same(other.step(action), expected)
    assert_same(other.state(), vector.state())


def test_states_travel_between_backends(make):
    vector = make(cart_pole, 2, seed=2, episode_seeds=True)
    rollout(vector, [np.array([0, 1])] * 12)
    with_serial = SerialVectorEnv([cart_pole] * 2, episode_seeds=True)
    with_serial.restore(vector.state())
    for _ in range(30):
        action = np.array([1, 0])
        assert_same(with_serial.step(action), vector.step(action))
    with_serial.close()


def test_restoring_delivers_the_action_mask(make):
    vector = make(envs.MaskedEnv, 2, seed=1, episode_seeds=True)
    vector.reset()
    *_, infos = vector.step([0, 0])
    other = make(envs.MaskedEnv, 2, episode_seeds=True)
    _, restored = other.restore(vector.state())
    np.testing.assert_array_equal(restored["action_mask"], infos["action_mask"])


def test_every_episode_has_a_seed_of_its_own(make):
    vector = make(functools.partial(envs.CountingEnv, 1), 2, seed=1, episode_seeds=True)
    vector.reset()
    seeds = [vector.get_attr("seed_used")]
    for _ in range(3):
        vector.step([0, 0])
        seeds.append(vector.get_attr("seed_used"))
    assert len(set(np.ravel(seeds))) == 8
    vector.reset(seed=1)
    assert vector.get_attr("seed_used") == seeds[0]


def test_state_needs_episode_seeds(make):
    vector = make(envs.CountingEnv, 2)
    vector.reset()
    with pytest.raises(UserError, match="episode_seeds=True"):
        vector.state()
    with pytest.raises(UserError, match="episode_seeds=True"):
        vector.restore([])
