"""EnvPool keeps the contract, and its environments are the ones that Gymnasium has."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers

from starling.envs.seeding import child_seeds
from starling.errors import MissingExtraError, UserError

pytest.importorskip("envpool")

from test_envpool_agrees import pendulum_state

from starling.envs.envpool import EnvPoolVectorEnv
from starling.envs.envpool_single import EnvPoolEnv

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning"),
]

CLASSIC = [
    "CartPole-v1",
    "Pendulum-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
]


def sampled(envs, steps, seed=1):
    envs.action_space.seed(seed)
    return [envs.action_space.sample() for _ in range(steps)]


def rollout(envs, actions, **reset):
    results = [envs.reset(**reset)]
    results.extend(envs.step(action) for action in actions)
    return results


def assert_same_rollouts(first, second):
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a[:4] if len(a) == 5 else a[:1], b, strict=False):
            np.testing.assert_array_equal(x, y)


# ---- the same environments as Gymnasium's


@pytest.mark.parametrize("env_id", CLASSIC)
def test_spaces_and_limit_are_gymnasiums(env_id):
    envs = EnvPoolVectorEnv(env_id, 3)
    single = gym.make(env_id)
    assert envs.single_observation_space == single.observation_space
    assert envs.single_action_space == single.action_space
    assert envs.spec.max_episode_steps == single.spec.max_episode_steps


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5", "Hopper-v5", "Pusher-v5"])
def test_mujoco_takes_float32_actions_and_gives_float64_observations(env_id):
    envs = EnvPoolVectorEnv(env_id, 2, seed=0)
    assert envs.single_action_space.dtype == np.float32
    observations, _ = envs.reset()
    assert observations.dtype == envs.single_observation_space.dtype == np.float64
    first = envs.step(envs.action_space.sample())[0]
    assert not np.array_equal(first, observations)


@pytest.mark.parametrize(
    "env_id", [*CLASSIC, "LunarLander-v3", "BipedalWalker-v3", "FrozenLake-v1", "Walker2d-v5"]
)
def test_data_are_what_the_spaces_say(env_id):
    envs = EnvPoolVectorEnv(env_id, 3, seed=0)
    for result in rollout(envs, sampled(envs, 30)):
        assert envs.observation_space.contains(result[0])
        if len(result) == 5:
            assert [array.dtype for array in result[1:4]] == [np.float64, np.bool_, np.bool_]
            assert [array.shape for array in result[1:4]] == [(3,)] * 3


def test_a_pendulum_at_its_top_speed_differs():
    """If this fails, EnvPool's Pendulum has become Gymnasium's, and `auto` may choose it."""
    envs = EnvPoolVectorEnv("Pendulum-v1", 1, seed=0)
    oracle = gym.make("Pendulum-v1").unwrapped
    oracle.reset(seed=0)
    before, _ = envs.reset()
    differences = []
    for _ in range(150):
        push = np.where(before[:, 2:] >= 0, 2, -2).astype(np.float32)
        after = envs.step(push)[0]
        pendulum_state(oracle, before[0])
        differences.append(np.abs(oracle.step(push[0])[0] - after[0]).max())
        before = after
    assert max(differences) > 0.01


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "InvertedPendulum-v5"])
def test_mujocos_dynamics_are_gymnasiums(env_id):
    pytest.importorskip("mujoco")
    envs = EnvPoolVectorEnv(env_id, 1, seed=0)
    oracle = gym.make(env_id).unwrapped
    oracle.reset(seed=0)
    before, _ = envs.reset()
    hidden = oracle.model.nq + oracle.model.nv - before.shape[1]  # the position along the track
    for actions in sampled(envs, 40):
        positions = np.concatenate([np.zeros(hidden), before[0]])
        oracle.set_state(positions[: oracle.model.nq], positions[oracle.model.nq :])
        observation, reward, terminated, _, _ = oracle.step(actions[0])
        after, rewards, terminations, _, infos = envs.step(actions)
        own = infos["final_obs"][0] if terminations[0] else after[0]
        np.testing.assert_allclose(own, observation, atol=1e-6)
        assert rewards[0] == pytest.approx(reward, abs=1e-4)
        assert terminations[0] == terminated
        before = after


# ---- how episodes end


def ends(envs, policy, steps):
    """Lengths and kinds of the episodes that ended."""
    found = []
    lengths = np.zeros(envs.num_envs, int)
    observations, _ = envs.reset()
    for _ in range(steps):
        observations, _, terminations, truncations, _ = envs.step(policy(observations))
        lengths += 1
        for i in np.flatnonzero(terminations | truncations):
            found.append((int(lengths[i]), bool(terminations[i]), bool(truncations[i])))
            lengths[i] = 0
    return found


def still(envs):
    zero = np.zeros_like(envs.action_space.sample())
    return lambda _: zero


def idle(envs):
    return lambda _: np.ones(envs.num_envs, int)


def balance(_):
    def policy(observations):
        angles = observations @ np.array([0.05, 0.1, 3.0, 1.0])
        return (angles > 0).astype(int)

    return policy


@pytest.mark.parametrize(
    ("env_id", "policy", "limit"),
    [
        ("CartPole-v1", balance, 500),
        ("Pendulum-v1", still, 200),
        ("MountainCar-v0", idle, 200),
        ("MountainCarContinuous-v0", still, 999),
        ("Acrobot-v1", idle, 500),
        ("HalfCheetah-v5", still, 1000),
        ("CartpoleBalance-v1", still, 1000),
    ],
)
def test_cut_off_at_the_limit_and_not_terminated(env_id, policy, limit):
    envs = EnvPoolVectorEnv(env_id, 2, seed=0)
    assert ends(envs, policy(envs), 2 * limit) == [(limit, False, True)] * 4


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3", "Hopper-v5"])
def test_failures_terminate(env_id):
    envs = EnvPoolVectorEnv(env_id, 4, seed=0)
    found = ends(envs, lambda _: envs.action_space.sample(), 300)
    assert len(found) > 4
    assert all((terminated, cut) == (True, False) for _, terminated, cut in found)


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "Hopper-v5", "Pendulum-v1"])
def test_max_episode_steps_can_be_chosen(env_id):
    envs = EnvPoolVectorEnv(env_id, 2, seed=0, env_kwargs={"max_episode_steps": 3})
    assert envs.spec.max_episode_steps == 3
    assert ends(envs, still(envs), 9) == [(3, False, True)] * 6


def test_a_failure_in_the_very_last_step_is_a_termination():
    """EnvPool itself calls it a truncation, and its value would be bootstrapped."""
    push = np.ones(1, int)
    free = EnvPoolVectorEnv("CartPole-v1", 1, seed=3)
    (length, terminated, truncated), *_ = ends(free, lambda _: push, 20)
    assert (terminated, truncated) == (True, False)
    limited = EnvPoolVectorEnv("CartPole-v1", 1, seed=3, env_kwargs={"max_episode_steps": length})
    assert ends(limited, lambda _: push, length) == [(length, True, True)]


def test_the_first_observation_of_the_next_episode_comes_in_the_same_step():
    envs = EnvPoolVectorEnv("CartPole-v1", 3, seed=0)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    envs.reset()
    for _ in range(30):
        observations, rewards, terminations, _, infos = envs.step(np.array([1, 0, 1]))
        np.testing.assert_array_equal(rewards, 1.0), "a reset is no step"
        if terminations.any():
            np.testing.assert_array_equal(infos["_final_obs"], terminations)
            np.testing.assert_array_equal(infos["_final_info"], terminations)
            for i, final in enumerate(infos["final_obs"]):
                if terminations[i]:
                    assert abs(final[0]) > 2.4 or abs(final[2]) > 0.2, "not out of bounds"
                    assert np.all(np.abs(observations[i]) <= 0.05), "not a first observation"
                else:
                    assert final is None
        else:
            assert infos == {}


def test_nested_observations_and_their_final_ones():
    envs = EnvPoolVectorEnv("CartpoleBalance-v1", 2, seed=0, env_kwargs={"max_episode_steps": 4})
    assert isinstance(envs.single_observation_space, spaces.Dict)
    *_, (observations, _, _, truncations, infos) = rollout(envs, sampled(envs, 4))
    assert truncations.all()
    for i in range(2):
        final = infos["final_obs"][i]
        assert envs.single_observation_space.contains(final)
        assert not np.array_equal(final["position"], observations["position"][i])


def test_infos_of_every_step_only_where_asked_for():
    few = EnvPoolVectorEnv("HalfCheetah-v5", 2, seed=0, env_kwargs={"max_episode_steps": 2})
    many = EnvPoolVectorEnv(
        "HalfCheetah-v5", 2, seed=0, infos="all", env_kwargs={"max_episode_steps": 2}
    )
    actions = sampled(few, 2)
    first, last = rollout(few, actions)[1:]
    assert first[-1] == {}
    assert last[-1]["final_info"]["_x_position"].all()
    every = [result[-1] for result in rollout(many, actions)[1:]]
    assert every[0]["x_position"].shape == (2,)
    np.testing.assert_array_equal(
        last[-1]["final_info"]["x_position"], every[1]["final_info"]["x_position"]
    )


def test_action_masks_are_delivered():
    envs = EnvPoolVectorEnv("Play2048-v1", 3, seed=0)
    _, infos = envs.reset()
    assert infos["action_mask"].shape == (3, 4)
    infos = envs.step(infos["action_mask"].argmax(axis=1))[-1]
    assert infos["action_mask"].dtype == np.bool_
    assert infos["action_mask"].any(axis=1).all()


def test_gymnasiums_wrappers_work():
    envs = EnvPoolVectorEnv("Pendulum-v1", 2, seed=0, env_kwargs={"max_episode_steps": 5})
    wrapped = wrappers.RecordEpisodeStatistics(wrappers.ClipReward(envs, -1.0, 0.0))
    *_, last = rollout(wrapped, sampled(wrapped, 5))
    np.testing.assert_array_equal(last[-1]["episode"]["l"], [5, 5])
    assert (last[1] >= -1).all()
    wrapped.close()


# ---- seeds


def test_one_seed_one_rollout_whatever_the_number_of_threads():
    rollouts = []
    for workers in (1, 3, 1):
        envs = EnvPoolVectorEnv("LunarLander-v3", 6, seed=5, num_workers=workers)
        assert envs.num_workers == workers
        rollouts.append(rollout(envs, sampled(envs, 150)))
    assert_same_rollouts(rollouts[0], rollouts[1])
    assert_same_rollouts(rollouts[0], rollouts[2])


def test_environments_differ_and_child_seeds_are_used():
    envs = EnvPoolVectorEnv("CartPole-v1", 4, seed=5)
    observations, _ = envs.reset()
    assert len(np.unique(observations, axis=0)) == 4
    single = EnvPoolEnv("CartPole-v1")
    for seed, observation in zip(child_seeds(5, 4), observations, strict=True):
        np.testing.assert_array_equal(single.reset(seed=seed)[0], observation)


def test_resets_with_and_without_a_seed():
    envs = EnvPoolVectorEnv("CartPole-v1", 2, seed=5)
    first, second = envs.reset()[0], envs.reset()[0]
    assert not np.array_equal(first, second)
    again = envs.reset(seed=5)[0]
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(envs.reset(seed=child_seeds(5, 2))[0], first)
    assert not np.array_equal(envs.reset(seed=6)[0], first)
    half = envs.reset(seed=[child_seeds(5, 2)[0], None])[0]
    np.testing.assert_array_equal(half[0], first[0])


def test_without_any_seed_two_of_them_differ():
    one, two = (EnvPoolVectorEnv("CartPole-v1", 2).reset()[0] for _ in range(2))
    assert not np.array_equal(one, two)


def test_reset_mask_resets_some_and_leaves_the_others():
    envs = EnvPoolVectorEnv("CartPole-v1", 3, seed=0)
    envs.reset()
    before = envs.step(np.ones(3, int))[0].copy()
    mask = np.array([False, True, False])
    after, _ = envs.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert not np.array_equal(after[1], before[1])
    observations = envs.step(np.ones(3, int))[0]
    assert observations[0, 1] > 0.3 > observations[1, 1], "environment 0 was pushed twice"


# ---- asynchronous


def test_batches_smaller_than_the_pool():
    """Every environment's steps are its own, and a row that only resets is no experience."""
    envs = EnvPoolVectorEnv(
        "Pendulum-v1", 6, seed=0, batch_size=3, env_kwargs={"max_episode_steps": 4}
    )
    last, _ = envs.reset()
    assert last.shape == (6, 3)
    oracle = gym.make("Pendulum-v1").unwrapped
    oracle.reset(seed=0)
    steps, ended = np.zeros(6, int), np.zeros(6, bool)
    torque = np.linspace(-2, 2, 6, dtype=np.float32)[:, None]
    envs.send(torque)
    for _ in range(40):
        observations, rewards, terminations, truncations, infos = envs.recv()
        ids = infos["env_id"]
        assert len(set(ids.tolist())) == 3
        np.testing.assert_array_equal(infos["valid"], ~ended[ids])
        assert not terminations.any()
        steps[ids] = np.where(infos["valid"], steps[ids] + 1, 0)
        np.testing.assert_array_equal(truncations, steps[ids] == 4)
        for row, i in enumerate(ids):
            if infos["valid"][row]:
                pendulum_state(oracle, last[i])
                np.testing.assert_allclose(observations[row], oracle.step(torque[i])[0], atol=1e-4)
            else:
                assert rewards[row] == 0
            if truncations[row]:
                np.testing.assert_array_equal(infos["final_obs"][row], observations[row])
        last[ids], ended[ids] = observations, truncations
        envs.send(torque[ids], ids)
    assert envs.reset(seed=0)[0].shape == (6, 3), "a reset while steps are under way"
    envs.close()


def test_asynchronous_misuse_is_an_error_and_no_deadlock():
    envs = EnvPoolVectorEnv("CartPole-v1", 4, seed=0, batch_size=2)
    envs.reset()
    with pytest.raises(UserError, match="0 environments are under way"):
        envs.recv()
    envs.send(np.zeros(1, int), [3])
    with pytest.raises(UserError, match="1 environments are under way and batch_size is 2"):
        envs.recv()
    with pytest.raises(UserError, match=r"environments \[3\] are under way"):
        envs.send(np.zeros(2, int), [2, 3])
    for wrong in ([4], [-1], [1, 1]):
        with pytest.raises(UserError, match="different numbers from 0 to 3"):
            envs.send(np.zeros(len(wrong), int), wrong)
    observations, _ = envs.reset()
    assert len(observations) == 4


# ---- bad input


def test_out_of_turn_calls_are_errors_and_no_deadlocks():
    envs = EnvPoolVectorEnv("CartPole-v1", 2, seed=0)
    for call in (lambda: envs.send(np.zeros(2, int)), envs.recv):
        with pytest.raises(UserError, match=r"reset\(\) comes before|send\(\) actions first"):
            call()
    envs.reset()
    with pytest.raises(UserError, match=r"send\(\) actions first"):
        envs.recv()
    envs.send(np.zeros(2, int))
    with pytest.raises(UserError, match=r"recv\(\) its result before"):
        envs.send(np.zeros(2, int))
    envs.recv()
    envs.close()
    envs.close()
    for call in (envs.reset, envs.recv, lambda: envs.step(np.zeros(2, int))):
        with pytest.raises(UserError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("env_id", "actions", "message"),
    [
        ("CartPole-v1", np.zeros(3, int), r"shape \(3,\) given, \(2,\) expected"),
        ("CartPole-v1", np.zeros((2, 1), int), r"shape \(2, 1\) given"),
        ("CartPole-v1", np.array([0.5, 0.0]), "does not fit into int32"),
        ("CartPole-v1", np.array([0, 2]), "from 0 to 2"),
        ("CartPole-v1", np.array([0, -1]), "from -1 to 0"),
        ("CartPole-v1", np.array([0, 2**40]), "from 0 to 1099511627776"),
        ("Pendulum-v1", np.zeros(2, np.float32), r"shape \(2,\) given, \(2, 1\) expected"),
        ("Pendulum-v1", np.array([["a"], ["b"]]), "does not convert to float32"),
    ],
)
def test_actions_that_do_not_fit(env_id, actions, message):
    envs = EnvPoolVectorEnv(env_id, 2, seed=0)
    envs.reset()
    with pytest.raises(UserError, match=message):
        envs.step(actions)
    envs.step(envs.action_space.sample())  # nothing was sent


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float64])
def test_actions_of_another_dtype_are_cast(dtype):
    rollouts = []
    for kind in (np.int64, dtype):
        envs = EnvPoolVectorEnv("CartPole-v1", 2, seed=0)
        rollouts.append(rollout(envs, [np.array([0, 1], kind)] * 5))
    assert_same_rollouts(*rollouts)


def test_actions_may_come_from_a_strided_or_reused_array():
    plain, strided = (EnvPoolVectorEnv("Pendulum-v1", 4, seed=0) for _ in range(2))
    wide = np.linspace(-2, 2, 8, dtype=np.float64).reshape(4, 2)
    expected = rollout(plain, [wide[:, :1].astype(np.float32)] * 3)
    assert_same_rollouts(rollout(strided, [wide[:, :1]] * 3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_id": "LunarLander-v9"}, "LunarLander-v3"),
        ({"env_id": "Go9x9-v1"}, "several players"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"batch_size": 5}, "between 1 and num_envs"),
        ({"batch_size": 3}, "does not divide"),
        ({"infos": "some"}, "infos is 'some'"),
        ({"episode_seeds": True}, "episode_seeds"),
        ({"autoreset_mode": "NextStep"}, "NEXT_STEP"),
        ({"env_kwargs": {"max_episode_step": 3}}, "did you mean max_episode_steps"),
        ({"env_kwargs": {"max_episode_steps": 0}}, "must be at least 1"),
        ({"env_kwargs": {"seed": 3}}, "takes no argument 'seed'"),
        ({"env_kwargs": {"render_mode": "human"}}, "rgb_array"),
    ],
)
def test_what_cannot_be_made(options, message):
    with pytest.raises(UserError, match=message):
        EnvPoolVectorEnv(**{"env_id": "CartPole-v1", "num_envs": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"low": 0.1}}, "take no reset options"),
        ({"options": {"reset_mask": [True, False]}}, "NumPy array of bool"),
        ({"options": {"reset_mask": np.zeros(2, bool)}}, "0 true values"),
        ({"options": {"reset_mask": np.ones(2, bool)}, "seed": 1}, "cannot seed some"),
        ({"seed": [1, 2, 3]}, "3 seeds given for 2"),
        ({"seed": -1}, "negative"),
    ],
)
def test_resets_that_cannot_be_done(options, message):
    envs = EnvPoolVectorEnv("CartPole-v1", 2, seed=0)
    envs.reset()
    with pytest.raises(UserError, match=message):
        envs.reset(**options)


# ---- one environment, and pictures


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3", "FrozenLake-v1"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_environment_passes_gymnasiums_checker(env_id):
    env = EnvPoolEnv(env_id)
    check_env(env, skip_render_check=True)
    env.close()


def test_one_environment_stays_at_its_end_until_it_is_reset():
    env = EnvPoolEnv("CartPole-v1", render_mode="rgb_array")
    first, _ = env.reset(seed=0)
    terminated = False
    while not terminated:
        observation, reward, terminated, truncated, _ = env.step(1)
        assert (reward, truncated) == (1.0, False)
    assert abs(observation[2]) > 0.2
    assert env.render().shape == (400, 600, 3)
    np.testing.assert_array_equal(env.reset(seed=0)[0], first)
    env.close()


def test_pictures_of_all_environments():
    envs = EnvPoolVectorEnv("Pendulum-v1", 2, env_kwargs={"render_mode": "rgb_array"})
    with pytest.raises(UserError, match="reset"):
        envs.render()
    envs.reset(seed=0)
    frames = envs.render()
    assert [(frame.dtype, frame.ndim) for frame in frames] == [(np.uint8, 3)] * 2
    assert not np.array_equal(*frames)
    with pytest.raises(UserError, match="render_mode"):
        EnvPoolVectorEnv("Pendulum-v1", 2).render()


def test_drawing_mujoco_is_refused_since_it_can_end_the_process():
    with pytest.raises(MissingExtraError, match=r"starling-rl\[mujoco\]"):
        EnvPoolVectorEnv("HalfCheetah-v5", 1, env_kwargs={"render_mode": "rgb_array"})
