"""What a replay refuses, before it has changed anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from starling.errors import UserError
from starling.memory import available_memory
from starling.storage.n_step import GOES_ON
from starling.storage.replay_columns import continues, is_stack
from starling.storage.rollout import Rollout, Tree, map_tree, tree_leaves


def check_capacity(
    capacity: int, num_envs: int, steps: int, n_step: int, frame_stack: int | None
) -> None:
    """Looks whether rollouts of some steps leave room for the rows that they have to go with."""
    needed = steps + n_step + (frame_stack or 1) - 1
    kept = capacity // num_envs
    if kept < needed:
        stack = f" and frame_stack {frame_stack}" if frame_stack else ""
        raise UserError(
            f"a replay of {capacity} transitions keeps {kept} steps of each of {num_envs} "
            f"environments, but rollouts of {steps} steps with n_step {n_step}{stack} need "
            f"{needed}: set its capacity to {needed * num_envs} or more"
        )


def check_memory(
    capacity: int, num_envs: int, slot_bytes: int, images: bool, available: int | None
) -> None:
    """Looks whether there is memory for all slots, of what is free here if nothing is said.

    Args:
        capacity: Transitions to keep, of all environments together.
        num_envs: Environments, each with a slot more than it keeps transitions.
        slot_bytes: Bytes of a slot.
        images: Whether observations are images that are kept whole.
        available: Bytes that are free.
    """
    needed = (capacity // num_envs + 1) * num_envs * slot_bytes
    if available is None:
        available = available_memory()
    # What nobody could have is refused where the system does not say what is free, too.
    if needed > (1 << 47 if available is None else available):
        free = fits = ""
        if available is not None:
            most = max(0, available // slot_bytes - num_envs)
            free, fits = f", and {available / 1e9:,.1f} GB are free", f" to {most:,} at most"
        stacks = ", or set frame_stack if its images are stacks of frames" if images else ""
        raise UserError(
            f"a replay of {capacity:,} transitions of {slot_bytes:,} bytes takes "
            f"{needed / 1e9:,.1f} GB{free}: lower buffer_size{fits}{stacks}"
        )


def check_envs(first_env: int, envs: int, num_envs: int) -> None:
    """Looks whether a replay has all environments of a rollout."""
    if first_env < 0 or first_env + envs > num_envs:
        raise UserError(
            f"a rollout of environments {first_env} to {first_env + envs - 1} does not fit "
            f"into a replay of num_envs {num_envs}"
        )


def check_shapes(rollout: Rollout) -> None:
    """Looks whether all parts of a rollout are of as many steps and environments."""
    steps, envs = np.shape(rollout.rewards)
    parts: dict[str, tuple[Any, int]] = {
        "observations": (rollout.observations, steps + 1),
        "actions": (rollout.actions, steps),
        "terminated": (rollout.terminated, steps),
        "truncated": (rollout.truncated, steps),
        "valid": (rollout.valid, steps),
        "action_masks": (rollout.action_masks, steps),
    }
    for name, (tree, rows) in parts.items():
        for leaf in tree_leaves(() if tree is None else tree):
            if np.shape(leaf)[:2] != (rows, envs):
                raise UserError(
                    f"{name} of a rollout have shape {np.shape(leaf)}, and rewards "
                    f"{(steps, envs)}: give {rows} rows of {envs} environments"
                )
    if rollout.final_index is not None:
        map_tree(_check_final, rollout.final_observations, rollout.observations)


def _check_final(final: Any, observations: Any) -> None:
    if np.shape(final)[1:] != np.shape(observations)[2:]:
        raise UserError(
            f"final_observations of a rollout have shape {np.shape(final)}, and its observations "
            f"{np.shape(observations)}: give rows of {np.shape(observations)[2:]}"
        )


def check_images(observations: Tree, depth: int) -> list[np.ndarray]:
    """The leaves of observations `[T, N, ...]` that have the form of images of `depth` frames.

    Raises:
        UserError: None has.
    """
    leaves: list[np.ndarray] = tree_leaves(observations)
    stacks = [leaf for leaf in leaves if is_stack(leaf, depth)]
    if not stacks:
        raise UserError(
            f"frame_stack {depth} needs images [{depth}, height, width], but observations are "
            f"{', '.join(str(list(leaf.shape[2:])) for leaf in leaves)}: leave frame_stack away, "
            "or stack frames with gymnasium's FrameStackObservation"
        )
    return stacks


def check_stacks(observations: Tree, ends: np.ndarray, depth: int) -> None:
    """Looks whether observations are stacks of frames, newest last.

    Args:
        observations: `[T + 1, N, ...]`.
        ends: `[N, T]`, how each step ended.
        depth: Frames in a stack.

    Raises:
        UserError: No leaf is a stack, or stacks never continue the ones before.
    """
    stacks = check_images(observations, depth)
    within = ends.T == GOES_ON
    if within.any() and not any(continues(stack)[within].any() for stack in stacks):
        raise UserError(
            f"frame_stack {depth} was asked for, but no observation [{depth}, height, width] "
            "repeats the newer frames of the one before it: leave frame_stack away"
        )


def check_kind(given: Tree, before: Tree) -> None:
    """Raises UserError if observations and actions are of other types or shapes than before."""
    if map_tree(_kind, given) != map_tree(_kind, before):
        now, then = (map_tree(_told, tree) for tree in (given, before))
        raise UserError(
            f"the rollout's observations and actions are {now}, and those before were {then}: a "
            "replay keeps one kind"
        )


def _kind(rows: np.ndarray) -> tuple[np.dtype, tuple[int, ...]]:
    return rows.dtype, rows.shape[2:]


def _told(rows: np.ndarray) -> str:  # slow, as names of types are
    return f"{rows.dtype}{list(rows.shape[2:])}"
