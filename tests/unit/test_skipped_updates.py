"""Updates whose result is not finite never happened; after several in a row the run stops."""

from __future__ import annotations

import itertools
import json
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counters import metrics_of
from gymnasium import spaces
from programs import shared
from safetensors.numpy import load_file

import starling
from starling.algorithms.acting import Acting
from starling.algorithms.ppo import PPO
from starling.algorithms.ppo_state import TrainState
from starling.algorithms.vtrace_ppo import VTracePPO
from starling.config import AsyncPPOConfig
from starling.errors import StarlingError, WorkerError
from starling.storage.checkpoint import load_checkpoint, save_checkpoint
from starling.storage.rollout import Rollout
from starling.training import trainer
from starling.training.async_ppo import AsyncPPO
from starling.training.compiled_collector import CompiledCollector
from starling.training.dqn import DQN
from starling.training.fused import Ends, Learnt
from starling.training.not_finite import check_rewards, first_not_finite
from starling.training.parallel_ppo import ParallelPPO
from starling.training.trainer import Iteration

pytestmark = pytest.mark.usefixtures("no_leaks")

N, T = 4, 6
BOX, CHOICE = spaces.Box(-np.inf, np.inf, (3,)), spaces.Discrete(3)
NORMALISED = {"normalize_observations": True, "normalize_rewards": True}


def on_host(state: TrainState) -> TrainState:
    """A copy that no program is given."""
    return jax.tree.map(np.array, state._replace(key=jax.random.key_data(state.key)))


def assert_same(state: TrainState, expected: TrainState, skipped: int, in_a_row: int) -> None:
    counters = {"skipped": skipped, "skipped_in_a_row": in_a_row}
    jax.tree.map(np.testing.assert_array_equal, state, expected._replace(**counters))


# --- one update --------------------------------------------------------------------------------

A2C = {"epochs": 1, "mini_batch_size": None, "clip_param": None, "optimizer": "rmsprop"}
ALGORITHMS: dict[str, tuple[type[PPO], dict[str, Any]]] = {
    "ppo": (PPO, {}),
    "ppo, normalised": (PPO, NORMALISED),
    "ppo, without clipping of gradients": (PPO, {"max_grad_norm": None, "target_kl": 1.0}),
    "a2c": (PPO, {**A2C, "normalize_advantage": False}),
    "v-trace": (VTracePPO, NORMALISED),
}
BAD = {
    "NaN reward": ("rewards", np.nan),
    "infinite reward": ("rewards", -np.inf),
    "NaN observation": ("observations", np.nan),
    "infinite observation": ("observations", np.inf),
}


def rollout(seed: int) -> Rollout:
    rng = np.random.default_rng(seed)
    truncated = np.zeros((T, N), bool)
    truncated[3, 0] = True
    return Rollout(
        observations=rng.normal(size=(T + 1, N, 3)).astype(np.float32),
        actions=rng.integers(0, 3, (T, N)),
        rewards=rng.normal(size=(T, N)).astype(np.float32),
        terminated=np.zeros((T, N), bool),
        truncated=truncated,
        final_observations=rng.normal(size=(1, 3)).astype(np.float32),
        final_index=np.array([3 * N], np.int32),
    )


def spoilt(of: Rollout, where: str, value: float) -> Rollout:
    array = getattr(of, where).copy()
    array[4, 2] = value  # of an episode that goes on
    return of._replace(**{where: array})


class Learner:
    """An algorithm, its state, and for V-trace the actor's part."""

    def __init__(self, name: str):
        kind, settings = ALGORITHMS[name]
        small = {"mini_batch_size": 8, "epochs": 2, "lr": 1e-2, "hidden_sizes": (4,)}
        options = AsyncPPOConfig(
            env="test", num_envs=N, num_steps=T, timesteps=N * T, **{**small, **settings}
        )
        self.ppo = shared(kind)(BOX, CHOICE, options, options, N)
        self.state = self.ppo.init(0)
        self.sums = np.zeros(N, np.float32)

    def learn(self, of: Rollout) -> dict[str, float]:
        if isinstance(self.ppo, VTracePPO):
            acting = Acting(self.state.params, self.state.observation_statistics)
            of, self.sums = self.ppo.describe(acting, of, self.sums)
        self.state, metrics = self.ppo.update(self.state, of)
        return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_that_is_not_finite_never_happened(name, bad):
    learner, other = Learner(name), Learner(name)
    learner.learn(rollout(0))
    before, sums = on_host(learner.state), learner.sums
    learner.learn(spoilt(rollout(1), *BAD[bad]))
    assert_same(on_host(learner.state), before, 1, 1)
    assert np.isfinite(learner.sums).all()  # else an actor's next rollouts would be skipped, too
    if "reward" in bad:
        np.testing.assert_array_equal(learner.sums[2], sums[2])
    # The next one is what it would have been without, to the bit: its random key is the same.
    learner.sums = sums
    metrics = learner.learn(rollout(2))
    assert np.isfinite(list(metrics.values())).all()
    other.learn(rollout(0))
    other.learn(rollout(2))
    assert_same(on_host(learner.state), on_host(other.state), 1, 0)
    assert (learner.state.params != before.params).any()


def test_skips_are_counted_in_a_row_and_in_all():
    learner = Learner("ppo")
    counts = []
    for value in (np.nan, np.inf, 0.0, np.nan):
        learner.learn(spoilt(rollout(0), "rewards", value))
        state = learner.state
        counts.append((int(state.updates), int(state.skipped), int(state.skipped_in_a_row)))
    assert counts == [(0, 1, 1), (0, 2, 2), (1, 2, 0), (1, 3, 1)]


# --- runs --------------------------------------------------------------------------------------


class Sick(gym.Env):
    """Gives NaN from one step on to another, as the reward or the observation; never ends."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = CHOICE

    def __init__(self, first: int, end: int = 10**9, observed: bool = False):
        self.first, self.end, self.observed = first, end, observed

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: int):
        sick = self.first <= self.count < self.end
        self.count += 1
        observation = np.array([self.count % 3, action, 1.0], np.float32)
        if sick and self.observed:
            observation[1] = np.nan
        return (
            observation,
            np.nan if sick and not self.observed else float(action),
            False,
            False,
            {},
        )


class SickJax:
    """The same, written in JAX."""

    observation_space, action_space = Sick.observation_space, CHOICE

    def __init__(self, first: int, end: int = 10**9, observed: bool = False):
        self.first, self.end, self.observed = first, end, observed

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(0), jnp.zeros(3)

    def step(self, state: jax.Array, action: jax.Array) -> tuple:
        sick = (self.first <= state) & (state < self.end)
        observation = jnp.stack([(state + 1) % 3, action, 1]).astype(jnp.float32)
        reward = jnp.where(sick & (not self.observed), jnp.nan, action)
        observation = jnp.where(sick & self.observed, jnp.nan, observation)
        return state + 1, observation, reward, False, False


BATCH = N * 16
SMALL: dict[str, Any] = {
    "num_envs": N,
    "num_steps": 16,
    "mini_batch_size": 32,
    "epochs": 2,
    "hidden_sizes": (8,),
    "preset": "none",
    "tensorboard": False,
    "timesteps": 20 * BATCH,
    "log_interval": 1,
    "save_interval": 0,
    "on_invalid_data": "off",
}
WAYS = ("host", "fused", "async", "async compiled")


@pytest.fixture
def make(tmp_path, shared_programs, closed_at_the_end):
    """Makes agents that are closed in the end."""

    def make_agent(way: str, sick: dict[str, Any] | None, **settings: Any) -> Any:
        compiled = way in ("fused", "async compiled")
        env = (SickJax if compiled else Sick)(**sick) if sick else None
        source = env if compiled or env is None else lambda: Sick(**sick)
        if "resume" not in settings:
            backend = "compiled" if compiled else "serial"
            settings = {**SMALL, "backend": backend, "log_dir": str(tmp_path), **settings}
            if way.startswith("async"):
                settings |= {"num_actors": 2, "serial": True}
        kind = AsyncPPO if way.startswith("async") else ParallelPPO
        return closed_at_the_end(kind(source, **settings))

    return make_agent


@pytest.mark.parametrize("observed", [False, True], ids=["reward", "observation"])
@pytest.mark.parametrize("way", WAYS)
def test_a_rollout_that_is_not_finite_costs_that_rollout(make, way, observed):
    """The second of four; its last step is fine, so that the third begins well."""
    agent = make(way, {"first": 20, "end": 30, "observed": observed}, **NORMALISED)
    states: list[TrainState] = []
    result = agent.train(
        4 * BATCH, quiet=True, callbacks=lambda it: states.append(on_host(agent.state))
    )
    assert (result.status, result.steps) == ("completed", 4 * BATCH)
    assert_same(states[1], states[0], 1, 1)
    for before, after in itertools.pairwise(states[1:]):
        assert (after.skipped, after.skipped_in_a_row) == (1, 0)
        assert after.updates == before.updates + 1
        assert (after.params != before.params).any()
    logged = [line.get("faults/skipped_updates") for line in metrics_of(agent.run)]
    assert logged == [None, 1, 1, 1]
    assert metrics_of(agent.run)[1]["train/value_loss"] is None
    assert metrics_of(agent.run)[3]["train/value_loss"] is not None
    json.loads((agent.run / "result.json").read_text(), parse_constant=pytest.fail)
    assert starling.load(agent.run).version == 4


def test_several_iterations_in_one_program_skip_the_same(make):
    sick = {"first": 20, "end": 40}
    agents = [make("fused", sick, log_interval=4, **NORMALISED) for _ in range(2)]
    agents[0].train(8 * BATCH, quiet=True)
    agents[1].train(8 * BATCH, quiet=True, callbacks=lambda it: None)
    one, other = (on_host(agent.state) for agent in agents)
    assert (one.skipped, other.skipped) == (2, 2)
    np.testing.assert_allclose(one.params, other.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stops_after_five_in_a_row(make, way):
    agent = make(way, {"first": 2 * 16 + 3})
    good: list[np.ndarray] = []

    def note(it: Iteration) -> None:
        if it.iteration == 2:
            good.append(np.array(it.agent.state.params))

    with pytest.raises(StarlingError, match="the last 5 updates were not finite") as caught:
        agent.train(quiet=True, callbacks=note)
    assert agent.iteration == 7
    file = agent.run / "debug" / "rollout.safetensors"
    assert f"the last rollout is in {file}, and its rewards are not finite" in str(caught.value)
    assert "first in step 0 of environment 0" in str(caught.value)
    kept = load_file(file)
    assert np.isnan(kept["rewards"]).all()
    assert ("observations" in kept) == (way != "fused")
    loaded = starling.load(agent.run)
    assert loaded.step == 7 * BATCH
    np.testing.assert_array_equal(loaded.state.params, good[0])
    assert metrics_of(agent.run)[-1]["faults/skipped_updates"] == 5


@pytest.mark.parametrize("way", ["host", "async"])
def test_it_is_noticed_between_two_reports(make, way):
    agent = make(way, {"first": 2 * 16}, log_interval=10)
    with pytest.raises(StarlingError, match=r"the last [56] updates"):
        agent.train(quiet=True)
    assert agent.iteration in (7, 8)  # an update that is under way is looked at later
    # Four in a row, and one that was learnt from since, are no reason to stop.
    passing = make(way, {"first": 16, "end": 5 * 16}, log_interval=100)
    assert passing.train(12 * BATCH, quiet=True).status == "completed"
    assert int(passing.state.skipped) == 4


def test_dqn_notices_it_between_two_reports(tmp_path, shared_programs):
    """What is not finite stays in the replay, and most minibatches have some of it."""
    replay = {"learning_starts": BATCH, "buffer_size": 40 * BATCH, "updates_per_transition": 0.05}
    settings = {name: value for name, value in SMALL.items() if name != "epochs"}
    settings |= {**replay, "backend": "serial", "log_interval": 100, "timesteps": 40 * BATCH}
    with DQN(lambda: Sick(2 * 16), **settings, log_dir=str(tmp_path)) as agent:
        with pytest.raises(StarlingError, match=r"the last [56] updates"):
            agent.train(quiet=True)
        assert 7 <= agent.iteration < 20


def test_it_is_noticed_at_a_report_if_gradients_do_not_tell(make, monkeypatch):
    monkeypatch.setattr(trainer, "looks_skipped", lambda metrics: False)
    agent = make("host", {"first": 2 * 16}, log_interval=10)
    with pytest.raises(StarlingError, match="the last 8 updates"):
        agent.train(quiet=True)
    assert agent.iteration == 10
    # Four in a row, and one that was learnt from since, are no reason to stop.
    passing = make("host", {"first": 16, "end": 5 * 16}, log_interval=4)
    assert passing.train(12 * BATCH, quiet=True).status == "completed"
    assert int(passing.state.skipped) == 4


def test_finite_data_are_not_blamed(make):
    agent = make("host", {"first": 10**9}, lr=1e38)
    with pytest.raises(StarlingError, match=r"its content is finite: lower lr \(now 1e\+38\)"):
        agent.train(quiet=True)
    assert np.isfinite(starling.load(agent.run).state.params).all()


def test_counts_go_on_after_a_resume(make):
    agent = make("host", {"first": 16, "end": 3 * 16})
    agent.train(4 * BATCH, quiet=True)
    agent.close()
    rest = ParallelPPO(lambda: Sick(first=16, end=3 * 16), resume=agent.run)
    with rest:
        assert (int(rest.state.skipped), rest.version) == (2, 4)
        rest.train(8 * BATCH, quiet=True)
    assert int(rest.state.skipped) == 4
    logged = [line.get("faults/skipped_updates", 0) for line in metrics_of(agent.run)]
    assert logged == [0, 1, 2, 2, 2, 3, 4, 4]


def test_checkpoints_from_before_the_counters_still_load(make, tmp_path):
    agent = make("host", {"first": 10**9}, **NORMALISED)
    agent.train(2 * BATCH, quiet=True)
    old = load_checkpoint(agent.run)
    training = {k: v for k, v in old.arrays["training"].items() if not k.startswith("skipped")}
    assert len(training) == len(old.arrays["training"]) - 2
    del old.counters["faults"]
    arrays = {**old.arrays, "training": training}
    path = save_checkpoint(tmp_path / "old", old.step, arrays, old.documents, old.counters)
    assert_same(on_host(starling.load(path).state), on_host(agent.state), 0, 0)
    save_checkpoint(agent.run / "checkpoints", old.step, arrays, old.documents, old.counters)
    agent.close()
    with ParallelPPO(lambda: Sick(10**9), resume=agent.run) as rest:
        assert rest.train(3 * BATCH, quiet=True).steps == 3 * BATCH


# --- where it is -------------------------------------------------------------------------------


def test_the_first_that_is_not_finite_is_found():
    fine = rollout(0)
    assert first_not_finite(fine) is None
    bad = spoilt(spoilt(fine, "rewards", np.nan), "observations", np.inf)
    assert first_not_finite(bad) == (
        "its observations are not finite, first in step 4 of environment 2"
    )
    nested = bad._replace(observations={"a": fine.observations, "b": (bad.observations,)})
    assert str(first_not_finite(nested)).startswith("its observations/b/0 are not finite")
    pixels = fine._replace(observations=np.zeros((T + 1, N, 2), np.uint8))
    assert first_not_finite(pixels) is None
    finals = np.full((2, 3), np.nan, np.float32)
    cut = fine._replace(final_observations=finals, final_index=np.array([T * N, 3 * N + 1]))
    assert str(first_not_finite(cut)).endswith("first in step 3 of environment 1")
    padding = fine._replace(final_observations=finals, final_index=np.array([T * N, T * N]))
    assert first_not_finite(padding) is None


def ends(bad: list[tuple[int, int]], valid: np.ndarray | None = None) -> Learnt:
    rewards, no = np.zeros((T, N), np.float32), np.zeros((T, N), bool)
    for place in bad:
        rewards[place] = np.inf
    return Learnt(Ends(rewards, no, no, valid), {})


def test_a_reward_is_told_by_environment_step_and_rollout():
    check_rewards(None, [ends([]), ends([])], 8)
    words = "environment 3 gave the reward inf in step 2 of rollout 8"
    with pytest.raises(WorkerError, match=words) as caught:
        check_rewards(None, [ends([]), ends([(5, 0), (2, 3)])], 8)
    assert caught.value.env_index == 3
    valid = np.ones((T, N), bool)
    valid[2, 3] = False
    check_rewards(None, [ends([(2, 3)], valid)], 8)  # of a row that is no experience


@pytest.mark.parametrize("way", ["fused", "one by one", "async compiled"])
def test_programs_are_not_trusted(make, monkeypatch, way):
    if way == "one by one":  # collecting and updating are two programs

        def collector(agent: ParallelPPO) -> CompiledCollector:
            return CompiledCollector(agent.envs, 16, agent.algorithm, agent.device)

        monkeypatch.setattr(ParallelPPO, "make_collector", collector)
    agent = make(
        way if way.startswith("async") else "fused", {"first": 16 + 5}, on_invalid_data="raise"
    )
    with pytest.raises(
        WorkerError, match="environment 0 gave the reward nan in step 5 of rollout 2"
    ):
        agent.train(quiet=True)
    loaded = starling.load(agent.run)
    assert loaded.step == 2 * BATCH
    assert np.isfinite(loaded.state.params).all()
