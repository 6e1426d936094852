"""V-trace against the sum that defines it, and PPO that learns from older policies' rollouts."""

from __future__ import annotations

import gymnasium as gym
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.algorithms.acting import Acting
from starling.algorithms.ppo import PPO
from starling.algorithms.returns import generalized_advantages, vtrace
from starling.algorithms.vtrace_ppo import VTracePPO
from starling.config import AsyncPPOConfig, DistributedPPOConfig
from starling.storage.rollout import Origin, Rollout

T, N = 7, 3
GAMMA = 0.9


def arrays_of(seed: int, off_policy: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "rewards": rng.normal(size=(T, N)).astype(np.float32),
        "values": rng.normal(size=(T + 1, N)).astype(np.float32),
        "final_values": rng.normal(size=(T, N)).astype(np.float32),
        "terminated": rng.random((T, N)) < 0.15,
        "truncated": rng.random((T, N)) < 0.15,
        "log_ratios": (off_policy * rng.normal(size=(T, N))).astype(np.float32),
    }


def definition(
    a, gae_lambda, rho_clip, c_clip, mistake="", valid=None
) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 1 of the paper as it stands: a sum over later steps of products, in float64."""
    valid = np.ones((T, N), bool) if valid is None else valid
    ratios = np.exp(a["log_ratios"].astype(np.float64))
    rho, c = np.minimum(rho_clip, ratios), gae_lambda * np.minimum(c_clip, ratios)
    if mistake == "c is not clipped by itself":
        c = gae_lambda * rho
    follow = np.where(a["truncated"], a["final_values"], a["values"][1:])
    if mistake == "next episode's value":
        follow = a["values"][1:]
    ends_return = a["terminated"] | (a["truncated"] & (mistake == "truncation terminates"))
    deltas = a["rewards"] + GAMMA * np.where(ends_return, 0, follow) - a["values"][:-1]
    ended = a["terminated"] | a["truncated"]
    targets, advantages = a["values"][:-1].astype(np.float64), np.zeros((T, N))
    for n in range(N):
        for start in range(T):
            factor = 1.0  # gamma^(t - start) c_start ... c_{t-1}
            for t in range(start, T):
                if not valid[t, n]:
                    break
                targets[start, n] += factor * rho[t, n] * deltas[t, n]
                factor *= GAMMA * c[t, n]
                if ended[t, n]:
                    break
        for t in range(T):
            later = targets[t + 1, n] - a["values"][t + 1, n] if t + 1 < T else 0.0
            later = 0.0 if ended[t, n] else later
            advantages[t, n] = valid[t, n] * (deltas[t, n] + GAMMA * gae_lambda * later)
            if mistake == "weighs the action twice":
                advantages[t, n] *= rho[t, n]
    return advantages, targets


CLIPS = ("gamma", "gae_lambda", "rho_clip", "c_clip")
compiled = jax.jit(vtrace, static_argnames=CLIPS)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([(0.95, 1.0, 1.0), (1.0, 2.0, 0.7)]))
def test_vtrace_is_its_definition(seed, clips):
    gae_lambda, rho_clip, c_clip = clips
    a = arrays_of(seed, True)
    found = compiled(**a, gamma=GAMMA, gae_lambda=gae_lambda, rho_clip=rho_clip, c_clip=c_clip)
    for one, other in zip(found, definition(a, *clips), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "mistake",
    [
        "c is not clipped by itself",
        "next episode's value",
        "truncation terminates",
        "weighs the action twice",
    ],
)
def test_the_test_of_vtrace_notices_mistakes(mistake):
    a, clips = arrays_of(0, True), (0.95, 2.0, 0.7)
    right, wrong = definition(a, *clips), definition(a, *clips, mistake)
    assert max(np.abs(r - w).max() for r, w in zip(right, wrong, strict=True)) > 1e-2


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.6, 1.0]))
def test_nothing_crosses_a_gap(seed, rate):
    a, clips = arrays_of(seed, True), (0.95, 2.0, 0.7)
    valid = np.random.default_rng(seed).random((T, N)) >= rate
    found = compiled(**a, valid=valid, **dict(zip(CLIPS, (GAMMA, *clips), strict=True)))
    expected = definition(a, *clips, valid=valid)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert not np.asarray(found[0])[~valid].any()


def test_a_lost_step_is_no_ordinary_truncation():
    """One environment, gamma = lambda = 1/2, pi = mu: the delta before the gap alone is its own."""
    a = {
        "rewards": np.array([[1.0], [2.0], [0.0], [4.0]], np.float32),
        "values": np.array([[2.0], [4.0], [6.0], [8.0], [10.0]], np.float32),
        "final_values": np.full((4, 1), 20.0, np.float32),
        "terminated": np.zeros((4, 1), bool),
        "truncated": np.array([[0], [0], [1], [0]], bool),
        "log_ratios": np.zeros((4, 1), np.float32),
    }
    one = dict(zip(CLIPS, (0.5, 0.5, 1.0, 1.0), strict=True))
    advantages, targets = vtrace(**a, valid=~a["truncated"], **one)
    np.testing.assert_array_equal(advantages[:, 0], [1 + 1 / 4, 1, 0, 1])
    np.testing.assert_array_equal(targets[:, 0], [2 + 1 + 1 / 4, 4 + 1, 6, 8 + 1])
    wrong, _ = vtrace(**a, **one)
    np.testing.assert_array_equal(wrong[:, 0], [1 + 2 / 4, 1 + 4 / 4, 4, 1])


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_without_lag_vtrace_is_generalised_advantage_estimation(gae_lambda):
    a = arrays_of(3, False)
    found = vtrace(**a, gamma=GAMMA, gae_lambda=gae_lambda, rho_clip=1.0, c_clip=1.0)
    del a["log_ratios"]
    expected = generalized_advantages(**a, gamma=GAMMA, gae_lambda=gae_lambda)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_without_lag_and_with_lambda_1_the_targets_are_the_returns():
    a = arrays_of(4, False)
    a["terminated"][:] = a["truncated"][:] = False
    _, targets = vtrace(**a, gamma=GAMMA, gae_lambda=1.0, rho_clip=1.0, c_clip=1.0)
    returns = a["values"][-1].astype(np.float64)
    for t in reversed(range(T)):
        returns = a["rewards"][t] + GAMMA * returns
        np.testing.assert_allclose(targets[t], returns, atol=1e-6)


# --- the algorithm -----------------------------------------------------------------------------

BOX = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
CHOICE = gym.spaces.Discrete(3)


def config(**settings) -> AsyncPPOConfig:
    small = {"num_envs": N, "num_steps": T, "hidden_sizes": (8,), "epochs": 2, "lr": 1e-2}
    return AsyncPPOConfig(
        env="test", mini_batch_size=None, timesteps=T * N, **{**small, **settings}
    )


def algorithm(kind=VTracePPO, **settings):
    options = config(**settings)
    return kind(BOX, CHOICE, options, options, N)


def rollout() -> Rollout:
    rng = np.random.default_rng(0)
    truncated = np.zeros((T, N), bool)
    truncated[3, 1] = True
    terminated = np.zeros((T, N), bool)
    terminated[2, 0] = True
    return Rollout(
        observations=rng.normal(size=(T + 1, N, 3)).astype(np.float32),
        actions=rng.integers(0, 3, (T, N)),
        rewards=rng.normal(size=(T, N)).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        final_observations=rng.normal(size=(1, 3)).astype(np.float32),
        final_index=np.array([3 * N + 1], np.int32),
    )


def described(ppo: VTracePPO, state, of: Rollout, before=None) -> Rollout:
    acting = Acting(state.params, state.observation_statistics)
    return ppo.describe(acting, of, before)[0]


@pytest.mark.parametrize(
    "settings", [{}, {"normalize_observations": True, "normalize_rewards": True}]
)
def test_without_lag_the_update_is_that_of_ppo(settings):
    plain, ppo = algorithm(PPO, **settings), algorithm(**settings)
    expected, state = plain.init(0), ppo.init(0)
    sums = np.zeros(N, np.float32) if settings else None
    for _ in range(2):
        of = described(ppo, state, rollout(), sums)
        if sums is not None:
            acting = Acting(state.params, state.observation_statistics)
            sums = ppo.describe(acting, of, sums)[1]
        expected, _ = plain.update(expected, rollout())
        state, _ = ppo.update(state, of)
        np.testing.assert_allclose(state.params, expected.params, atol=1e-6)
    if sums is not None:
        np.testing.assert_allclose(sums, expected.reward_sums, atol=1e-6)


def test_actors_may_use_the_parameters_that_an_update_was_given():
    ppo = algorithm(normalize_observations=True)
    state = ppo.init(0)
    acting = Acting(state.params, state.observation_statistics)
    before = jax.tree.map(np.array, acting)
    moment = state.opt_state
    ppo.update(state, described(ppo, state, rollout()))
    jax.tree.map(np.testing.assert_array_equal, acting, before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(moment) if leaf.size > 1)


def test_the_old_policy_of_the_ratio_is_the_one_that_acted():
    """One pass over all rows: the policy loss is the mean of ratio x advantage, in closed form."""
    settings = {"epochs": 1, "normalize_advantage": False, "clip_param": None}
    ppo = algorithm(**settings)
    state = ppo.init(0)
    lagging = described(ppo, state, rollout())
    noise = np.random.default_rng(1).normal(size=(T, N)).astype(np.float32)
    lagging = lagging._replace(log_probs=lagging.log_probs + 0.5 * noise)
    pi = ppo.describe(Acting(state.params, None), rollout(), None)[0].log_probs
    values = ppo.policy(state.params, ppo.policy.features(lagging.observations), None).value
    finals = ppo.policy(state.params, ppo.policy.features(lagging.final_observations), None).value
    final_values = np.zeros((T, N), np.float32)
    final_values[3, 1] = finals[0]
    ratios = np.exp(pi - lagging.log_probs)
    advantages, _ = vtrace(
        lagging.rewards,
        values,
        final_values,
        lagging.terminated,
        lagging.truncated,
        np.log(ratios),
        **{"gamma": 0.99, "gae_lambda": 0.95, "rho_clip": 1.0, "c_clip": 1.0},
    )
    _, metrics = ppo.update(state, lagging)
    loss = float(metrics["train/policy_gradient_loss"])
    assert loss == pytest.approx(-float((ratios * advantages).mean()), abs=1e-6)
    assert abs(loss + float(np.mean(advantages))) > 1e-3  # with the ratio left out


def test_what_the_networks_said_when_they_acted_is_not_taken_for_what_they_say_now():
    ppo, plain = algorithm(), algorithm(PPO)
    outdated = (np.ones((T, N, 3), np.float32), np.ones((T, N), np.float32))
    of = described(ppo, ppo.init(0), rollout())
    expected = ppo.update(ppo.init(0), of)[0].params
    found = ppo.update(ppo.init(0), of._replace(outputs=outdated))[0].params
    np.testing.assert_array_equal(found, expected)
    # PPO relies on them, as its rollouts are of the very parameters that learn.
    believed = plain.update(plain.init(0), rollout()._replace(outputs=outdated))[0].params
    assert np.abs(believed - expected).max() > 1e-3


@pytest.mark.parametrize("normalize", [False, True])
def test_where_nobody_is_ahead_what_the_networks_said_is_taken_as_it_is(normalize):
    def workers_of(sync_mode) -> VTracePPO:
        options = DistributedPPOConfig(
            env="test", num_workers=1, num_envs=N, num_steps=T, hidden_sizes=(8,), epochs=2,
            lr=1e-2, mini_batch_size=None, timesteps=T * N, normalize_observations=normalize,
            sync_mode=sync_mode,
        )  # fmt: skip
        return VTracePPO(BOX, CHOICE, options, options, N)

    ahead, ppo = workers_of("non_blocking"), workers_of("blocking")
    without = described(ahead, ahead.init(0), rollout())
    of = described(ppo, ppo.init(0), rollout())
    assert without.outputs is None
    assert [x.shape for x in of.outputs] == [(T, N, 3), (T, N)]
    expected = ahead.update(ahead.init(0), without)[0].params
    found = ppo.update(ppo.init(0), of)[0].params
    np.testing.assert_allclose(found, expected, atol=1e-6)
    others = ppo.update(ppo.init(0), of._replace(outputs=(of.outputs[0], 1 + of.outputs[1])))
    assert np.abs(others[0].params - expected).max() > 1e-3


def test_the_correction_matters_and_can_be_left_out():
    results = []
    for correction in ("vtrace", "none"):
        ppo = algorithm(correction=correction)
        lagging = described(ppo, ppo.init(1), rollout())
        lagging = lagging._replace(log_probs=lagging.log_probs + 1.0, origin=Origin(3))
        results.append(np.asarray(ppo.update(ppo.init(0), lagging)[0].params))
    assert np.abs(results[0] - results[1]).max() > 1e-4
