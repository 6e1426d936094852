"""Steps that follow one another in a replay, for policies that remember."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from starling.storage.n_step import GOES_ON, TERMINATED
from starling.storage.replay_rings import Rings
from starling.storage.rollout import Tree, map_tree


class Sequences(NamedTuple):
    """B sequences of at most L steps, each of one episode. What is not `valid` is zeros.

    Attributes:
        observations: `[B, L + 1, ...]`; after a sequence's last step comes what that truly led to,
            which is the true final observation where the episode was truncated. Where it terminated
            this may be the next episode's first one, and bears no weight.
        actions: `[B, L, ...]`, raw, as in `Rollout.actions`.
        rewards: `[B, L]` float32.
        terminated: `[B, L]`, the episode ended here, and nothing comes after it.
        truncated: `[B, L]`, the episode was cut here, and would have gone on.
        valid: `[B, L]`, the steps that there are: the first one, and those after it up to the end
            of the episode, or to the newest step.
    """

    observations: Tree
    actions: Tree
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray


def read_sequences(rings: Rings, slots: np.ndarray, length: int) -> Sequences:
    """The sequences of at most `length` steps that begin in slots `[B]`, which can be sampled."""
    envs, rows = np.divmod(slots, rings.rows_per_env)
    steps = np.arange(length + 1)
    ahead = (slots - rows)[:, None] + (rows[:, None] + steps) % rings.rows_per_env
    written = (rings.heads[envs] - 1 - rows) % rings.rows_per_env + 1  # from there to the head
    valid = steps[:-1] < written[:, None]
    ends = np.where(valid, rings.ends[ahead[:, :-1]], GOES_ON)
    valid[:, 1:] &= np.logical_and.accumulate(ends[:, :-1] == GOES_ON, 1)
    batch, counts = np.arange(len(slots)), valid.sum(1)

    def spread(taken: np.ndarray) -> np.ndarray:
        found = np.zeros((*valid.shape, *taken.shape[1:]), taken.dtype)
        found[valid] = taken
        return found

    def with_last(taken: np.ndarray, last: np.ndarray) -> np.ndarray:
        found = np.pad(spread(taken), [(0, 0), (0, 1)] + [(0, 0)] * (taken.ndim - 1))
        found[batch, counts] = last
        return found

    there, last = ahead[:, :-1][valid], ahead[batch, counts - 1]
    following = rings.next_observations(last, ahead[batch, counts], rings.ends[last])
    observations = map_tree(lambda column: column.take(there), rings.observations)
    ends = spread(rings.ends[there])
    return Sequences(
        map_tree(with_last, observations, following),
        map_tree(lambda column: spread(column.take(there)), rings.actions),
        spread(rings.rewards[there]),
        ends == TERMINATED,
        ends > TERMINATED,
        valid,
    )
