"""PPO against a second implementation (`ppo_oracle`), and against what it promises."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from ppo_oracle import Oracle

from starling.algorithms import minibatches
from starling.algorithms.acting import Acting
from starling.algorithms.minibatches import shuffled
from starling.algorithms.ppo import PPO
from starling.algorithms.ppo_parameters import PPOParameters
from starling.algorithms.ppo_state import TrainState
from starling.networks.network_parameters import NetworkParameters
from starling.storage.rollout import Origin, Rollout

T, N = 6, 4
BOX = spaces.Box(-np.inf, np.inf, (3,))
ACTIONS = {"choice": spaces.Discrete(3), "box": spaces.Box(-1, 1, (2,))}
NETWORK = NetworkParameters(hidden_sizes=(4,), log_std_init=-0.3)
PLAIN = PPOParameters(epochs=2, mini_batch_size=8, lr=0.03)


def make_rollout(kind: str, seed: int, masks: bool = False, valid: bool = False) -> Rollout:
    """Random steps, with ends of both sorts, one of them in the last step, one of both at once."""
    rng = np.random.default_rng(seed)
    terminated, truncated = np.zeros((T, N), bool), np.zeros((T, N), bool)
    terminated[[1, 4], [0, 3]] = True
    truncated[[2, T - 1, 4], [1, 2, 3]] = True
    index = np.flatnonzero(truncated & ~terminated).astype(np.int32)
    padding = 16 - len(index)
    finals = rng.normal(size=(16, 3)).astype(np.float32)
    finals[len(index) :] = 0
    if kind == "choice":
        actions: Any = rng.integers(0, 3, (T, N)).astype(np.int32)
    else:
        actions = rng.normal(size=(T, N, 2)).astype(np.float32)
    action_masks = None
    if masks:
        action_masks = rng.random((T, N, 3)) < 0.6
        np.put_along_axis(action_masks, actions[..., None], True, -1)
    experience = np.ones((T, N), bool)
    experience[1:] = ~(terminated | truncated)[:-1]  # as where a reset takes a step of its own
    return Rollout(
        observations=rng.normal(0.5, 2, (T + 1, N, 3)).astype(np.float32),
        actions=actions,
        rewards=rng.normal(0.3, 3, (T, N)).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        final_observations=finals,
        final_index=np.append(index, np.full(padding, T * N, np.int32)),
        valid=experience if valid else None,
        action_masks=action_masks,
    )


@functools.cache
def learner(kind: str, options: PPOParameters, network: NetworkParameters = NETWORK) -> PPO:
    return PPO(BOX, ACTIONS[kind], options, network, N)


def start(ppo: PPO) -> TrainState:
    """Weights of a policy that is not indifferent."""
    state = ppo.init(0)
    rng = np.random.default_rng(7)
    return state._replace(params=state.params + rng.normal(0, 0.4, ppo.policy.num_weights))


def orders(state: TrainState, options: PPOParameters) -> list[np.ndarray]:
    """The orders of rows that an update from this state goes through, one for each epoch."""
    _, key = jax.random.split(state.key)
    keys = jax.random.split(key, options.epochs)
    return [np.asarray(shuffled(key, T * N)) for key in keys]


# --- the whole update --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    options: PPOParameters
    masks: bool = False
    valid: bool = False
    progress: tuple[float, ...] = (0.0, 0.5)

    def rollouts(self) -> list[Rollout]:
        return [make_rollout(self.kind, 10 + i, self.masks, self.valid) for i in range(2)]


CASES = {
    "choice": Case("choice", PLAIN, masks=True),
    "box": Case(
        "box",
        dataclasses.replace(
            PLAIN,
            normalize_observations=True,
            normalize_rewards=True,
            lr_schedule="linear",
            clip_schedule="linear",
            value_clip=0.1,
        ),
    ),
    "valid": Case(
        "choice",
        dataclasses.replace(
            PLAIN,
            normalize_observations=True,
            normalize_rewards=True,
            mini_batch_size=12,
            max_grad_norm=None,
            target_kl=1e9,  # never reached
        ),
        valid=True,
    ),
    "a2c": Case(
        "choice",
        dataclasses.replace(
            PLAIN,
            epochs=1,
            mini_batch_size=None,
            clip_param=None,
            gae_lambda=1.0,
            normalize_advantage=False,
            optimizer="rmsprop",
            max_grad_norm=None,
            lr=0.05,
        ),
    ),
}
NAMES = [
    "train/policy_gradient_loss",
    "train/value_loss",
    "train/entropy_loss",
    "train/approx_kl",
    "train/clip_fraction",
    "train/grad_norm",
    "train/learning_rate",
    "train/explained_variance",
    "rollout/value_mean",
]
TOLERANCE = 2e-5  # float32 against float64 makes 2e-6


@functools.cache
def learnt(name: str) -> tuple[list[np.ndarray], list[dict[str, float]], TrainState]:
    """Parameters and metrics after each of two updates, and the last state."""
    case = CASES[name]
    ppo = learner(case.kind, case.options)
    state, params, metrics = start(ppo), [], []
    for rollout, progress in zip(case.rollouts(), case.progress, strict=True):
        state, numbers = ppo.update(state, rollout, progress)
        params.append(np.array(state.params))
        metrics.append({key: float(value) for key, value in numbers.items()})
    return params, metrics, jax.tree.map(jnp.copy, state)


def expected(name: str, mistake: str = "", **changes: Any):
    """What `learnt` gives, by the oracle; `changes` are made to the options that it is told."""
    case = CASES[name]
    ppo = learner(case.kind, case.options)
    state = start(ppo)
    oracle = Oracle(
        ppo.policy.named(state.params), dataclasses.replace(case.options, **changes), mistake
    )
    params, metrics, key = [], [], state.key
    for rollout, progress in zip(case.rollouts(), case.progress, strict=True):
        numbers = oracle.update(rollout, progress, orders(state._replace(key=key), case.options))
        key = jax.random.split(key)[0]
        params.append(ppo.policy.ravel(oracle.weights))
        metrics.append(numbers)
    return params, metrics, oracle


@pytest.mark.parametrize("name", CASES)
def test_update_equals_the_second_implementation(name):
    params, metrics, state = learnt(name)
    right_params, right_metrics, oracle = expected(name)
    for ours, right in zip(params, right_params, strict=True):
        assert np.abs(right - start_params(name)).max() > 1000 * TOLERANCE
        np.testing.assert_allclose(ours, right, atol=TOLERANCE)
    for ours, right in zip(metrics, right_metrics, strict=True):
        for metric in NAMES:
            assert ours[metric] == pytest.approx(right[metric], rel=2e-3, abs=2e-4), metric
    if CASES[name].options.normalize_observations:
        assert state.observation_statistics is not None
        assert state.reward_statistics is not None
        ours, right = state.observation_statistics, oracle.observations
        assert ours.seen == len(right.rows)
        np.testing.assert_allclose(ours.mean, right.mean, rtol=1e-4)
        np.testing.assert_allclose(ours.std, right.std, rtol=1e-4)
        np.testing.assert_allclose(state.reward_statistics.std, oracle.reward_sums.std, rtol=1e-4)
        np.testing.assert_allclose(state.reward_sums, oracle.running_sums, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["choice", "valid", "a2c"])
def test_an_update_in_blocks_is_the_same(name, monkeypatch):
    """Minibatches, steps and truncated episodes a few rows at a time, as large ones are handled."""
    monkeypatch.setattr(minibatches, "_CACHED", 0)
    monkeypatch.setattr(minibatches, "_FEWEST_ROWS", 3)
    case = CASES[name]
    ppo = PPO(BOX, ACTIONS[case.kind], case.options, NETWORK, N)
    state = start(ppo)
    for i, (rollout, progress) in enumerate(zip(case.rollouts(), case.progress, strict=True)):
        state, numbers = ppo.update(state, rollout, progress)
        np.testing.assert_allclose(state.params, learnt(name)[0][i], rtol=1e-4, atol=1e-6)
        for metric in NAMES[:-1]:
            value = pytest.approx(learnt(name)[1][i].get(metric, 0), rel=1e-3, abs=1e-5)
            assert float(numbers.get(metric, 0)) == value, metric


def start_params(name: str) -> np.ndarray:
    case = CASES[name]
    return np.array(start(learner(case.kind, case.options)).params)


MISTAKES: list[tuple[str, str, dict[str, Any]]] = [
    ("choice", "truncation terminates", {}),
    ("choice", "next episode's value", {}),
    ("choice", "advantages in another order", {}),
    ("choice", "same order in all epochs", {}),
    ("choice", "", {"normalize_advantage": False}),
    ("choice", "", {"clip_param": None}),
    ("choice", "", {"entropy_coef": 0.0}),
    ("choice", "", {"max_grad_norm": None}),
    ("choice", "", {"adam_eps": 1e-2}),
    ("choice", "", {"optimizer": "rmsprop"}),
    ("choice", "", {"gae_lambda": 1.0}),
    ("choice", "", {"gamma": 0.9}),
    ("box", "", {"normalize_observations": False}),
    ("box", "", {"normalize_rewards": False}),
    ("box", "", {"value_clip": None}),
    ("box", "", {"lr_schedule": "constant"}),
    ("box", "", {"clip_schedule": "constant"}),
    ("box", "statistics first", {}),
    ("box", "rewards by old statistics", {}),
    ("valid", "", {"normalize_rewards": False}),
    ("a2c", "", {"gae_lambda": 0.95}),
    ("a2c", "", {"optimizer": "adam"}),
]


@pytest.mark.parametrize(("name", "mistake", "changes"), MISTAKES, ids=str)
def test_the_comparison_tells_a_mistake(name, mistake, changes):
    """Else the agreement above would mean little."""
    params, _, _ = learnt(name)
    wrong, _, _ = expected(name, mistake, **changes)
    assert np.abs(params[-1] - wrong[-1]).max() > 50 * TOLERANCE


def test_a2c_follows_the_plain_policy_gradient():
    """Its ratio is 1, and the gradient of the ratio that of the log-probability."""
    params, _, _ = learnt("a2c")
    plain, _, _ = expected("a2c", "plain policy gradient")
    np.testing.assert_allclose(params[-1], plain[-1], atol=TOLERANCE)


def test_rows_that_are_no_experience_have_no_influence():
    case = CASES["valid"]
    ppo = learner(case.kind, case.options)
    rollout = case.rollouts()[0]
    assert rollout.valid is not None
    out = ~rollout.valid
    rng = np.random.default_rng(1)
    observations, actions = rollout.observations.copy(), rollout.actions.copy()
    rewards = rollout.rewards.copy()
    observations[:-1][out] = rng.normal(50, 10, (out.sum(), 3))
    actions[out] = (actions[out] + 1) % 3
    rewards[out] = 1e3
    other = rollout._replace(observations=observations, actions=actions, rewards=rewards)
    results = [ppo.update(start(ppo), r, 0.0) for r in (rollout, other)]
    (state, metrics), (other_state, other_metrics) = results
    np.testing.assert_array_equal(state.params, other_state.params)
    jax.tree.map(
        np.testing.assert_array_equal,
        (metrics, state._replace(key=None)),
        (other_metrics, other_state._replace(key=None)),
    )
    # Rows that are experience do have one.
    rewards = rollout.rewards.copy()
    rewards[rollout.valid] += 1
    changed, _ = ppo.update(start(ppo), rollout._replace(rewards=rewards), 0.0)
    assert np.abs(np.asarray(changed.params) - np.asarray(state.params)).max() > 1e-3


@pytest.mark.parametrize("left", [0, 1, T * N // 2])
def test_minibatches_without_any_experience_make_no_nan(left):
    """With few rows that are experience most minibatches have none of them; or all have none."""
    case = CASES["valid"]
    ppo = learner(case.kind, dataclasses.replace(case.options, mini_batch_size=2))
    valid = (np.arange(T * N) < left).reshape(T, N)
    before = start(ppo)
    kept = np.array(before.params)
    state, metrics = ppo.update(before, case.rollouts()[0]._replace(valid=valid), 0.0)
    for leaf in jax.tree.leaves((state._replace(key=0), metrics)):
        assert np.isfinite(leaf).all()
    assert state.observation_statistics.seen == left
    assert np.array_equal(state.params, kept) == (left == 0)


# --- the order of rows -------------------------------------------------------------------------

_permutation = jax.jit(shuffled, static_argnums=1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 63, 64, 65, 1000])
def test_shuffled_is_a_permutation(n):
    draws = [np.asarray(_permutation(jax.random.key(seed), n)) for seed in range(3)]
    for draw in draws:
        assert draw.dtype == np.int32
        np.testing.assert_array_equal(np.sort(draw), np.arange(n))
    if n > 60:
        assert not np.array_equal(draws[0], draws[1])
        assert not np.array_equal(draws[0], np.arange(n))


@pytest.mark.parametrize("n", [5, 8])
def test_every_index_is_at_every_place_equally_often(n):
    rounds = 20_000
    keys = jax.random.split(jax.random.key(0), rounds)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: shuffled(key, n)))(keys))
    counts = np.array([np.bincount(draws[:, place], minlength=n) for place in range(n)])
    error = np.sqrt(rounds / n * (1 - 1 / n))
    assert np.abs(counts - rounds / n).max() < 4.5 * error
    after = np.mean(draws[:, 1] > draws[:, 0])  # and pairs are in either order
    assert abs(after - 0.5) < 4.5 * 0.5 / np.sqrt(rounds)


@pytest.mark.parametrize("mini_batch_size", [2, None])
def test_each_row_is_used_once_in_each_epoch(mini_batch_size):
    """Advantages are powers of 8 here, so the sum of all losses counts the uses of each row."""
    options = PPOParameters(
        num_steps=2,
        epochs=3,
        mini_batch_size=mini_batch_size,
        lr=1e-30,
        gamma=0.0,
        clip_param=None,
        value_coef=0.0,
        entropy_coef=0.0,
        normalize_advantage=False,
    )
    ppo = PPO(BOX, spaces.Discrete(3), options, NETWORK, N)
    state = ppo.init(0)
    state = state._replace(params=jnp.zeros_like(state.params))  # values 0, ratios 1
    rollout = make_rollout("choice", 0)
    rows = 2 * N
    rewards = 8.0 ** np.arange(rows)
    rollout = rollout._replace(
        observations=rollout.observations[:3],
        actions=rollout.actions[:2],
        rewards=rewards.reshape(2, N).astype(np.float32),
        terminated=rollout.terminated[:2],
        truncated=np.zeros((2, N), bool),
        final_index=np.full(16, rows, np.int32),
    )
    _, metrics = ppo.update(state, rollout, 0.0)
    total = round(-float(metrics["train/policy_gradient_loss"]) * rows * options.epochs)
    uses = [total // 8**row % 8 for row in range(rows)]
    assert uses == [options.epochs] * rows


# --- what ends or scales an update -------------------------------------------------------------


def steps_taken(state: TrainState) -> int:
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert len(counts) == 1
    return counts[0]


def test_target_kl_ends_the_update():
    rollouts = CASES["choice"].rollouts()
    free = learner("choice", PLAIN)
    state, metrics = free.update(start(free), rollouts[0], 0.0)
    assert steps_taken(state) == 6
    reached = float(metrics["train/approx_kl"])
    assert reached > 1e-3

    bound = learner("choice", dataclasses.replace(PLAIN, target_kl=1e-12))
    state, metrics = bound.update(start(bound), rollouts[0], 0.0)
    # The first minibatch meets the very policy that collected: a KL of 0 stops nothing.
    assert steps_taken(state) == 2
    assert 0 < float(metrics["train/approx_kl"]) < reached  # of the steps that were taken
    assert float(metrics["train/value_loss"]) > 0
    state, _ = bound.update(state, rollouts[1], 0.0)  # the next update starts afresh
    assert steps_taken(state) == 4
    assert state.updates == 2


def test_schedules_reach_0():
    options = dataclasses.replace(CASES["box"].options)
    ppo = learner("box", options)
    before = np.array(start(ppo).params)
    for progress in (0.0, 0.25, 1.0):
        state, metrics = ppo.update(start(ppo), make_rollout("box", 10), progress)
        assert metrics["train/learning_rate"] == pytest.approx(options.lr * (1 - progress))
        assert metrics["train/clip_range"] == pytest.approx(0.2 * (1 - progress))
    np.testing.assert_array_equal(state.params, before)
    constant = learner("choice", PLAIN)
    _, metrics = constant.update(start(constant), make_rollout("choice", 10), 1.0)
    assert metrics["train/learning_rate"] == pytest.approx(PLAIN.lr)
    assert metrics["train/clip_range"] == pytest.approx(PLAIN.clip_param)


# --- programs and number formats ---------------------------------------------------------------


def test_the_update_is_compiled_once():
    """Whatever changes between rollouts: their content, origin, progress, final observations."""
    ppo = PPO(BOX, ACTIONS["box"], CASES["box"].options, NETWORK, N)
    device = jax.devices()[0]
    state = jax.device_put(ppo.init(0), device)
    for i in range(4):
        rollout = make_rollout("box", i)._replace(origin=Origin(i, 0, i))
        if i == 2:  # more truncations than fit the smallest padding
            rollout = rollout._replace(
                final_observations=np.zeros((64, 3), np.float32),
                final_index=np.full(64, T * N, np.int32),
            )
        state, _ = ppo.update(state, rollout, i / 4)
        assert ppo._learn._cache_size() == 1
    host = jax.tree.map(np.array, state._replace(key=jax.random.key_data(state.key)))
    restored = host._replace(key=jax.random.wrap_key_data(host.key))
    ppo.update(jax.device_put(restored, device), make_rollout("box", 5), 0.9)
    assert ppo._learn._cache_size() == 1


def test_the_old_state_is_given_up():
    """Donation: its memory serves the new one."""
    ppo = learner("choice", PLAIN)
    state = start(ppo)
    params = state.params
    ppo.update(state, make_rollout("choice", 10), 0.0)
    assert params.is_deleted()


def test_the_rollout_may_be_written_again_after_the_update():
    ppo = learner("choice", PLAIN)
    rollout = make_rollout("choice", 10)
    state, metrics = ppo.update(start(ppo), rollout, 0.0)
    jax.block_until_ready(state)
    kept = np.array(state.params)
    for array in (rollout.observations, rollout.rewards):
        array[...] = 1e9
    np.testing.assert_array_equal(state.params, kept)
    assert all(np.isfinite(float(value)) for value in metrics.values())


def test_bfloat16_is_close_to_float32():
    name = "box"
    case = CASES[name]
    rollout, results = case.rollouts()[0], []
    for precision in ("float32", "bfloat16"):
        network = dataclasses.replace(NETWORK, precision=precision)
        ppo = learner(case.kind, case.options, network)
        state, metrics = ppo.update(start(ppo), rollout, 0.0)
        leaves = jax.tree.leaves((state._replace(key=None), metrics))
        assert {leaf.dtype for leaf in leaves} <= {np.dtype("float32"), np.dtype("int32")}
        results.append((np.asarray(state.params), metrics))
    (exact, exact_metrics), (rough, rough_metrics) = results
    moved, apart = np.abs(exact - start_params(name)), np.abs(exact - rough)
    assert 0 < apart.mean() < 0.2 * moved.mean()
    for metric in ("train/value_loss", "train/entropy_loss"):
        assert rough_metrics[metric] == pytest.approx(float(exact_metrics[metric]), rel=0.05)


def test_bfloat16_probabilities_are_those_that_were_acted_with():
    """The first ratio is 1 whatever the precision: old and new are computed alike."""
    case = CASES["a2c"]
    ppo = learner(case.kind, case.options, dataclasses.replace(NETWORK, precision="bfloat16"))
    _, metrics = ppo.update(start(ppo), case.rollouts()[0], 0.0)
    assert abs(float(metrics["train/approx_kl"])) < 1e-6


def test_act_samples_with_the_noise_of_its_row():
    ppo = learner("choice", PLAIN)
    state = start(ppo)
    noise = ppo.draw_noise(np.uint32(3), np.uint32(0), (T, N))
    assert noise.shape == (T, N, 3)
    observation = make_rollout("choice", 10).observations[0]
    out = ppo.policy(state.params, observation, None)
    for t in (0, 3):
        raw, env, carry = ppo.act(Acting(state.params, None), observation, noise, np.uint32(t))
        np.testing.assert_array_equal(raw, np.argmax(out.outputs + noise[t], -1))
        assert env is None  # the raw ones are the environment's
        assert carry == ()
    again = ppo.draw_noise(np.uint32(3), np.uint32(0), (T, N))
    np.testing.assert_array_equal(noise, again)
    for seed, table in ((3, 1), (4, 0)):
        other = ppo.draw_noise(np.uint32(seed), np.uint32(table), (T, N))
        assert not np.array_equal(noise, other)


def test_act_and_predict_obey_masks():
    ppo = learner("choice", PLAIN)
    state = start(ppo)
    observation = make_rollout("choice", 10).observations[0]
    noise = ppo.draw_noise(np.uint32(0), np.uint32(0), (T, N))
    for choice in range(3):
        mask = np.tile(np.arange(3) == choice, (N, 1))
        raw, _, _ = ppo.act(Acting(state.params, None), observation, noise, np.uint32(0), mask)
        np.testing.assert_array_equal(raw, choice)
        for deterministic in (True, False):
            action = ppo.predict(
                state.params,
                None,
                observation,
                np.uint32(0),
                np.uint32(0),
                mask,
                deterministic=deterministic,
            )
            np.testing.assert_array_equal(action, choice)
