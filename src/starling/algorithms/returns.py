"""Advantages and returns: pure functions over `[T, N]` arrays, time first."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def generalized_advantages(
    rewards: Array,
    values: Array,
    final_values: Array,
    terminated: Array,
    truncated: Array,
    gamma: float,
    gae_lambda: float,
    valid: Array | None = None,
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t = delta_t + gamma lambda (1 - terminated_t) (1 - truncated_t) A_{t+1}

    s'_t is what step t truly led to. Where an episode was truncated that is its final observation
    and not `observations[t + 1]`, which is the next episode's first. Termination ends the return,
    truncation does not, and both cut the recursion. A row that is not `valid` is a gap: its
    advantage is 0, and the step before it bootstraps from V of what it led to, as at the end of a
    rollout.

    Args:
        rewards: `[T, N]`.
        values: `[T + 1, N]`, V of the observations that actions were chosen for, and of the last.
        final_values: `[T, N]`, V of the true final observation where truncated; else not read.
        terminated: `[T, N]`.
        truncated: `[T, N]`.
        gamma: Discount.
        gae_lambda: 0 gives one-step temporal differences, 1 Monte-Carlo returns.
        valid: `[T, N]`, rows that are experience; None: all of them.

    Returns:
        Advantages `[T, N]`, and returns `[T, N]`: advantage + value, the target of the value.
    """
    deltas, goes_on = _differences(
        rewards, values, final_values, terminated, truncated, gamma, valid
    )
    carry_on = gamma * gae_lambda * goes_on

    def backwards(advantage: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, keep = step
        advantage = delta + keep * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(
        backwards, jnp.zeros_like(values[0]), (deltas, carry_on), reverse=True
    )
    return advantages, advantages + values[:-1]


def vtrace(
    rewards: Array,
    values: Array,
    final_values: Array,
    terminated: Array,
    truncated: Array,
    log_ratios: Array,
    gamma: float,
    gae_lambda: float,
    rho_clip: float,
    c_clip: float,
    valid: Array | None = None,
) -> tuple[Array, Array]:
    """V-trace (Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and remark 2), corrected for lag.

    With pi the policy that is trained and mu the one that acted:

        rho_t = min(rho_clip, pi/mu),  c_t = lambda min(c_clip, pi/mu)
        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        v_t - V(s_t) = rho_t delta_t + gamma c_t (1 - ended_t) (v_{t+1} - V(s_{t+1}))
        A_t = delta_t + gamma lambda (1 - ended_t) (v_{t+1} - V(s_{t+1}))

    rho_clip decides which policy's value is learnt (pi's if it is large, mu's if it is 0), c_clip
    only how fast. A_t judges the action that was taken, so it bears no rho_t: PPO's surrogate
    weighs it by pi/mu itself, and would do so twice. Where pi is mu, all of this is generalised
    advantage estimation.

    Args:
        rewards: `[T, N]`.
        values: `[T + 1, N]`, by the parameters that are trained.
        final_values: `[T, N]`, V of the true final observation where truncated; else not read.
        terminated: `[T, N]`.
        truncated: `[T, N]`.
        log_ratios: `[T, N]`, log pi - log mu of the actions taken.
        gamma: Discount.
        gae_lambda: As for `generalized_advantages`.
        rho_clip: Largest weight of a temporal difference.
        c_clip: Largest weight of what comes after it, before lambda.
        valid: As for `generalized_advantages`.

    Returns:
        Advantages A `[T, N]`, and v `[T, N]`, the target of the value.
    """
    ratios = jnp.exp(log_ratios)
    rho, c = jnp.minimum(rho_clip, ratios), gae_lambda * jnp.minimum(c_clip, ratios)
    deltas, goes_on = _differences(
        rewards, values, final_values, terminated, truncated, gamma, valid
    )
    discount = gamma * goes_on

    def backwards(
        correction: Array, step: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        delta, keep, rho, c = step
        advantage = delta + keep * gae_lambda * correction
        correction = rho * delta + keep * c * correction
        return correction, (advantage, correction)

    _, (advantages, corrections) = jax.lax.scan(
        backwards, jnp.zeros_like(values[0]), (deltas, discount, rho, c), reverse=True
    )
    return advantages, values[:-1] + corrections


def _differences(
    rewards: Array,
    values: Array,
    final_values: Array,
    terminated: Array,
    truncated: Array,
    gamma: float,
    valid: Array | None,
) -> tuple[Array, Array]:
    """Temporal differences `[T, N]`, and 1 where the recursion goes on after a step, else 0."""
    next_values = jnp.where(truncated, final_values, values[1:])
    deltas = rewards + gamma * jnp.where(terminated, 0.0, next_values) - values[:-1]
    goes_on = 1.0 - jnp.logical_or(terminated, truncated)
    if valid is None:
        return deltas, goes_on
    return jnp.where(valid, deltas, 0.0), jnp.where(valid, goes_on, 0.0)


def discounted_sums(
    rewards: Array, ended: Array, carry: Array, gamma: float, valid: Array | None = None
) -> tuple[Array, Array]:
    """Discounted sum of the rewards so far in each episode: what reward normalisation scales by.

    Args:
        rewards: `[T, N]`.
        ended: `[T, N]`, an episode ended with this step.
        carry: `[N]`, the sums before the first step.
        gamma: Discount.
        valid: `[T, N]`, rows that are experience; the others are worth 0, and what comes after
            them begins anew. None: all of them.

    Returns:
        The sums `[T, N]`, and the carry for the next rollout `[N]`.
    """
    if valid is not None:
        rewards, ended = jnp.where(valid, rewards, 0.0), jnp.logical_or(ended, ~valid)

    def forwards(carry: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, end = step
        total = carry * gamma + reward
        return jnp.where(end, 0.0, total), total

    carry, sums = jax.lax.scan(forwards, carry, (rewards, ended))
    return sums, carry
