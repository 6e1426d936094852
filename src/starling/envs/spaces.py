"""Nested spaces as a flat list of leaves, and the batches of arrays that belong to them.

A leaf is a Box, Discrete, MultiDiscrete or MultiBinary; Dict and Tuple nest them in any depth.
Leaves come in the order of the space, which is Gymnasium's order for its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from starling.errors import UserError

# Asked for before Dict and Tuple, because `isinstance` of those is ten times slower.
_LEAVES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class Leaf(NamedTuple):
    """One array of a nested space.

    Attributes:
        path: Keys and positions that lead to it, () for a space that is not nested.
        space: The Box, Discrete, MultiDiscrete or MultiBinary there.
        shape: Shape of one sample, () for Discrete.
        dtype: Its native dtype.
    """

    path: tuple[str | int, ...]
    space: spaces.Space
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def name(self) -> str:
        """The path in one word, such as `camera/0`; empty where the space is not nested."""
        return "/".join(map(str, self.path))


def leaves(space: spaces.Space, path: tuple[str | int, ...] = ()) -> list[Leaf]:
    """Lists the leaves of a space.

    Raises:
        UserError: A space that has no fixed-size array form, such as Graph, Text or Sequence.
    """
    if isinstance(space, _LEAVES):
        assert space.shape is not None
        return [Leaf(path, space, tuple(space.shape), np.dtype(space.dtype))]
    if isinstance(space, spaces.Dict):
        return [leaf for key, sub in space.spaces.items() for leaf in leaves(sub, (*path, key))]
    if isinstance(space, spaces.Tuple):
        return [leaf for i, sub in enumerate(space.spaces) for leaf in leaves(sub, (*path, i))]
    where = f" at {'/'.join(map(str, path))!r}" if path else ""
    raise UserError(
        f"the space {type(space).__name__}{where} has no array of fixed size; wrap the environment "
        "so that it uses Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple there "
        "(a Sequence, for instance, becomes a padded Box and a mask)"
    )


def check_same(kind: str, space: spaces.Space, first: spaces.Space, index: int) -> None:
    """Refuses an environment's space that is not the first one's.

    Args:
        kind: `observation_space` or `action_space`.
        space: The environment's.
        first: That of the first environment.
        index: Of the environment.

    Raises:
        UserError: They differ, or bounds are NaN, which differ from themselves.
    """
    if space == first:
        return
    for leaf in leaves(space):
        name = f"{kind} {leaf.name!r}" if leaf.path else kind
        if isinstance(leaf.space, spaces.Box) and (wrong := wrong_bounds(name, leaf.space)):
            raise UserError(f"environment {index}: {wrong}")
    raise UserError(
        f"all environments need the same {kind}: environment {index} has {space}, the first of "
        f"them {first}"
    )


def wrong_bounds(name: str, space: spaces.Box) -> str | None:
    """What is wrong with the bounds of a space, in a sentence; None if nothing is."""
    low, high = np.asarray(space.low), np.asarray(space.high)
    if low.dtype.kind not in "biuf" or high.dtype.kind not in "biuf":
        return f"{name} has bounds of {low.dtype}, which are no numbers"
    wrong = np.flatnonzero(~(low <= high))  # NaN included
    if not len(wrong):
        return None
    i = wrong[0]
    return (
        f"{name} has low {low.flat[i]} and high {high.flat[i]} at position {i}; "
        "low must be at most high, and neither may be NaN"
    )


def flatten(space: spaces.Space, value: Any) -> list[Any]:
    """Lists the leaf values of one sample or of one batch, in the order of `leaves`."""
    return flattener(space)(value)


def flattener(space: spaces.Space) -> Callable[[Any], list[Any]]:
    """`flatten` for one space, made once to be used often."""
    if isinstance(space, _LEAVES):
        return lambda value: [value]
    if isinstance(space, spaces.Dict):
        if all(isinstance(sub, _LEAVES) for sub in space.spaces.values()):
            keys = list(space.spaces)
            return lambda value: [value[key] for key in keys]
        items = [(key, flattener(sub)) for key, sub in space.spaces.items()]
        return lambda value: [x for key, inner in items for x in inner(value[key])]
    assert isinstance(space, spaces.Tuple)
    inners = [flattener(sub) for sub in space.spaces]
    return lambda value: [x for inner, part in zip(inners, value, strict=True) for x in inner(part)]


def unflatten(space: spaces.Space, values: Sequence[Any]) -> Any:
    """The inverse of `flatten`."""
    return _build(space, iter(values))


def _build(space: spaces.Space, values: Iterator[Any]) -> Any:
    if isinstance(space, _LEAVES):
        return next(values)
    if isinstance(space, spaces.Dict):
        return {key: _build(sub, values) for key, sub in space.spaces.items()}
    assert isinstance(space, spaces.Tuple)
    return tuple(_build(sub, values) for sub in space.spaces)


def zeros(space: spaces.Space, n: int) -> Any:
    """A batch of n zeros: arrays `[n, ...]`, nested as the space is."""
    return unflatten(space, [np.zeros((n, *leaf.shape), leaf.dtype) for leaf in leaves(space)])


def samples(space: spaces.Space, batch: Any) -> list[Any]:
    """Takes a batch apart, into what a single environment's `step` expects.

    Returns:
        n samples, copied: a NumPy integer for Discrete, an array for other leaves.
    """
    if isinstance(space, spaces.Discrete):
        return list(batch)
    if isinstance(space, _LEAVES):
        batch = batch.copy()
        return [batch[i, ...] for i in range(len(batch))] if batch.ndim == 1 else list(batch)
    if isinstance(space, spaces.Dict):
        columns = [samples(sub, batch[key]) for key, sub in space.spaces.items()]
        return [dict(zip(space.spaces, row, strict=True)) for row in zip(*columns, strict=True)]
    assert isinstance(space, spaces.Tuple)
    columns = [samples(sub, batch[i]) for i, sub in enumerate(space.spaces)]
    return list(zip(*columns, strict=True))


def select(space: spaces.Space, batch: Any, index: Any) -> Any:
    """Takes the rows of a batch that a slice, a mask or an array of indices names."""
    return unflatten(space, [array[index] for array in flatten(space, batch)])


def store_batch(space: spaces.Space, batch: Any, out: Sequence[np.ndarray], what: str) -> None:
    """Copies a batch that a user gave into one array per leaf, in the dtype of the space.

    Args:
        space: Space of one row.
        batch: Rows, nested as the space is; lists will do in place of arrays.
        out: One array `[n, ...]` per leaf.
        what: What the batch is, for the message.

    Raises:
        UserError: The nesting, a shape or a value does not fit.
    """
    try:
        values = flatten(space, batch)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{what} must be nested like {space}: {error!r}") from None
    for leaf, value, array in zip(leaves(space), values, out, strict=True):
        name = f"{what} {leaf.name!r}" if leaf.path else what
        given = np.asarray(value)
        if given.shape != array.shape:
            raise UserError(f"{name}: shape {given.shape} given, {array.shape} expected")
        if np.can_cast(given.dtype, array.dtype):  # nothing can be lost
            array[...] = given
        else:
            array[...] = cast(given, array.dtype, name)


def choice_counts(space: spaces.Space) -> list[int]:
    """How many values each discrete choice of an action has, in the order of a mask."""
    counts: list[int] = []
    for leaf in leaves(space):
        if isinstance(leaf.space, spaces.Discrete):
            counts.append(int(leaf.space.n))
        elif isinstance(leaf.space, spaces.MultiDiscrete):
            counts += leaf.space.nvec.ravel().tolist()
    return counts


def allowed_actions(
    space: spaces.Discrete | spaces.MultiDiscrete, masks: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Random actions `[..., *space.shape]` out of those that `masks` allow.

    Args:
        space: Space of one action.
        masks: `[..., K]`, not 0 where a choice is allowed, as in `infos["action_mask"]`.
        generator: Where they are drawn from.
    """
    counts = choice_counts(space)
    chosen = [
        ((1.0 - generator.random(part.shape)) * (part != 0)).argmax(-1)
        for part in np.split(masks, np.cumsum(counts)[:-1], axis=-1)
    ]
    actions = np.stack(chosen, -1).reshape((*masks.shape[:-1], *(space.shape or ())))
    return actions.astype(space.dtype)[()] + space.start


def flat_mask(space: spaces.Space, given: Any, choices: int) -> np.ndarray:
    """Brings `info["action_mask"]` into one form: bool `[choices]`.

    Args:
        space: Space of one action.
        given: One array, or one for each discrete part of the action, nested or in a list.
        choices: How many there are in all parts together.

    Raises:
        ValueError: There are more of them, or fewer.
    """
    if isinstance(given, dict | tuple | list):
        parts = flatten(space, given) if isinstance(given, dict) else given
        given = np.concatenate([np.ravel(part) for part in parts])
    given = np.ravel(given)
    if given.shape != (choices,):
        raise ValueError(
            f'info["action_mask"]: {given.size} values given, {choices} expected, one for each '
            f"choice in {space}"
        )
    return given != 0


def cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Converts an array, refusing to lose more than floating-point precision.

    Raises:
        UserError: A value overflows, or has no counterpart in `dtype`.
    """
    if value.dtype.kind not in "biuf":
        raise UserError(f"{name}: {value.dtype} given, which does not convert to {dtype}")
    with np.errstate(all="ignore"):
        result = value.astype(dtype)
    lost = result != value
    if dtype.kind == "f":
        lost = np.isfinite(value) & ~np.isfinite(result)
    if np.any(lost):
        raise UserError(f"{name}: {value[lost].flat[0]!r} does not fit into {dtype}")
    return result
