"""First priorities against sums walked by hand, and proof that the usual mistakes would show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from starling.algorithms.acting import Acting
from starling.algorithms.ape_x import ApeX, epsilons
from starling.algorithms.dqn import LEAST_PRIORITY
from starling.algorithms.dqn_parameters import DQNParameters
from starling.networks.network_parameters import LayerParameters
from starling.storage.rollout import Rollout

T, N, GAMMA = 9, 3, 0.9
BOX, CHOICE, BRANCHES = spaces.Box(-3, 3, (3,)), spaces.Discrete(4), spaces.MultiDiscrete([2, 4])


def make(actions: spaces.Space = CHOICE, **settings: Any) -> ApeX:
    options = DQNParameters(**{"prioritized": True, "gamma": GAMMA, "n_step": 3, **settings})
    return ApeX(BOX, actions, options, LayerParameters(hidden_sizes=(5,)))


def rollout_of(actions: spaces.Space = CHOICE, lost: bool = False, masks: bool = False) -> Rollout:
    """Random steps: environment 0 terminates at 2 and 7, 1 is truncated at 4, 2 loses step 5."""
    rng = np.random.default_rng(0)
    terminated, truncated = np.zeros((2, T, N), bool)
    terminated[[2, 7], 0], truncated[4, 1] = True, True
    valid = np.ones((T, N), bool)
    if lost:
        valid[5, 2], truncated[5, 2] = False, True
    sizes = [4] if actions is CHOICE else [2, 4]
    raw = np.stack([rng.integers(0, n, (T, N)) for n in sizes], -1).astype(np.int32)
    mask = rng.random((T, N, sum(sizes))) < 0.6
    mask[..., [0, 2] if len(sizes) > 1 else [0]] = True
    return Rollout(
        rng.normal(size=(T + 1, N, 3)).astype(np.float32),
        raw[..., 0] if len(sizes) == 1 else raw,
        rng.normal(size=(T, N)).astype(np.float32),
        terminated,
        truncated,
        rng.normal(size=(16, 3)).astype(np.float32),
        np.array([4 * N + 1] + [T * N] * 15, np.int32),
        valid if lost else None,
        mask if masks else None,
    )


def walked(apex: ApeX, params: Any, made: Rollout, mistake: str = "") -> np.ndarray:
    """What `priorities` should give, one return after the other."""
    policy, n_step, expected = apex.policy, apex.options.n_step, np.zeros((T, N))
    components = policy.shape[0]

    def q(observation: np.ndarray) -> np.ndarray:
        return np.asarray(policy(params, policy.features(observation[None]), None))[0]

    def value(observation: np.ndarray, mask: np.ndarray | None) -> float:
        rows, at, total = q(observation), 0, 0.0
        for d, size in enumerate([4] if components == 1 else [2, 4]):
            allowed = [a for a in range(size) if mask is None or mask[at + a]]
            total += max(rows[d, a] for a in allowed)
            at += size
        return total / components

    def following(t: int, n: int) -> float:
        if made.truncated[t, n] and t * N + n in made.final_index and mistake != "next episode":
            return value(made.final_observations[list(made.final_index).index(t * N + n)], None)
        known = made.action_masks is not None and t + 1 < T and mistake != "unmasked"
        return value(made.observations[t + 1, n], made.action_masks[t + 1, n] if known else None)

    for t, n in np.ndindex(T, N):
        total, steps = 0.0, 0
        for k in range(t, min(t + n_step, T)):
            total, steps = total + GAMMA**steps * float(made.rewards[k, n]), steps + 1
            lost = made.valid is not None and k + 1 < T and not made.valid[k + 1, n]
            over = made.terminated[k, n] or made.truncated[k, n] or lost
            if over and mistake != "across the end":
                break
        ended = made.terminated[k, n] or (made.truncated[k, n] and mistake == "truncation ends")
        total += 0.0 if ended else GAMMA**steps * following(k, n)
        chosen = np.atleast_1d(made.actions[t, n])
        expected[t, n] = np.abs(
            total - q(made.observations[t, n])[range(components), chosen]
        ).mean()
    return expected


@pytest.mark.parametrize("actions", [CHOICE, BRANCHES])
@pytest.mark.parametrize("n_step", [1, 3, 20])
@pytest.mark.parametrize(("lost", "masks"), [(False, False), (True, True)])
def test_priorities_are_td_errors_of_n_steps(actions, n_step, lost, masks):
    apex = make(actions, n_step=n_step)
    params, made = apex.init(3).params * 5, rollout_of(actions, lost, masks)
    described, carry = apex.describe(Acting(params, None, np.zeros(N)), made, None)
    expected = walked(apex, params, made) + LEAST_PRIORITY
    valid = np.ones((T, N), bool) if made.valid is None else made.valid
    np.testing.assert_allclose(described.priorities[valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert carry is None


@pytest.mark.parametrize(
    "mistake", ["truncation ends", "next episode", "across the end", "unmasked"]
)
def test_mistakes_would_show(mistake):
    apex, made = make(), rollout_of(masks=True)
    params = apex.init(3).params * 5
    right, wrong = walked(apex, params, made), walked(apex, params, made, mistake)
    assert np.abs(right - wrong).max() > 1e-2


def test_without_priorities_nothing_is_added():
    apex, made = make(prioritized=False), rollout_of()
    assert apex.describe(Acting(apex.init(0).params, None, np.zeros(N)), made, None)[0] is made


def test_what_is_not_finite_gets_the_least_priority():
    apex, made = make(), rollout_of()
    made.rewards[0, 2] = np.inf
    described, _ = apex.describe(Acting(apex.init(0).params, None, np.zeros(N)), made, None)
    assert described.priorities[0, 2] == np.float32(LEAST_PRIORITY)
    assert (described.priorities > 0).all()
    assert np.isfinite(described.priorities).all()


def test_environments_explore_less_and_less():
    """Horgan et al. 2018, section 4, with epsilon 0.4 and alpha 7."""
    np.testing.assert_allclose(epsilons(8)[[0, 1, 7]], [0.4, 0.4**2, 0.4**8], rtol=1e-6)
    np.testing.assert_allclose(epsilons(1), [0.4])
