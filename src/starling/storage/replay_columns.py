"""What a replay keeps of each row: one array a leaf, stacked frames taken apart, and rare rows.

Slots are numbered `environment * rows_per_env + row`, so that what follows a row in time lies next
to it in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from starling.storage.rollout import Tree, map_tree, tree_leaves

PLACE_BYTES = 4  # of a slot that may have a sparse row
_IMAGE_AXES = 3  # of a stack: frames, height, width, and perhaps channels


class Column:
    """An array with a row for each slot.

    Args:
        num_envs: Environments.
        rows_per_env: Slots of each.
        like: `[T, N, ...]`, a leaf of a rollout.
    """

    def __init__(self, num_envs: int, rows_per_env: int, like: np.ndarray):
        self.rows = np.zeros((num_envs * rows_per_env, *like.shape[2:]), like.dtype)

    @staticmethod
    def row_bytes(like: np.ndarray) -> int:
        """Bytes that a slot will take."""
        return prod(like.shape[2:]) * like.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.rows.nbytes

    def put(self, slots: np.ndarray, values: np.ndarray, begun: bool = False) -> None:
        """Writes rows.

        Args:
            slots: `[N, T]`.
            values: `[T, N, ...]`.
            begun: Whether the first of the T is there already.
        """
        self.rows[slots[:, begun:]] = values[begun:].swapaxes(0, 1)

    def take(self, slots: np.ndarray) -> np.ndarray:
        """Rows `[M, ...]` of slots `[M]`."""
        return self.rows.take(slots, 0)

    def holds(self, slots: np.ndarray, values: np.ndarray) -> bool:
        """Whether slots `[N]` hold the values `[N, ...]`, bit for bit."""
        return self.rows[slots].tobytes() == values.tobytes()

    def forget(self, slots: np.ndarray) -> None:
        """Lets go of what is kept beside the rows of these slots."""

    def unreadable(self, slots: np.ndarray) -> np.ndarray | bool:
        """Which of slots `[N, M]` cannot be read, where the first of the M is the oldest row."""
        return False


class StackedColumn(Column):
    """A column of stacks of S frames, newest last, that keeps each frame once.

    A stack is the row's own frame and those of the rows before it, as long as each stack repeats
    the one before it but for its newest frame. Where one does not, as at an episode's start, its
    older frames are kept beside. Stacks are compared and not guessed from the episodes' ends, so
    that what is read is what was written whatever the padding was.

    Args:
        num_envs: Environments.
        rows_per_env: Slots of each.
        like: `[T, N, S, ...]`, a leaf of a rollout.

    Attributes:
        ages: Rows since the last break, at most S - 1, of each slot.
        breaks: The older frames of stacks that do not continue the one before.
    """

    def __init__(self, num_envs: int, rows_per_env: int, like: np.ndarray):
        super().__init__(num_envs, rows_per_env, like[:, :, 0])
        self._depth, self._rows_per_env = like.shape[2], rows_per_env
        self.ages = np.zeros(len(self.rows), np.min_scalar_type(self._depth))
        self.breaks = SparseRows(len(self.rows), like[:, :, 1:])

    @staticmethod
    def row_bytes(like: np.ndarray) -> int:
        """Bytes that a slot will take, stacks kept whole apart."""
        return prod(like.shape[3:]) * like.dtype.itemsize + 1 + PLACE_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.rows.nbytes + self.ages.nbytes + self.breaks.nbytes

    def put(self, slots: np.ndarray, values: np.ndarray, begun: bool = False) -> None:
        """Writes rows; arguments as for a plain column."""
        broken = np.ones(slots.shape, np.bool_)
        broken[:, 1:] = ~continues(values).T
        broken[:, 0] = not begun
        steps = np.arange(slots.shape[1])
        last = np.maximum.accumulate(np.where(broken, steps, -1), 1)
        before = self.ages[slots[:, :1]].astype(np.int64)
        ages = np.where(last < 0, before + steps, steps - last)
        self.ages[slots] = np.minimum(ages, self._depth - 1)
        self.breaks.put(slots[broken], values.swapaxes(0, 1)[broken][:, :-1])
        super().put(slots, values[:, :, -1], begun)

    def take(self, slots: np.ndarray) -> np.ndarray:
        """Stacks `[M, S, ...]` of slots `[M]`."""
        offsets = np.arange(1 - self._depth, 1)
        row = slots % self._rows_per_env
        rows = (slots - row)[:, None] + (row[:, None] + offsets) % self._rows_per_env
        stacks = self.rows[rows]
        ages = self.ages[slots]
        which, frame = np.nonzero(-offsets > ages[:, None])  # from before the break
        if len(which):
            age = ages[which]
            broken = rows[which, self._depth - 1 - age]
            stacks[which, frame] = self.breaks.rows[self.breaks.places[broken], frame + age]
        return stacks

    def holds(self, slots: np.ndarray, values: np.ndarray) -> bool:
        """Whether slots `[N]` hold the newest frames of `[N, S, ...]`, bit for bit."""
        return super().holds(slots, values[:, -1])

    def forget(self, slots: np.ndarray) -> None:
        """Lets go of older frames that are kept beside."""
        self.breaks.drop(slots)

    def unreadable(self, slots: np.ndarray) -> np.ndarray:
        """Which of slots `[N, M]` need frames older than the oldest row, the first of the M."""
        return self.ages[slots] > np.arange(slots.shape[1])


def continues(stacks: np.ndarray) -> np.ndarray:
    """Where a stack's older frames are the newer ones of the stack before, bit for bit.

    Args:
        stacks: `[T, N, S, ...]`.

    Returns:
        `[T - 1, N]`.
    """
    frames = np.ascontiguousarray(stacks).reshape(*stacks.shape[:3], -1)
    words = np.uint64 if frames.shape[-1] * frames.itemsize % 8 == 0 else np.uint8
    frames = frames.view(words)
    return (frames[1:, :, :-1] == frames[:-1, :, 1:]).all((2, 3))


def column_kinds(observations: Tree, depth: int | None) -> Tree:
    """The class of column for each leaf `[T, N, ...]`: stacked for images of `depth` frames."""
    return map_tree(
        lambda x: StackedColumn if depth and is_stack(x, depth) else Column, observations
    )


def is_stack(leaf: np.ndarray, depth: int) -> bool:
    """Whether a leaf `[T, N, ...]` has the form of images of `depth` frames."""
    return is_image(leaf) and leaf.shape[2] == depth


def is_image(leaf: np.ndarray) -> bool:
    """Whether a leaf `[T, N, ...]` may be images, of several frames or channels."""
    return leaf.ndim - 2 >= _IMAGE_AXES


class SparseRows:
    """Rows that few slots have, kept in as much memory as there were ever such rows at once.

    Args:
        num_slots: Slots that may have one.
        like: `[T, N, ...]` or a tree of these, leaves of a rollout.

    Attributes:
        places: Where in `rows` a slot's row is; -1 without.
        rows: `[K, ...]` or a tree of these.
    """

    def __init__(self, num_slots: int, like: Tree):
        self.places = np.full(num_slots, -1, np.int32)
        self.rows = map_tree(lambda x: np.zeros((0, *x.shape[2:]), x.dtype), like)
        self._free = np.zeros(0, np.int32)
        self._size = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.places.nbytes + sum(rows.nbytes for rows in tree_leaves(self.rows))

    def put(self, slots: np.ndarray, values: Tree) -> None:
        """Gives slots `[M]`, which have none, the rows `[M, ...]`."""
        if len(slots) > len(self._free):
            self._grow(len(slots) - len(self._free))
        places, self._free = self._free[: len(slots)], self._free[len(slots) :]
        self.places[slots] = places
        map_tree(lambda rows, x: rows.__setitem__(places, x), self.rows, values)

    def take(self, slots: np.ndarray) -> Tree:
        """Rows `[M, ...]` of slots `[M]` that have one."""
        places = self.places[slots]
        return map_tree(lambda rows: rows[places], self.rows)

    def drop(self, slots: np.ndarray) -> None:
        """Frees the rows of those slots that have one."""
        places = self.places[slots].ravel()
        self._free = np.concatenate([places[places >= 0], self._free])
        self.places[slots] = -1

    def state(self) -> dict[str, np.ndarray]:
        """Its contents as a flat group of arrays."""
        slots = np.flatnonzero(self.places >= 0)
        leaves = {str(i): leaf for i, leaf in enumerate(tree_leaves(self.take(slots)))}
        return {"slots": slots, **leaves}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state` gave; it must be empty."""
        leaves = iter([state[name] for name in self.state() if name != "slots"])
        self.put(state["slots"], map_tree(lambda _: next(leaves), self.rows))

    def _grow(self, by: int) -> None:
        more = max(by, self._size)  # twice as many, so that growing costs little in the long run
        self._free = np.concatenate([self._free, np.arange(self._size, self._size + more)])
        self._free = self._free.astype(np.int32)
        self._size += more
        self.rows = map_tree(
            lambda x: np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)]), self.rows
        )
