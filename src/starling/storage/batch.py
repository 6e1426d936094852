"""What a replay gives to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from starling.storage.rollout import Tree, map_tree


class Batch(NamedTuple):
    """K batches of B transitions. Trees have the structure of the space they belong to.

    Attributes:
        observations: `[K, B, ...]`.
        actions: `[K, B, ...]`, raw, as in `Rollout.actions`.
        returns: `[K, B]` float32, r_t + gamma r_{t+1} + ... over the next n steps, or up to the
            end of the episode where that comes first.
        discounts: `[K, B]` float32, gamma^m with m the number of steps summed; 0 where the episode
            terminated. The target is `returns + discounts * value(next_observations)`.
        next_observations: `[K, B, ...]`, what the last of the m steps truly led to, which is the
            true final observation where the episode was truncated. Where it terminated this may be
            the next episode's first one, and bears no weight.
        next_action_masks: `[K, B, choices]`, what was allowed there; all where that is not known,
            of final observations. None without masks.
        weights: `[K, B]` float32, importance weights; ones without priorities.
        indices: `[K, B]` int64, which transitions these are. A transition's index is never given
            to another.
    """

    observations: Tree
    actions: Tree
    returns: np.ndarray
    discounts: np.ndarray
    next_observations: Tree
    next_action_masks: np.ndarray | None
    weights: np.ndarray
    indices: np.ndarray


def map_batches(function: Callable[..., Any], *batches: Batch) -> Batch:
    """Applies a function to all arrays that there are."""
    return Batch(*map_tree(lambda *x: None if x[0] is None else function(*x), *batches))


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Batches one after the other; the only one itself if there is but one."""
    if len(batches) == 1:
        return batches[0]
    return map_batches(lambda *x: np.concatenate(x), *with_masks(batches))


def with_masks(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The same, with action masks in all of them if some have them."""
    masks = next((b.next_action_masks for b in batches if b.next_action_masks is not None), None)
    if masks is None:
        return batches
    choices = masks.shape[-1:]
    return [
        b._replace(next_action_masks=np.ones((*b.returns.shape, *choices), np.bool_))
        if b.next_action_masks is None
        else b
        for b in batches
    ]
