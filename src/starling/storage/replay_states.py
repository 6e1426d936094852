"""States of replays that share out the environments of one: joined, and taken apart.

All of them keep equally many rows of an environment. So what one replay of all environments would
save is theirs side by side, and a run can be resumed with another number of replays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

State = Mapping[str, np.ndarray]

_OF_THE_WHOLE = ("settings", "counters", "random")  # which are neither joined nor taken apart
_RINGS = ("rewards", "returns", "ends", "lengths", "masks")
_OF_ENVIRONMENTS = ("heads", "begun", "given")


def join_states(
    states: Sequence[State], num_envs: Sequence[int], rows_per_env: int
) -> dict[str, np.ndarray]:
    """What a replay of all environments would save, but for its settings, counters and random.

    Args:
        states: What `Replay.state` gave, in the order of the environments; of one that is empty
            it may be {}.
        num_envs: Environments of each.
        rows_per_env: Rows of an environment's ring.
    """
    # Of all arrays that there are: masks may not have come to all of them.
    like = {name: array for state in states if "form" in state for name, array in state.items()}
    rows = max((state["rewards"].shape[1] for state in states if "form" in state), default=0)
    first_slots = np.cumsum([0, *num_envs]) * rows_per_env
    joined = {}
    for name in like.keys() - set(_OF_THE_WHOLE):
        parts = [
            state[name] if name in state else _nothing(name, like[name], n)
            for state, n in zip(states, num_envs, strict=True)
        ]
        if name.endswith(".slots"):
            parts = [part + first for part, first in zip(parts, first_slots, strict=False)]
        elif _is_ring(name):
            parts = [_padded(part, rows, name == "masks") for part in parts]
        if name == "form":
            joined[name] = like[name]
        elif name == "largest":
            joined[name] = np.max(parts, 0)
        else:
            joined[name] = np.concatenate(parts)
    return joined


def part_of_state(state: State, first: int, num_envs: int, rows_per_env: int) -> State:
    """What a replay of some of the environments would save, but for what `join_states` leaves out.

    Args:
        state: Of a replay of all environments.
        first: The first environment of these.
        num_envs: How many there are of them.
        rows_per_env: Rows of an environment's ring.
    """
    if "form" not in state:
        return {}
    envs = slice(first, first + num_envs)
    rows = min(int(state["heads"][envs].max()), rows_per_env) + 1
    live = (state["lengths"] > 0).sum(1)
    part = {}
    for name in state.keys() - set(_OF_THE_WHOLE):
        array = state[name]
        if _is_ring(name):
            part[name] = array[envs, :rows]
        elif name in _OF_ENVIRONMENTS:
            part[name] = array[envs]
        elif name == "weights":  # of what can be sampled, one environment after the other
            part[name] = array[live[:first].sum() :][: live[envs].sum()]
        elif _is_sparse(name):
            slots = state[name[: name.rindex(".")] + ".slots"]
            ours = (slots // rows_per_env >= envs.start) & (slots // rows_per_env < envs.stop)
            part[name] = array[ours] - (first * rows_per_env if name.endswith(".slots") else 0)
        else:
            part[name] = array
    return part


def _is_ring(name: str) -> bool:
    """Whether an array is `[N, R, ...]`, with a row for each that was written."""
    return name in _RINGS or (name.startswith("column") and not _is_sparse(name))


def _is_sparse(name: str) -> bool:
    """Whether an array has rows for some slots only, or is the list of these."""
    return name.startswith("finals.") or ".breaks." in name


def _nothing(name: str, like: np.ndarray, num_envs: int) -> np.ndarray:
    """What a replay has of an array that has nothing in it."""
    if _is_ring(name):
        return np.zeros((num_envs, 0, *like.shape[2:]), like.dtype)
    if name in _OF_ENVIRONMENTS:
        return np.full((num_envs, *like.shape[1:]), np.nan if name == "given" else 0, like.dtype)
    return np.ones_like(like) if name == "largest" else like[:0]


def _padded(array: np.ndarray, rows: int, value: bool) -> np.ndarray:
    """`[N, R, ...]` with as many rows as are wanted, those that were not written all alike."""
    missing = rows - array.shape[1]
    if not missing:
        return array
    unwritten = np.full((len(array), missing, *array.shape[2:]), value, array.dtype)
    return np.concatenate([array, unwritten], 1)
