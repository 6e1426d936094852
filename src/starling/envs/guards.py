"""Guards against what would spoil a policy unseen: numbers that are none, empty masks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from starling.envs.safety import OnInvalidData, Safety
from starling.envs.spaces import Leaf, choice_counts, flatten, leaves, samples, unflatten
from starling.errors import WorkerError
from starling.flags import all_of

# Networks compute in 32 bits: a larger number would become infinite there, or another integer.
_LARGEST = float(np.finfo(np.float32).max)


def usable(values: np.ndarray) -> np.ndarray:
    """Where numbers are finite, and integers the same, in 32 bits."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "f":
        return np.isfinite(values) if size <= 4 else np.abs(values) <= _LARGEST
    if kind in "iu" and size > 4:
        return values == values.astype(np.int32 if kind == "i" else np.uint32)
    return np.ones(values.shape, np.bool_)


def _needs_a_look(leaf: Leaf) -> bool:
    return isinstance(leaf.space, spaces.Box) and (
        leaf.dtype.kind == "f" or leaf.dtype.itemsize > 4
    )


class Invalid(NamedTuple):
    """A value that nothing can be learnt from.

    Attributes:
        row: Whose it is.
        what: What it was found in, such as `observation 'camera'`.
        value: The first of them.
    """

    row: int
    what: str
    value: float


class Guard:
    """Looks through what environments gave, a batch at a time.

    Args:
        observation_space: Of one observation.
        action_space: Of one action.
        policy: `raise` an error, `replace` the values (by 0, or the nearest that the space
            allows), `truncate` the episode, or `off`.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, policy: OnInvalidData
    ):
        self.policy: OnInvalidData = policy
        self._leaves = leaves(observation_space)
        self._guarded = [k for k, leaf in enumerate(self._leaves) if _needs_a_look(leaf)]
        counts = choice_counts(action_space)
        self._groups = np.cumsum([0, *counts])[:-1]  # where each choice's own part of a mask begins

    def find(
        self, observations: Sequence[np.ndarray], rewards: np.ndarray | None = None
    ) -> list[Invalid]:
        """What is unusable, one entry for each row that has such a value; nearly always [].

        Args:
            observations: One array `[N, ...]` per leaf.
            rewards: `[N]`.
        """
        if self.policy == "off":
            return []
        fine = rewards is None or all_of(np.abs(rewards) <= _LARGEST)
        for k in self._guarded:
            fine = fine and all_of(usable(observations[k]))
        return [] if fine else self._look_closer(observations, rewards)

    def _look_closer(
        self, observations: Sequence[np.ndarray], rewards: np.ndarray | None
    ) -> list[Invalid]:
        found: dict[int, Invalid] = {}
        for k in self._guarded:
            name = (
                f"observation {self._leaves[k].name!r}" if self._leaves[k].path else "observation"
            )
            values = _flat(observations[k])
            bad = ~usable(values)
            for row in np.flatnonzero(bad.any(1)).tolist():
                found.setdefault(row, Invalid(row, name, values[row][bad[row]][0]))
        if rewards is not None:
            for row in np.flatnonzero(~(np.abs(rewards) <= _LARGEST)).tolist():
                found.setdefault(row, Invalid(row, "reward", rewards[row]))
        return list(found.values())

    def replace(
        self, observations: Sequence[np.ndarray], rewards: np.ndarray | None, row: int
    ) -> None:
        """Replaces what is unusable in a row, in place."""
        for k in self._guarded:
            space, values = self._leaves[k].space, observations[k][row, ...]
            assert isinstance(space, spaces.Box)
            bad = ~usable(values)
            signs = np.nan_to_num(values[bad], nan=0.0, posinf=np.inf, neginf=-np.inf)
            nearest = np.clip(signs, space.low[bad], space.high[bad])
            values[bad] = np.where(usable(nearest), nearest, 0)
        if rewards is not None and not abs(rewards[row]) <= _LARGEST:
            rewards[row] = 0.0

    def check_masks(self, masks: np.ndarray) -> int | None:
        """The first row `[N, choices]` that allows no choice at all, or None."""
        if len(self._groups) == 1:
            allowed = masks.any(1)
        else:
            allowed = np.logical_or.reduceat(masks, self._groups, axis=1).all(1)
        return None if allowed.all() else int(np.flatnonzero(~allowed)[0])


class OwnGuard(Guard):
    """The guard of a backend whose environments this process steps, all of them in one call.

    Args:
        observation_space: Of one observation.
        action_space: Of one action.
        safety: What to do; and the index in the run of the first environment.
        num_envs: N.

    Attributes:
        steps: That each environment has made, int64 `[N]`; counted by the backend.
        seeds: What the last seeded reset was given: a seed for each, one for all, or None.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        safety: Safety,
        num_envs: int,
    ):
        super().__init__(observation_space, action_space, safety.on_invalid_data)
        self._space = observation_space
        self._first = safety.first_env
        self.steps = np.zeros(num_envs, np.int64)
        self.seeds: Sequence[int | None] | int | None = None

    def enforce(
        self,
        observations: Sequence[np.ndarray],
        rewards: np.ndarray | None,
        masks: np.ndarray | None,
        faults: Counter[str],
        indices: Sequence[int] | np.ndarray | None = None,
        others: str = "replace or off",
    ) -> None:
        """Raises for what is unusable, or replaces it in place, and raises for empty masks.

        Args:
            observations: One array `[B, ...]` per leaf.
            rewards: `[B]`, or None.
            masks: bool `[B, choices]`, or None.
            faults: Counters to add to.
            indices: Whose the rows are; environments 0 to B - 1 if None.
            others: What `on_invalid_data` can be here besides `raise`.
        """
        for invalid in self.find(observations, rewards):
            faults["invalid_data"] += 1
            if self.policy != "replace":
                env = _index(invalid.row, indices)
                raise invalid_error(invalid, self._first + env, others, **self._where(env))
            self.replace(observations, rewards, invalid.row)
        row = None if masks is None else self.check_masks(masks)
        if row is not None:
            env = _index(row, indices)
            raise masked_error(self._first + env, **self._where(env))

    def enforce_finals(
        self,
        infos: dict[str, Any],
        cut: np.ndarray,
        faults: Counter[str],
        indices: Sequence[int] | np.ndarray | None = None,
        others: str = "replace or off",
    ) -> None:
        """The same for the last observations of episodes that were cut off: these are learnt from.

        Args:
            infos: With `final_obs`, `[B]`.
            cut: bool `[B]`, truncated and not terminated.
            faults: This and the following as for `enforce`.
            indices: See there.
            others: See there.
        """
        finals = infos["final_obs"]
        for row in np.flatnonzero(cut).tolist():
            arrays = [np.array(value)[None] for value in flatten(self._space, finals[row])]
            self.enforce(arrays, None, None, faults, [_index(row, indices)], others)
            if self.policy == "replace":
                finals[row] = samples(self._space, unflatten(self._space, arrays))[0]

    def _where(self, env: int) -> dict[str, int | None]:
        seeds: Any = self.seeds
        seed = seeds[env] if np.ndim(seeds) else seeds
        return {
            "pid": os.getpid(),
            "seed": None if seed is None else int(seed),
            "step": int(self.steps[env]),
        }


def invalid_error(invalid: Invalid, index: int, others: str, /, **where: Any) -> WorkerError:
    """The error that says which environment gave what, and what can be done.

    Args:
        invalid: What was found.
        index: Of the environment.
        others: What can be done instead, by names of `on_invalid_data`.
        **where: What `WorkerError` is told besides, if it is known: pid, seed, step.
    """
    large = ", more than 32 bits can hold" if np.isfinite(invalid.value) else ""
    return WorkerError(
        f"environment {index} gave {invalid.value} as its {invalid.what}{large}{_told(where)}: "
        "mend the environment (`starling check` looks for more), or set on_invalid_data to "
        f"{others}",
        env_index=index,
        **where,
    )


def masked_error(index: int, **where: Any) -> WorkerError:
    """The error of an environment that allows no action; arguments as for `invalid_error`."""
    return WorkerError(
        f"environment {index} gave an action mask that allows nothing{_told(where)}: allow at "
        "least one choice, or end the episode",
        env_index=index,
        **where,
    )


def _told(where: dict[str, Any]) -> str:
    facts = [f"{name} {value}" for name, value in where.items()]
    return f" (worker {', '.join(facts)})" if facts else ""


def _index(row: int, indices: Sequence[int] | np.ndarray | None) -> int:
    return row if indices is None else int(indices[row])


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)
