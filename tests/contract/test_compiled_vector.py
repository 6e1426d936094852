"""Compiled environments stepped from the host keep the contract of every vector environment."""

from __future__ import annotations

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_same, rollout
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers

from starling.envs.compiled import BatchedEnv
from starling.envs.compiled_make import make_compiled
from starling.envs.compiled_vector import CompiledVectorEnv
from starling.envs.make import make_env, make_vec
from starling.envs.stepping_rate import rate_of
from starling.errors import UserError

pytestmark = pytest.mark.timeout(120)


class Counting:
    """Counts up by the actions 1 and 2, from a first value that is drawn, to an end at 9.

    Action k is forbidden where the count is k more than a multiple of 3.
    """

    observation_space = spaces.Dict(
        {"count": spaces.Box(0, 20, (), np.int16), "start": spaces.Box(0, 1, (1,), np.float64)}
    )
    action_space = spaces.Discrete(3)

    def __init__(self, end: int = 9):
        self.end = end

    def reset(self, key):
        state = {"count": 0, "start": jax.random.uniform(key, (1,)), "steps": 0}
        return state, self.observe(state)

    def step(self, state, action):
        count, steps = state["count"] + action, state["steps"] + 1
        state = {**state, "count": count, "steps": steps}
        return state, self.observe(state), 0.5 * action, count >= self.end, steps >= 6

    def observe(self, state):
        return {"count": state["count"], "start": state["start"]}

    def action_mask(self, state):
        return jnp.arange(3) != state["count"] % 3


@pytest.fixture(scope="module")
def shared():
    """One for the tests that need no option of their own: each compiles its programs anew."""
    vector = make_vec(Counting(), 4, "compiled", seed=5)
    yield vector
    vector.close()


def ones(vector):
    return np.ones(vector.num_envs, int)


def test_has_the_attributes_of_a_vector_environment():
    vector, theirs = make_vec("CartPole-v1", 3, "compiled"), gym.make("CartPole-v1")
    assert isinstance(vector, gym.vector.VectorEnv)
    assert (vector.backend, vector.num_envs, vector.batch_size) == ("compiled", 3, 3)
    assert (vector.num_workers, vector.restorable) == (1, False)
    assert vector.single_observation_space == theirs.observation_space
    assert vector.single_action_space == theirs.action_space
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert vector.spec == gym.spec("CartPole-v1")
    assert vector.compiled.num_envs == 3
    observations, _ = vector.reset(seed=0)
    assert vector.observation_space.contains(observations)
    observations, *arrays, _ = vector.step(vector.action_space.sample())
    assert vector.observation_space.contains(observations)
    assert [array.dtype for array in arrays] == [np.float64, np.bool_, np.bool_]
    vector.close()


def test_an_end_delivers_both_observations(shared):
    shared.reset()
    for _ in range(5):
        *_, infos = shared.step(ones(shared))
        assert "final_obs" not in infos
    actions = np.array([1, 2, 1, 0])  # to 6, 7, 6 and 5 in the sixth and last step
    observations, rewards, terminations, truncations, infos = shared.step(actions)
    np.testing.assert_array_equal(observations["count"], 0)
    assert observations["count"].dtype == np.int16
    assert observations["start"].dtype == np.float64
    np.testing.assert_array_equal(rewards, actions / 2)
    assert (not terminations.any(), truncations.all()) == (True, True)
    assert [final["count"] for final in infos["final_obs"]] == [6, 7, 6, 5]
    assert shared.single_observation_space.contains(infos["final_obs"][0])
    np.testing.assert_array_equal(infos["_final_obs"], True)
    np.testing.assert_array_equal(infos["_final_info"], True)
    starts = [final["start"][0] for final in infos["final_obs"]]
    assert len({*starts, *observations["start"][:, 0]}) == 8, "each episode is drawn anew"
    for _ in range(4):
        result = shared.step(np.array([2, 1, 1, 1]))
    *_, terminations, _, infos = shared.step(np.array([1, 1, 1, 1]))
    np.testing.assert_array_equal(terminations, [True, False, False, False])
    assert infos["final_obs"][0]["count"] == 9
    assert infos["final_obs"][1] is None
    assert result[-1]["_action_mask"].all()


def test_action_masks_belong_to_the_observations(shared):
    observations, infos = shared.reset()
    for _ in range(8):
        expected = np.arange(3) != observations["count"][:, None] % 3
        np.testing.assert_array_equal(infos["action_mask"], expected)
        assert infos["action_mask"].dtype == np.bool_
        observations, *_, infos = shared.step(ones(shared))


def test_seeds(shared):
    first = shared.reset(seed=5)[0]["start"]
    assert len(np.unique(first)) == 4
    np.testing.assert_array_equal(shared.reset(seed=5)[0]["start"], first)
    again = shared.reset()[0]["start"]
    assert not np.isin(again, first).any(), "the random streams go on"
    assert not np.isin(shared.reset(seed=6)[0]["start"], first).any()
    several = shared.reset(seed=[1, 2, 1, None])[0]["start"]
    assert several[0] == several[2] != several[1]
    assert shared.reset(seed=[1, 2, 1, None])[0]["start"][3] != several[3]
    for seed, message in (([1, 2], "2 seeds given for 4"), (-1, "not from 0"), (2**32, "from 0")):
        with pytest.raises(UserError, match=message):
            shared.reset(seed=seed)


def test_the_seed_given_at_the_start_serves_the_first_reset_only():
    vector = make_vec(Counting(), 2, "compiled", seed=5)
    first, second = vector.reset()[0], vector.reset()[0]
    np.testing.assert_array_equal(vector.reset(seed=5)[0]["start"], first["start"])
    assert not np.array_equal(first["start"], second["start"])


def test_reset_mask_resets_some_and_leaves_the_others(shared):
    shared.reset(seed=0)
    shared.step(ones(shared))
    mask = np.array([False, False, True, False])
    observations, infos = shared.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(observations["count"], [1, 1, 0, 1])
    np.testing.assert_array_equal(infos["action_mask"][2], [False, True, True])
    np.testing.assert_array_equal(shared.step(ones(shared))[0]["count"], [2, 2, 1, 2])
    seeded, _ = shared.reset(seed=[7] * 4, options={"reset_mask": mask})
    np.testing.assert_array_equal(seeded["count"], [2, 2, 0, 2])
    np.testing.assert_array_equal(seeded["start"][2], shared.reset(seed=[7] * 4)[0]["start"][2])
    with pytest.raises(UserError, match="reset_mask"):
        shared.reset(options={"reset_mask": np.array([True])})
    with pytest.raises(UserError, match="no reset options; \\['level'\\] given"):
        shared.reset(options={"level": 3})


def test_rollouts_are_those_of_a_program():
    """With the same seed, a program gets what the host gets."""
    actions = np.random.default_rng(0).integers(0, 3, (30, 4))
    vector = CompiledVectorEnv(BatchedEnv(Counting(), 4))
    (first, _), *steps = rollout(vector, list(actions), seed=9)
    env = make_compiled(Counting(), 4)

    @jax.jit
    def run(key):
        state, first = env.reset(key)
        return first, jax.lax.scan(env.step, state, actions)[1]

    _, started = vector.start(9)
    assert_same(
        jax.tree.map(np.asarray, started), jax.tree.map(np.asarray, env.reset(jax.random.key(9))[1])
    )
    program_first, program = run(jax.random.key(9))
    np.testing.assert_array_equal(program_first["start"], first["start"])
    for t, (observations, rewards, terminations, truncations, infos) in enumerate(steps):
        np.testing.assert_array_equal(program.observation["count"][t], observations["count"])
        np.testing.assert_array_equal(program.observation["start"][t], observations["start"])
        np.testing.assert_array_equal(program.reward[t], rewards)
        np.testing.assert_array_equal(program.terminated[t], terminations)
        np.testing.assert_array_equal(program.truncated[t], truncations)
        np.testing.assert_array_equal(program.action_mask[t], infos["action_mask"])
        for i in np.flatnonzero(terminations | truncations):
            assert infos["final_obs"][i]["count"] == program.final_observation["count"][t, i]


def test_actions_are_checked_and_not_kept(shared):
    shared.reset()
    actions = ones(shared)
    shared.send(actions)
    actions[:] = 2
    np.testing.assert_array_equal(shared.recv()[0]["count"], 1)
    with pytest.raises(UserError, match=r"actions: shape \(3,\) given, \(4,\) expected"):
        shared.step(np.ones(3, int))
    with pytest.raises(UserError, match="does not fit"):
        shared.step(np.full(4, 0.5))


def test_copies_can_be_written_to():
    for copy in (True, False):
        vector = make_vec(Counting(), 2, "compiled", seed=0, copy=copy)
        observations, _ = vector.reset()
        for _ in range(2):
            assert observations["count"].flags.writeable == copy
            observations, rewards, terminations, *_ = vector.step(ones(vector))
            assert rewards.flags.writeable
            assert terminations.flags.writeable


def test_misuse_is_an_error():
    vector = make_vec(Counting(), 2, "compiled")
    with pytest.raises(UserError, match=r"reset\(\) comes before"):
        vector.step(ones(vector))
    vector.reset()
    with pytest.raises(UserError, match="nothing to receive"):
        vector.recv()
    with pytest.raises(UserError, match="leave out env_ids"):
        vector.send([1], [0])
    vector.send(ones(vector), [0, 1])
    with pytest.raises(UserError, match="under way"):
        vector.send(ones(vector))
    with pytest.raises(UserError, match="no step under way"):
        vector.reset(options={"reset_mask": np.array([True, False])})
    vector.recv()
    with pytest.raises(UserError, match="cannot be restored"):
        vector.state()
    vector.close()
    vector.close()
    for call in (vector.reset, vector.recv, lambda: vector.step(ones(vector))):
        with pytest.raises(UserError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size 1 cannot be had"),
        ({"episode_seeds": True}, "neither episode_seeds"),
        ({"autoreset_mode": "NextStep"}, "nor autoreset mode NEXT_STEP"),
        ({"infos": "some"}, "infos is 'some'"),
        ({"env_kwargs": {"end": 1}}, "Counting is made already"),
        ({"env": Counting, "env_kwargs": {"last": 1}}, "takes no argument 'last': .*end"),
        ({"env": "CartPole-v1", "env_kwargs": {"render_mode": "rgb_array"}}, "'render_mode'"),
        (
            {"env": gym.make("CartPole-v1", sutton_barto_reward=True)},
            "no JAX version of it as it is",
        ),
        ({"env": gym.make("CartPole-v1", max_episode_steps=9)}, "no JAX version of it as it is"),
        ({"env": lambda: gym.make("CartPole-v1")}, "TimeLimit cannot be part of a compiled"),
        ({"env": "Taxi-v4"}, "Taxi-v4 cannot be part of a compiled program"),
        ({"env": "CartPole-v9"}, "CartPole-v1"),
        ({"env": BatchedEnv(Counting(), 3)}, "num_envs is 2, but the BatchedEnv has 3"),
    ],
)
def test_what_cannot_be_had_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_vec(**{"env": Counting(), "num_envs": 2, "backend": "compiled", **options})


def test_gymnasiums_wrappers_work():
    vector = make_vec("Pendulum-v1", 2, "compiled", env_kwargs={"max_episode_steps": 5})
    wrapped = wrappers.RecordEpisodeStatistics(wrappers.ClipReward(vector, -1.0, 0.0))
    actions = [np.zeros((2, 1), np.float32)] * 5
    *_, last = rollout(wrapped, actions, seed=0)
    np.testing.assert_array_equal(last[-1]["episode"]["l"], [5, 5])
    assert (last[1] >= -1).all()
    wrapped.close()


# ---- one of them, on every backend


@pytest.mark.filterwarnings("ignore:.*(Casting input|symmetric and normalized)")
def test_one_environment_is_gymnasiums():
    env = make_env(lambda end: Counting(end), {"end": 3})
    first, info = env.reset(seed=3)
    assert env.observation_space.contains(first)
    np.testing.assert_array_equal(info["action_mask"], [False, True, True])
    steps = [env.step(1) for _ in range(3)]
    assert [int(step[0]["count"]) for step in steps] == [1, 2, 3], "an end is not reset"
    assert [step[2] for step in steps] == [False, False, True]
    assert [step[1] for step in steps] == [0.5] * 3
    assert env.reset()[0]["start"] != first["start"]
    assert env.reset(seed=3)[0]["start"] == first["start"]
    check_env(make_env("starling.envs.jax_pendulum:Pendulum"), skip_render_check=True)


def test_other_backends_step_it_too():
    vector = make_vec(Counting(), 2, "serial", seed=1)
    oracle = make_vec(Counting(), 2, "thread", seed=1)
    actions = [np.array([1, 2])] * 12
    for ours, theirs in zip(rollout(vector, actions), rollout(oracle, actions), strict=True):
        assert_same(ours[0], theirs[0])
        assert_same(ours[1:-1], theirs[1:-1])
    vector.close()
    oracle.close()


# ---- the rate


def test_the_rate_is_that_of_a_program():
    rate = rate_of("CartPole-v1", 4, "compiled", seconds=0.01)
    assert (rate.backend, rate.num_workers, rate.problem) == ("compiled", 1, "")
    assert rate.steps_per_second > 0


def test_forbidden_actions_are_not_tried():
    class Strict(Counting):
        """Rewards forbidden actions with nan, and counts them."""

        def step(self, state, action):
            wrong = ~self.action_mask(state)[action]
            jax.debug.callback(lambda bad: tried.append(int(bad)), wrong.astype(int))
            return super().step(state, action)

    tried: list[int] = []
    assert rate_of(Strict(), 2, "compiled", seconds=0.001).steps_per_second > 0
    jax.effects_barrier()
    assert len(tried) >= 256
    assert sum(tried) == 0
