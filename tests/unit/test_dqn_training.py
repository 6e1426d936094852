"""Runs of DQN: what is learnt from and how often, what checkpoints bring back, what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import gymnasium as gym
import jax
import numpy as np
import pytest
from counters import metrics_of
from envs_for_tests import CountingEnv, MaskedEnv, SampleEnv
from gymnasium import spaces
from same_runs import assert_like_one_run

import starling
from starling import cli
from starling.algorithms.dqn import DQNAlgorithm
from starling.config import DQNConfig
from starling.errors import CheckpointError, UserError
from starling.ranges import declared_space
from starling.storage.checkpoint import load_checkpoint
from starling.training.async_dqn import AsyncDQN
from starling.training.dqn import DQN

N, T = 2, 8
BATCH = N * T
SMALL = {
    "num_envs": N,
    "num_steps": T,
    "mini_batch_size": 8,
    "hidden_sizes": (8,),
    "learning_starts": BATCH,
    "buffer_size": 10 * BATCH,
    "updates_per_transition": 0.25,
    "target_update_interval": 3,
    "epsilon_steps": 4 * BATCH,
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 6 * BATCH,
    "log_interval": 1,
    "save_interval": 3,
}
RAINBOW = {"n_step": 3, "prioritized": True, "dueling": True, "normalize_observations": True}


@pytest.fixture
def make(tmp_path, shared_programs, closed_at_the_end):
    """Makes agents that are closed in the end."""

    def make_agent(env: Any = "CartPole-v1", **settings: Any) -> DQN:
        if "resume" not in settings:
            settings = {**SMALL, "log_dir": str(tmp_path), **settings}
        else:
            env = None
        return closed_at_the_end(DQN(env, **settings))

    return make_agent


def resume(make: Any, agent: DQN, **settings: Any) -> DQN:
    agent.close()
    return make(resume=agent.run, **settings)


# --- the ratio, and when learning starts ----------------------------------------------------------


@pytest.mark.parametrize(("num_envs", "num_steps"), [(1, 5), (2, 8), (4, 3)])
@pytest.mark.parametrize("ratio", [0.3, 2.0])
def test_gradient_steps_are_in_proportion_to_transitions(
    make, num_envs, num_steps, ratio, monkeypatch
):
    monkeypatch.setattr(DQN, "algorithm_class", DQNAlgorithm)  # of its own, to count
    rows = num_envs * num_steps
    agent = make(
        num_envs=num_envs, num_steps=num_steps, updates_per_transition=ratio, learning_starts=20,
        timesteps=20 * rows,
    )  # fmt: skip
    agent.train(quiet=True)
    counted = sum(rows for i in range(1, 21) if i * rows >= 20)
    assert int(agent.state.updates) == int(ratio * counted)
    assert agent.replay.sampled == int(agent.state.updates) * 8
    assert agent.algorithm.update._cache_size() == 1, "it compiled again"


def test_nothing_is_learnt_before_learning_starts(make):
    agent = make(learning_starts=3 * BATCH)
    params = np.asarray(agent.state.params)
    seen = []

    def look(iteration: Any) -> None:
        seen.append((np.array_equal(agent.state.params, params), iteration.metrics))

    agent.train(callbacks=look, quiet=True)
    assert [unchanged for unchanged, _ in seen] == [True, True, False, False, False, False]
    assert ["train/loss" in metrics for _, metrics in seen] == [False] * 2 + [True] * 4


def test_learning_starts_though_a_full_replay_holds_fewer_transitions(make):
    """Rows that are no experience take places, here the resets of a vector environment."""
    envs = gym.vector.SyncVectorEnv([CountingEnv] * N)
    agent = make(envs, backend="auto", buffer_size=2 * BATCH, learning_starts=2 * BATCH)
    agent.train(quiet=True)
    assert len(agent.replay) < 2 * BATCH < agent.replay.inserted
    assert int(agent.state.updates) > 0


def test_epsilon_falls_by_transitions_whatever_num_envs_is(make):
    for num_envs in (1, 4):
        agent = make(
            num_envs=num_envs, num_steps=BATCH // num_envs, epsilon_start=0.8, epsilon_end=0.2
        )
        agent.train(quiet=True)
        logged = [line["rollout/epsilon"] for line in metrics_of(agent.run)]
        assert logged == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2, 0.2])


def test_actions_are_for_as_many_environments_as_have_an_epsilon(make):
    agent = make()
    for rows in (1, N + 1):
        with pytest.raises(UserError, match=rf"{rows} observations .* each of {N} environments"):
            agent.act(np.zeros((rows, 4), np.float32))
    assert agent.act(np.zeros((N, 4), np.float32)).env.shape == (N,)


def test_what_is_logged(make):
    agent = make()
    agent.train(quiet=True)
    last = metrics_of(agent.run)[-1]
    assert last["replay/size"] == 6 * BATCH
    assert last["replay/sample_insert_ratio"] == pytest.approx(8 * 24 / (6 * BATCH))
    for name in ("loss", "q_mean", "td_error", "grad_norm", "learning_rate"):
        assert np.isfinite(last[f"train/{name}"])


def test_priorities_are_the_td_errors(make):
    agent = make(prioritized=True, lr=1e-30)
    agent.train(quiet=True)
    given = []
    agent.replay.set_priorities = lambda *of: given.append(of)  # type: ignore[method-assign]
    sampled = []
    sample = agent.replay.sample
    agent.replay.sample = lambda *a: sampled.append(sample(*a)) or sampled[-1]  # type: ignore
    metrics = agent._learn_from_replay(3, progress=0.5)
    assert "train/loss" in metrics
    indices, priorities = given[0]
    batch = sampled[0]
    indices, priorities = indices.reshape(3, 8), priorities.reshape(3, 8)
    np.testing.assert_array_equal(indices, batch.indices)
    for k in range(3):
        rows = jax.tree.map(lambda x, k=k: x[k], batch._replace(indices=None))
        state = agent.state
        errors = agent.algorithm.loss(state.params, state.target_params, None, rows)[1][0]
        np.testing.assert_allclose(priorities[k], np.asarray(errors) + 1e-6, rtol=1e-4)


def test_beta_rises_to_one(make, monkeypatch):
    agent = make(prioritized=True, priority_beta=0.4)
    betas = []
    sample = agent.replay.sample

    def noted(size: int, count: int, beta: float) -> Any:
        betas.append(beta)
        return sample(size, count, beta)

    monkeypatch.setattr(agent.replay, "sample", noted)
    agent.train(quiet=True)
    assert betas == pytest.approx([0.4 + 0.6 * k / 6 for k in range(6)])


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, RAINBOW], ids=["plain", "rainbow"])
def test_n_and_resumed_n_are_2n(make, settings):
    whole = make(exact_resume=True, updates_per_transition=0.3, **settings)
    # progress counts to the end of the run, which is the same for both
    whole.train(quiet=True)
    half = make(exact_resume=True, updates_per_transition=0.3, **settings)
    stop = half.train(callbacks=lambda it: it.iteration < 3, quiet=True)
    assert stop.status == "callback"
    rest = resume(make, half)
    assert len(rest.replay) > 0
    rest.train(quiet=True)
    assert_like_one_run(rest, whole)


def test_stopped_within_a_rollout_and_resumed(make):
    whole = make(exact_resume=True)
    whole.train(quiet=True)
    half = make(exact_resume=True)
    answers = iter([False] * (3 * T + 5) + [True])
    assert half.train(stop=lambda: next(answers), quiet=True).status == "stopped"
    rest = resume(make, half)
    rest.train(quiet=True)
    assert_like_one_run(rest, whole)


def test_environments_that_seeds_do_not_bring_back_begin_other_episodes(make):
    agent = make(CountingEnv, exact_resume=True)  # it counts the episodes of its life
    agent.train(3 * BATCH, quiet=True)
    agent.close()
    exact = DQN(CountingEnv, resume=agent.run, timesteps=6 * BATCH)
    with pytest.raises(UserError, match="or resume with exact_resume False if seeds"):
        exact.train(quiet=True)
    exact.close()
    again = DQN(CountingEnv, resume=agent.run, timesteps=6 * BATCH, exact_resume=False)
    assert again.train(quiet=True).steps == 6 * BATCH
    again.close()


@pytest.mark.parametrize("settings", [{}, RAINBOW], ids=["plain", "rainbow"])
def test_without_exact_resume_the_replay_goes_on(make, settings):
    half = make(**settings)
    half.train(3 * BATCH, quiet=True)
    before, drawn = len(half.replay), half.replay.sample(16).returns
    rest = resume(make, half, timesteps=6 * BATCH)
    assert len(rest.replay) == before
    np.testing.assert_array_equal(rest.replay.sample(16).returns, drawn)
    assert rest.train(quiet=True).steps == 6 * BATCH
    assert len(rest.replay) > before


@pytest.mark.parametrize("saved", [False, True])
def test_a_replay_that_is_not_saved_or_not_wanted_is_filled_anew(make, saved):
    half = make(save_replay=saved)
    half.train(3 * BATCH, quiet=True)
    checkpoint = load_checkpoint(half.run)
    assert ("replay" in checkpoint.arrays) == saved
    assert ("replay" in checkpoint.not_included) != saved
    updates = int(half.state.updates)
    rest = resume(make, half, timesteps=6 * BATCH, save_replay=False)
    assert (len(rest.replay), int(rest.state.updates)) == (0, updates)
    rest.train(quiet=True)
    assert len(rest.replay) == rest.replay.inserted == 3 * BATCH
    assert int(rest.state.updates) > updates


def test_stopped_within_a_rollout_and_trained_on(make):
    agent = make()
    answers = iter([False] * (2 * T + 5) + [True])
    assert agent.train(stop=lambda: next(answers), quiet=True).status == "stopped"
    assert agent.train(quiet=True).steps == 6 * BATCH


def test_loaded_policies_predict_the_same(make):
    agent = make(normalize_observations=True)
    agent.train(quiet=True)
    observations = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = agent.predict(observations)
    for replay in agent.run.glob("checkpoints/*/replay.safetensors"):
        replay.write_bytes(b"of no use to who does not train")
    loaded = starling.load(agent.run)
    with pytest.raises(UserError, match=r"is a policy of DQN, not ParallelPPO: use starling\.load"):
        starling.ParallelPPO.load(agent.run)
    assert isinstance(loaded, DQN)
    np.testing.assert_array_equal(loaded.predict(observations), expected)
    np.testing.assert_array_equal(loaded.predict(observations[0]), expected[0])
    with loaded:
        assert loaded.evaluate(4).episodes == 4


def test_a_replay_of_other_settings_is_refused(make):
    agent = make()
    agent.train(3 * BATCH, quiet=True)
    agent.close()
    config = dataclasses.replace(agent.config, buffer_size=20 * BATCH)
    with pytest.raises(CheckpointError, match="replay does not fit: capacity 160 there and 320"):
        DQN(config=config, resume=agent.run)


def test_runs_go_on_with_other_values_of_what_searches_change(make):
    agent = make()
    agent.train(2 * BATCH, quiet=True)
    agent.close()
    domains = declared_space(DQNConfig).items()
    others = {name: domain.low for name, domain in domains if domain.in_run}
    assert others
    config = dataclasses.replace(agent.config, **others)
    assert len(make(config=config, resume=agent.run).replay) == 2 * BATCH


def test_who_is_refused_leaves_the_run_to_others(make):
    agent = make()
    agent.train(2 * BATCH, quiet=True)
    agent.close()
    with pytest.raises(UserError, match="algo dqn is trained by DQN, not AsyncDQN") as another:
        AsyncDQN(resume=agent.run)
    with pytest.raises(UserError, match="the run to resume was made with lr") as other_settings:
        DQN(resume=agent.run, lr=0.1)
    # Who keeps the errors keeps the agents.
    assert make(resume=agent.run).step == 2 * BATCH
    assert another.value is not other_settings.value


# --- environments ---------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["thread", "process", "compiled"])
def test_other_backends(no_leaks, make, backend):
    agent = make(backend=backend)
    assert agent.train(quiet=True).steps == 6 * BATCH


def test_compiled_environments_are_not_chosen(make):
    assert make(backend="auto").envs.backend == "serial"


def test_actions_that_are_masked(make):
    agent = make(MaskedEnv, **RAINBOW)
    agent.train(quiet=True)
    assert agent.replay.sample(4).next_action_masks is not None
    assert int(agent.state.updates) > 0


def test_nested_observations_and_several_actions(make):
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Tuple((spaces.Discrete(3),))})
    agent = make(lambda: SampleEnv(space, spaces.MultiDiscrete([2, 3])), **RAINBOW)
    agent.train(quiet=True)
    assert np.isfinite(np.asarray(agent.state.params)).all()
    assert int(agent.state.updates) > 0


class Pixels(gym.Env):
    """A stack of frames, which moves on by one frame in a step."""

    observation_space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.stack, self.steps = np.zeros((4, 36, 36), np.uint8), 0
        return self.stack.copy(), {}

    def step(self, action):
        frame = self.np_random.integers(0, 255, (1, 36, 36), np.uint8)
        self.stack, self.steps = np.concatenate([self.stack[1:], frame]), self.steps + 1
        return self.stack.copy(), 1.0, self.steps == 10, False, {}


def test_stacks_of_frames_take_a_fraction_of_the_memory(make):
    sizes = {}
    for stack, network in ((None, "mlp"), (4, "nature_cnn")):
        settings = {"frame_stack": stack, "network": network, "buffer_size": 64 * BATCH}
        agent = make(Pixels, **settings, timesteps=4 * BATCH)
        agent.train(quiet=True)
        sizes[stack] = agent.replay.nbytes
        assert agent.replay.sample(4).observations.shape == (1, 4, 4, 36, 36)
    assert sizes[4] < 0.4 * sizes[None]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buffer_size": 7}, "buffer_size 7 is below mini_batch_size 8: a replay must hold"),
        (
            {"n_step": 3, "mini_batch_size": 160},
            "mini_batch_size 160 is above the 156 tr.* draw",
        ),
        ({"learning_starts": 999}, "learning_starts 999 is above the 96 transitions that times"),
        ({"timesteps": 65, "learning_starts": 81}, "81 is above the 80 .* timesteps at least 81"),
        ({"timesteps": 33, "mini_batch_size": 49}, "mini_batch_size 49 is above the 48 .* that t"),
        ({"tau": 0.1}, "tau and target_update_interval are both given"),
        ({"target_update_interval": None}, "tau and target_update_interval are both missing"),
        ({"tau": 1.1, "target_update_interval": None}, r"tau must be in \[0, 1\], not 1.1"),
        ({"epsilon_end": -0.1}, "epsilon_end must be in"),
        ({"updates_per_transition": 0.0}, "updates_per_transition must be above 0"),
        ({"n_step": 0}, "n_step must be at least 1"),
        ({"loss": "l1"}, "unknown loss 'l1': there are huber, mse"),
        ({"n_step": 90}, "buffer_size 160 keeps 80 steps .* at least 196"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(UserError, match=message):
        DQNConfig(env="CartPole-v1", **{**SMALL, **settings})


def test_learning_may_start_with_the_last_rollout(make):
    agent = make(timesteps=5 * BATCH - 1, learning_starts=5 * BATCH, n_step=1)
    agent.train(quiet=True)
    assert int(agent.state.updates) == BATCH * SMALL["updates_per_transition"]
    with pytest.raises(UserError, match="learning_starts 80 is above the 64 transitions"):
        agent.train(4 * BATCH)


def test_continuous_actions_are_refused(make):
    with pytest.raises(UserError, match="use algo ppo, or wrap the environment"):
        make("Pendulum-v1")


def test_stacks_that_are_none_are_refused_before_there_is_a_run(make, tmp_path):
    with pytest.raises(UserError, match=r"frame_stack 4 needs images .* are \[4\]: leave"):
        make(frame_stack=4)
    assert list(tmp_path.iterdir()) == []


def test_a_replay_that_does_not_fit_into_memory_is_refused(make):
    with pytest.raises(
        UserError, match=r"a replay of 100,000,000,000,000 transitions .* GB are free"
    ):
        make(CountingEnv, buffer_size=10**14)


def test_seeds_at_once_are_refused(tmp_path):
    with pytest.raises(UserError, match="num_seeds goes with algo ppo and a2c, not with dqn"):
        starling.train_seeds("CartPole-v1", num_seeds=2, algo="dqn", log_dir=str(tmp_path))


# --- stop_iterations, the command line ------------------------------------------------------------


def test_a_run_stops_after_its_iterations(make):
    agent = make(stop_iterations=3)
    result = agent.train(quiet=True)
    assert (result.status, result.steps, agent.iteration) == ("stop_iterations", 3 * BATCH, 3)
    assert agent.train(quiet=True).status == "stop_iterations"
    rest = resume(make, agent, stop_iterations=5)
    assert rest.train(quiet=True).status == "stop_iterations"
    assert rest.iteration == 5


@pytest.mark.timeout(120)
def test_on_the_command_line(tmp_path, capsys):
    options = ["--algo", "dqn", "--env", "CartPole-v1", "--log_dir", str(tmp_path), "--quiet"]
    small = {name: SMALL[name] for name in ("mini_batch_size", "learning_starts", "buffer_size")}
    options += [str(x) for name, value in small.items() for x in (f"--{name}", value)]
    options += ["--hidden_sizes", "8", "--timesteps", "256", "--preset", "none", "--json"]
    assert cli.main(["train", *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["algo"], result["status"], result["steps"]) == ("dqn", "completed", 256)
    resumed = ["train", "--resume", result["run"], "--timesteps", "512", "--quiet", "--json"]
    assert cli.main(resumed) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 512
    assert cli.main(["evaluate", result["run"], "--episodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2
    curve = tmp_path / "curve.png"
    assert cli.main(["plot", result["run"], "--save_fig", str(curve)]) == 0
    assert curve.stat().st_size > 1000
