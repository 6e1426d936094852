"""What an environment observes, checked and copied into a row of one array per leaf."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from gymnasium import spaces

from starling.envs.spaces import Leaf, cast, flattener, leaves


class ObservationWriter:
    """Copies the observations of environments that share a space.

    Args:
        space: Of one observation.
        saturate: What a type cannot hold becomes infinite, or the nearest integer, instead of an
            error: somebody else looks for such values.

    Attributes:
        leaves: Of the space.
    """

    def __init__(self, space: spaces.Space, saturate: bool = False):
        self.leaves = leaves(space)
        self._space = space
        self._flatten = flattener(space)
        self._saturate = saturate
        self._converted: set[tuple[str, np.dtype]] = set()
        self._untold: list[str] = []

    def conversions(self) -> list[str]:
        """Which types had to be converted, each said once and never again."""
        if not self._untold:  # as in nearly all steps
            return []
        told, self._untold = self._untold, []
        return told

    def write(self, arrays: list[np.ndarray], i: int, observation: Any) -> None:
        """Copies an observation into row `i` of one array `[M, ...]` per leaf.

        Raises:
            TypeError: It is nested otherwise than its space.
            ValueError: A leaf's shape or values are none of its space's type.
        """
        try:
            values = self._flatten(observation)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TypeError(
                f"the observation is not nested like {self._space}: {error!r}"
            ) from None
        for leaf, array, value in zip(self.leaves, arrays, values, strict=True):
            kind, shape = value.__class__, leaf.shape
            if (kind is int and not shape) or (
                kind is np.ndarray and value.dtype == leaf.dtype and value.shape == shape
            ):
                array[i] = value
            else:
                self._write_converted(leaf, array, i, np.asarray(value))

    def _write_converted(self, leaf: Leaf, array: np.ndarray, i: int, value: np.ndarray) -> None:
        name = f"observation {leaf.name!r}" if leaf.path else "observation"
        if value.shape != leaf.shape:
            raise ValueError(f"{name}: shape {value.shape} given, {leaf.shape} expected")
        if value.dtype != leaf.dtype:
            self._note(name, value.dtype, leaf.dtype)
        if value.dtype.kind == leaf.dtype.kind == "f":  # fast, because it is frequent
            with contextlib.suppress(FloatingPointError), np.errstate(over="raise"):
                array[i] = value
                return
        if self._saturate and value.dtype.kind in "iuf":
            array[i] = _saturated(value, leaf.dtype)
        else:
            array[i] = cast(value, leaf.dtype, name)

    def _note(self, name: str, given: np.dtype, expected: np.dtype) -> None:
        if (name, given) not in self._converted:
            self._converted.add((name, given))
            self._untold.append(
                f"{name}: {given} given where the space says {expected}; it is converted"
            )


def _saturated(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        value = np.clip(np.nan_to_num(value), limits.min, limits.max)
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(dtype)
