"""Where episodes end, and the sums of rewards up to there: pure functions over `[N, T]` arrays."""

from __future__ import annotations

import numpy as np

from starling.errors import UserError
from starling.storage.rollout import Rollout, Tree, map_tree

# How a step ended. Whatever is not GOES_ON is the last step of a sum.
GOES_ON = 0
TERMINATED = 1
TRUNCATED = 2  # what it led to is the observation of the next row
TRUNCATED_ASIDE = 3  # what it led to is in no row: a final observation kept beside them
NO_EXPERIENCE = 4  # nothing to learn from, though its observation may be what another led to


def ends_of(rollout: Rollout) -> np.ndarray:
    """How each step of a rollout ended, `[N, T]` uint8.

    A row that is not valid cuts what came before it, as a truncation that led to that row's own
    observation: that is so of a step that was lost, and elsewhere the episode has ended already.
    The last row is GOES_ON where that depends on the next rollout.
    """
    truncated = TRUNCATED if rollout.final_index is None else TRUNCATED_ASIDE
    ends = np.where(rollout.terminated, TERMINATED, np.where(rollout.truncated, truncated, GOES_ON))
    if rollout.valid is not None:
        ends[~np.asarray(rollout.valid, np.bool_)] = NO_EXPERIENCE
        ends[:-1][(ends[:-1] == GOES_ON) & (ends[1:] == NO_EXPERIENCE)] = TRUNCATED
    return ends.astype(np.uint8).T


def final_rows(rollout: Rollout, ends: np.ndarray) -> tuple[Tree, tuple[np.ndarray, np.ndarray]]:
    """The final observations that are in no row.

    Args:
        rollout: Of T steps.
        ends: `[N, T]`, how each step ended.

    Returns:
        The observations `[K, ...]`, None where there are none; and the environments and steps `[K]`
        that they belong to.
    """
    aside = ends == TRUNCATED_ASIDE
    if not aside.any():
        return None, (np.zeros(0, np.int64), np.zeros(0, np.int64))
    index = np.asarray(rollout.final_index)
    real = np.flatnonzero(index < aside.size)
    t, n = np.divmod(index[real], len(ends))
    kept = aside[n, t]  # a step that was lost has a final observation, too
    real, at = real[kept], (n[kept], t[kept])
    aside[at] = False
    if aside.any():
        n, t = np.argwhere(aside)[0]
        raise UserError(
            f"environment {n} of the rollout was truncated at step {t}, and its final observation "
            "is missing: give it in final_observations and final_index"
        )
    return map_tree(lambda x: np.asarray(x)[real], rollout.final_observations), at


def bears_no_mask(ends: np.ndarray) -> np.ndarray:
    """Where what a step led to has no action mask: it is in no row, or bears no weight."""
    return (ends == TERMINATED) | (ends == TRUNCATED_ASIDE)


def n_step_returns(
    rewards: np.ndarray, ends: np.ndarray, n_step: int, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Discounted sums over at most n steps that stay within one episode.

    Args:
        rewards: `[N, T]` float32.
        ends: `[N, T]`, how each step ended.
        n_step: n.
        gamma: Discount.

    Returns:
        The sums, `[N, T]` float32, and how many steps are in each, `[N, T]`: 0 where a row is no
        experience, or where its n steps are not all there yet and its episode has not ended.
    """
    width = rewards.shape[1]
    sums = np.zeros(rewards.shape)
    lengths = np.zeros(rewards.shape, np.int64)
    unended = ends != NO_EXPERIENCE
    for k in range(min(n_step, width)):
        rows = slice(width - k)  # those whose k-th step from here is there
        sums[:, rows] += np.where(unended[:, rows], gamma**k * rewards[:, k:], 0.0)
        lengths[:, rows] += unended[:, rows]
        unended[:, rows] &= ends[:, k:] == GOES_ON
    lengths[unended & (lengths < n_step)] = 0
    return sums.astype(np.float32), lengths
