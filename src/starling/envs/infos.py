"""Infos of single environments, merged into the dictionary of arrays that Gymnasium defines."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from starling.envs.messages import Infos
from starling.envs.spaces import samples, select, unflatten


def merge_infos(infos: Sequence[tuple[int, dict[str, Any]]], n: int) -> dict[str, Any]:
    """Merges infos as `gymnasium.vector.VectorEnv` does.

    Every key holds an array `[n, ...]` (a dictionary of them where the value is one), and the
    key with an underscore before it a bool `[n]` that is true where an environment had it.
    Values that do not go into one array, such as arrays of different shapes, are kept in an
    object array.

    Args:
        infos: Rows and their infos.
        n: Number of rows.
    """
    columns: dict[str, list[tuple[int, Any]]] = {}
    for i, info in infos:
        for key, value in info.items():
            columns.setdefault(key, []).append((i, value))
    merged: dict[str, Any] = {}
    for key, column in columns.items():
        if all(isinstance(value, dict) for _, value in column):
            merged[key] = merge_infos(column, n)
        else:
            merged[key] = _merge_values(column, n)
        present = np.zeros(n, np.bool_)
        present[[i for i, _ in column]] = True
        merged[f"_{key}"] = present
    return merged


def joined_infos(parts: Sequence[Infos | None], sizes: Sequence[int], n: int) -> dict[str, Any]:
    """Merges what several shards say of their environments.

    Args:
        parts: Of each shard.
        sizes: Environments in each shard.
        n: Environments in all.
    """
    current, final, offset = [], [], 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            current += [(offset + i, info) for i, info in part.current]
            final += [(offset + i, info) for i, info in part.final]
        offset += size
    infos = merge_infos(current, n)
    if final:
        infos["final_info"] = merge_infos(final, n)
        infos["_final_info"] = mask = np.zeros(n, np.bool_)
        mask[[i for i, _ in final]] = True
    return infos


def warn_of_conversions(told: dict[str, bool]) -> None:
    """Warns of types of observations that were converted, unless that was told; marks it as told.

    To be called where there are no results that an error, made from the warning, would cost.
    """
    for conversion, done in told.items():
        if not done:
            told[conversion] = True
            warnings.warn(conversion, stacklevel=2)


def _merge_values(column: list[tuple[int, Any]], n: int) -> np.ndarray:
    kinds = {type(value) for _, value in column}
    first = column[0][1]
    array = np.full(n, None, dtype=object)
    if len(kinds) == 1 and isinstance(first, bool | int | float | np.number | np.bool_):
        array = np.zeros(n, dtype=type(first))
    elif kinds == {np.ndarray} and len({(v.shape, v.dtype) for _, v in column}) == 1:
        array = np.zeros((n, *first.shape), dtype=first.dtype)
    for i, value in column:
        array[i] = value
    return array


def add_final_observations(
    infos: dict[str, Any], space: spaces.Space, finals: Sequence[np.ndarray], ended: np.ndarray
) -> None:
    """Adds `final_obs` and `final_info` of episodes that ended, with their masks, to `infos`.

    Args:
        infos: The dictionary to add to; a `final_info` that is there stays.
        space: Space of one observation.
        finals: One array `[n, ...]` per leaf, whose rows `ended` are final observations.
        ended: Rows where an episode ended.
    """
    n = len(finals[0])
    mask = np.zeros(n, np.bool_)
    mask[ended] = True
    observations = np.full(n, None, dtype=object)
    rows = samples(space, select(space, unflatten(space, finals), ended))
    for i, observation in zip(ended, rows, strict=True):
        observations[i] = observation
    infos["final_obs"], infos["_final_obs"] = observations, mask
    infos.setdefault("final_info", {})
    infos["_final_info"] = mask.copy()
