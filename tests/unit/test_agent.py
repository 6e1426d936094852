"""A policy acts, predicts, learns, and comes back from a checkpoint as it was."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gymnasium import spaces
from same_runs import same

from starling.algorithms.ppo import PPO
from starling.config import PPOConfig
from starling.errors import CheckpointError, UserError
from starling.storage.checkpoint import load_checkpoint, save_checkpoint
from starling.storage.rollout import Origin, Rollout, RolloutBuffer, map_tree
from starling.training.agent import Agent, checkpoint_spaces
from starling.training.device import find_devices

T, N = 4, 3
BOX = spaces.Box(-5, 5, (3,))
ARM = spaces.Box(-2, 2, (2,))
NESTED = spaces.Dict(
    {"z": spaces.Discrete(3, start=1), "a": spaces.Tuple((BOX, spaces.MultiBinary(2)))}
)
NESTED_ACTIONS = spaces.Tuple((spaces.Discrete(4, start=-1), spaces.Dict({"arm": ARM})))

pytestmark = pytest.mark.usefixtures("shared_programs")


def make_agent(observations: Any = BOX, actions: Any = ARM, **settings: Any) -> Agent:
    defaults = {
        "num_envs": N,
        "num_steps": T,
        "mini_batch_size": 6,
        "epochs": 2,
        "hidden_sizes": (4,),
        "normalize_observations": True,
        "normalize_rewards": True,
        "timesteps": 100,
    }
    return Agent(PPOConfig(env="none", **{**defaults, **settings}), observations, actions)


def batch(space: spaces.Space, seed: int) -> Any:
    space.seed(seed)
    samples = [space.sample() for _ in range(N)]
    return map_tree(lambda *leaves: np.stack(leaves), samples[0], *samples[1:])


def collect(agent: Agent, seed: int) -> Rollout:
    """A rollout of random observations and rewards."""
    rng = np.random.default_rng(seed)
    buffer = RolloutBuffer(T, N)
    observations = batch(agent.observation_space, seed)
    buffer.begin(observations)
    for t in range(T):
        action = agent.act(observations)
        observations = batch(agent.observation_space, 1000 * seed + t)
        ends = rng.random((2, N)) < 0.2
        final = np.empty(N, object)
        for n in range(N):
            final[n] = map_tree(lambda x, n=n: x[n], observations)
        buffer.add(action.raw, observations, rng.normal(size=N), *ends, {"final_obs": final})
    return buffer.finish(Origin(version=agent.version))


def save(agent: Agent, folder: Path) -> Path:
    return save_checkpoint(folder, 1, agent.arrays(), agent.documents(), {})


@functools.cache
def trained() -> Agent:
    """An agent after an update; tests may use it but not train it."""
    agent = make_agent()
    agent.update(collect(agent, 1))
    return agent


# --- acting ------------------------------------------------------------------------------------


def test_actions_are_drawn_anew_in_every_step():
    agent = make_agent()
    observations = batch(BOX, 0)
    steps = [agent.act(observations) for _ in range(3 * T)]
    raw = np.concatenate([step.raw for step in steps])
    assert raw.shape == (3 * T * N, 2)
    assert len(np.unique(raw)) == raw.size  # no noise is used twice, in no table of it
    env = np.concatenate([step.env for step in steps])
    np.testing.assert_allclose(env, np.clip(2 * raw, -2, 2), rtol=1e-6)


def test_actions_depend_on_the_seed_alone():
    observations = batch(BOX, 0)
    first, second, other = make_agent(seed=5), make_agent(seed=5), make_agent(seed=6)
    for _ in range(T + 1):
        action = first.act(observations)
        same(action, second.act(observations))
        assert not np.array_equal(action.raw, other.act(observations).raw)


def test_seeds_are_32_bits():
    assert make_agent(seed=2**32 - 1).act(batch(BOX, 0)).raw.shape == (N, 2)
    with pytest.raises(UserError, match="seed must be"):
        make_agent(seed=2**32)


def test_a_batch_of_another_size_can_be_acted_on():
    agent = make_agent()
    assert agent.act(np.zeros((N, 3), np.float32)).raw.shape == (N, 2)
    assert agent.act(np.zeros((7, 3), np.float32)).raw.shape == (7, 2)


def test_nested_spaces():
    agent = make_agent(NESTED, NESTED_ACTIONS)
    observations = batch(NESTED, 0)
    action = agent.act(observations)
    assert set(np.unique(action.env[0])) <= {-1, 0, 1, 2}
    assert action.env[1]["arm"].shape == (N, 2)
    many = agent.predict(observations)
    for n in range(N):
        one = agent.predict(map_tree(lambda x, n=n: x[n], observations))
        assert NESTED_ACTIONS.contains(one)
        assert one[0] == many[0][n]
        np.testing.assert_allclose(one[1]["arm"], many[1]["arm"][n], rtol=1e-5)


# --- predicting --------------------------------------------------------------------------------


def test_one_observation_or_a_batch():
    agent = trained()
    observations = batch(BOX, 0)
    many = agent.predict(observations)
    assert many.shape == (N, 2)
    for n in range(N):
        one = agent.predict(observations[n])
        assert ARM.contains(one)
        np.testing.assert_allclose(one, many[n], rtol=1e-6, atol=1e-7)


def test_deterministic_predictions_are_the_mode():
    agent = trained()
    observations = batch(BOX, 0)
    np.testing.assert_array_equal(agent.predict(observations), agent.predict(observations))
    draws = [agent.predict(observations, deterministic=False) for _ in range(50)]
    assert not np.array_equal(draws[0], draws[1])
    statistics = agent.state.observation_statistics
    assert statistics is not None
    normal = np.clip((observations - statistics.mean) / statistics.std, -10, 10)
    out = agent.algorithm.policy(agent.state.params, normal, None)
    expected = np.clip(2 * np.asarray(out.outputs), -2, 2)
    np.testing.assert_allclose(agent.predict(observations), expected, rtol=1e-5)


def test_predictions_leave_the_training_alone():
    agents = make_agent(), make_agent()
    observations = batch(BOX, 0)
    for _ in range(2):
        agents[0].predict(observations, deterministic=False)
    same(agents[0].act(observations), agents[1].act(observations))


def test_integer_and_shifted_actions_are_the_environments():
    for space in (spaces.Discrete(3, start=4), spaces.Box(0, 9, (2,), np.uint8)):
        agent = make_agent(BOX, space)
        for deterministic in (True, False):
            assert space.contains(agent.predict(batch(BOX, 0)[0], deterministic))


def test_large_integers_are_what_they_are():
    agent = make_agent(spaces.Box(-(2**62), 2**62, (3,), np.int64), normalize_observations=False)
    large = np.array([2**33, 5, -(2**40)])
    np.testing.assert_array_equal(agent.predict(large), agent.predict(large.astype(np.float32)))
    assert not np.array_equal(agent.predict(large), agent.predict(np.array([0, 5, 0])))


def test_masks_when_predicting():
    agent = make_agent(BOX, spaces.Discrete(3))
    mask = np.array([False, True, False])
    assert agent.predict(batch(BOX, 0)[0], False, mask) == 1
    np.testing.assert_array_equal(agent.predict(batch(BOX, 0), True, np.tile(mask, (N, 1))), 1)
    np.testing.assert_array_equal(agent.predict(batch(BOX, 0), True, [0, 1, 0]), 1)


def test_masks_that_do_not_fit_are_refused():
    agent, observations = make_agent(NESTED, spaces.MultiDiscrete([2, 3])), batch(NESTED, 0)
    one = map_tree(lambda x: x[0], observations)
    several = r"\(5,\) or \(3, 5\), with a value for each choice in MultiDiscrete"
    for use, mask, message in (
        (agent.predict, np.ones((N, 4)), rf"shape \(3, 4\) was given: give one of shape {several}"),
        (agent.predict, np.ones((N + 1, 5)), r"shape \(4, 5\) was given"),
        (agent.predict, [[1, 1], [1, 0, 1]], "mask that is no array was given"),
        (agent.act, np.ones((1, 5)), rf"shape \(1, 5\) .* {several}"),
    ):
        with pytest.raises(UserError, match=message):
            use(observations, action_mask=mask)
    with pytest.raises(UserError, match=r"shape \(1, 5\) .* one of shape \(5,\), with"):
        agent.predict(one, action_mask=np.ones((1, 5)))
    agent.predict(one, action_mask=np.ones(5))
    assert agent.act(observations, np.ones((N, 5))).raw.shape == (N, 2)


# --- learning and checkpoints ------------------------------------------------------------------


def test_a_rollout_of_another_version_is_refused():
    agent = make_agent()
    rollout = collect(agent, 1)
    agent.update(rollout)
    with pytest.raises(ValueError, match=r"version 0 .* version 1"):
        agent.update(rollout)


def test_the_rollout_may_be_written_again_once_update_returns():
    agents = make_agent(), make_agent()
    rollouts = [collect(agent, 1) for agent in agents]
    agents[0].update(rollouts[0])
    for array in (rollouts[0].observations, rollouts[0].actions, rollouts[0].rewards):
        array[...] = 7
    agents[1].update(rollouts[1])
    same(agents[0].state.params, agents[1].state.params)


def test_a_checkpoint_brings_everything_back(tmp_path):
    """To the bit: predictions, exploration, statistics, optimiser and order of the rows."""
    agent = make_agent()
    for seed in (1, 2):
        agent.update(collect(agent, seed))
    checkpoint = load_checkpoint(save(agent, tmp_path))
    assert {"parameters", "normalizer", "training"} <= checkpoint.arrays.keys()
    assert np.all(checkpoint.arrays["normalizer"]["seen"] == 2 * T * N)
    other = make_agent(seed=agent.config.seed)
    other.restore(checkpoint)
    assert other.version == agent.version == 2
    observations = batch(BOX, 9)
    same(other.predict(observations), agent.predict(observations))
    for seed in (3, 4):
        rollouts = [collect(a, seed) for a in (agent, other)]
        same(rollouts[0], rollouts[1])
        metrics = [a.update(r) for a, r in zip((agent, other), rollouts, strict=True)]
        same(*metrics)
        first, second = (a.state._replace(key=None) for a in (agent, other))
        same(first, second)
    # What was read from the file is not written into by donated programs.
    again = load_checkpoint(checkpoint.path)
    same(again.arrays, checkpoint.arrays)


def test_restoring_compiles_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Agent, "algorithm_class", PPO)  # of its own, to count
    agent = make_agent()
    path = save(agent, tmp_path)
    for seed in (1, 2):
        agent.update(collect(agent, seed))
    agent.restore(load_checkpoint(path))
    agent.update(collect(agent, 3))
    assert agent.algorithm._learn._cache_size() == 1
    assert agent.algorithm.act._cache_size() == 1


def test_saved_arrays_do_not_change_while_training_goes_on():
    agent = make_agent()
    agent.update(collect(agent, 1))
    arrays = agent.arrays()
    kept = {group: {k: v.copy() for k, v in named.items()} for group, named in arrays.items()}
    agent.update(collect(agent, 2))
    same(arrays, kept)
    moved = agent.arrays()["parameters"]["policy/kernel"]
    assert not np.array_equal(moved, kept["parameters"]["policy/kernel"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observations": spaces.Box(-1, 1, (4,))}, r"torso/Dense_0/kernel.*\[2, 3, 4\]"),
        ({"actions": spaces.Discrete(2)}, "log_std"),
        ({"hidden_sizes": (5,)}, "torso/Dense_0/kernel"),
        ({"hidden_sizes": (4, 4)}, "torso/Dense_1/kernel"),
        ({"shared_network": True}, "torso/Dense_0/kernel"),
        ({"num_envs": 6}, "reward_sums"),
        ({"optimizer": "rmsprop"}, "opt_state"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else None,
)
def test_a_checkpoint_of_another_policy_is_refused_by_name(tmp_path, changes, words):
    path = save(trained(), tmp_path)
    other = make_agent(**changes)
    before = other.arrays()
    with pytest.raises(CheckpointError, match=words):
        other.restore(load_checkpoint(path))
    same(other.arrays(), before)  # and nothing of it was taken
    assert other.version == 0


def test_a_checkpoint_without_statistics_is_refused(tmp_path):
    plain = make_agent(normalize_observations=False)
    path = save(plain, tmp_path)
    with pytest.raises(CheckpointError, match="mean"):
        make_agent().restore(load_checkpoint(path))


def test_a_checkpoint_says_its_spaces(tmp_path):
    agent = make_agent(NESTED, NESTED_ACTIONS)
    checkpoint = load_checkpoint(save(agent, tmp_path))
    assert checkpoint_spaces(checkpoint) == (NESTED, NESTED_ACTIONS)
    assert list(checkpoint_spaces(checkpoint)[0].spaces) == list(NESTED.spaces)
    del checkpoint.documents["spaces"]
    with pytest.raises(CheckpointError, match="does not say its policy's spaces"):
        checkpoint_spaces(checkpoint)


# --- devices -----------------------------------------------------------------------------------


def test_the_cpu_is_a_device():
    assert find_devices("cpu")[0].platform == "cpu"
    assert find_devices("auto") == jax.devices()[:1]


@pytest.mark.parametrize("name", ["tpu", "cpu:99", "rocm"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"there is no device {name} here: .* sees .*cpu"):
        find_devices(name)
