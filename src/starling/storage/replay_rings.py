"""The transitions of a replay: a ring of rows for each environment, and what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from starling.errors import UserError
from starling.storage.batch import Batch
from starling.storage.n_step import (
    GOES_ON,
    NO_EXPERIENCE,
    TERMINATED,
    TRUNCATED,
    TRUNCATED_ASIDE,
    bears_no_mask,
    ends_of,
    final_rows,
    n_step_returns,
)
from starling.storage.replay_checks import (
    check_capacity,
    check_envs,
    check_images,
    check_kind,
    check_memory,
    check_shapes,
    check_stacks,
)
from starling.storage.replay_columns import (
    PLACE_BYTES,
    Column,
    SparseRows,
    StackedColumn,
    column_kinds,
    is_image,
)
from starling.storage.rollout import Rollout, Tree, map_tree, tree_leaves
from starling.storage.trees import pack_tree, unpack_tree


class Change(NamedTuple):
    """What adding rows did.

    Attributes:
        retired: Slots whose transitions can be sampled no more.
        complete: Slots whose transitions can be sampled from now on; a slot may be in both.
        fresh: `[N, W]`, which of the newest W rows `complete` are, in the same order.
    """

    retired: np.ndarray
    complete: np.ndarray
    fresh: np.ndarray


class Rings:
    """Rows of N environments, the newest `capacity`, in arrays made at the first rollout.

    Row t of an environment is its t-th step ever, with the observation before it; what the step led
    to is the observation of row t + 1. The row at the head has an observation only. A transition's
    index is row * N + environment, so that no two ever have the same.

    Args:
        capacity: Rows to keep, of all environments together.
        num_envs: N.
        n_step: Rewards that are summed, at most.
        gamma: Discount.
        frame_stack: Frames in a stack; None if images are no stacks.
        bytes_beside: Bytes a row that its owner will take as well.

    Attributes:
        rows_per_env: Rows of a ring.
        num_slots: Rows of all rings.
        lengths: `[num_slots]`, how many steps the transition in a slot sums; 0 where there is none
            that can be sampled.
        filled: Rows of a ring that have ever been written, at most.
        heads: `[N]`, numbers of the rows at the heads.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        n_step: int,
        gamma: float,
        frame_stack: int | None,
        bytes_beside: int,
    ):
        self.capacity, self.num_envs = capacity, num_envs
        self.n_step, self.gamma, self.frame_stack = n_step, gamma, frame_stack
        check_capacity(capacity, num_envs, 1, n_step, frame_stack)
        self.rows_per_env = capacity // num_envs + 1  # one for the head
        self.num_slots = num_envs * self.rows_per_env
        self.filled = 0
        self.heads = np.zeros(num_envs, np.int64)
        self._begun = np.zeros(num_envs, np.bool_)  # whether the head has its observation
        self._bytes_beside = bytes_beside
        self._length_type = np.min_scalar_type(n_step)
        self._discounts = (gamma ** np.arange(n_step + 1)).astype(np.float32)
        self._like: Tree = None  # observations and actions of no rows
        self._masks: Column | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        if self._like is None:
            return 0
        parts: list[Any] = [self.lengths, self.ends, self.rewards, self._returns, self._finals]
        parts += tree_leaves((self.observations, self.actions))
        if self._masks is not None:
            parts.append(self._masks)
        return sum(part.nbytes for part in parts)

    # ---- adding

    def add(self, rollout: Rollout, first_env: int) -> Change:
        """Copies a rollout in; arguments and errors as for `Replay.add`."""
        observations = map_tree(np.asarray, rollout.observations)
        actions = map_tree(np.asarray, rollout.actions)
        rollout = rollout._replace(observations=observations, actions=actions)
        self._check(rollout, first_env)
        ends = ends_of(rollout)
        finals, final_at = final_rows(rollout, ends)
        block = slice(first_env, first_env + len(ends))
        head, begun = self._position(block)
        if self._like is None:
            if self.frame_stack:
                check_stacks(observations, ends, self.frame_stack)
            if (masks := rollout.action_masks) is not None:
                self.check_memory(observations, (actions, np.asarray(masks, np.bool_)))
            self._allocate(observations, actions)
        slots = self._slots(block, head, ends.shape[1] + 1)
        if begun and not self._continues(slots[:, 0], observations):
            raise UserError(
                f"the rollout of environments {block.start} to {block.stop - 1} does not begin as "
                "the one before ended, with those observations: call cut() if they were reset in "
                "between, or resume with exact_resume False if seeds do not bring them back"
            )
        retired = self._forget(slots[:, begun:])
        rows = slots[:, :-1]
        map_tree(lambda column, x: column.put(slots, x, begun), self.observations, observations)
        map_tree(lambda column, x: column.put(rows, x), self.actions, actions)
        self._put_masks(rows, rollout.action_masks)
        if finals is not None:
            self._finals.put(rows[final_at], finals)
        self.rewards[rows] = np.asarray(rollout.rewards, np.float32).T
        self._begun[block] = True
        return self._append(block, rows, ends, retired)

    def cut(self, first_env: int, num_envs: int) -> Change | None:
        """Ends the episodes under way; None where environments have just begun anyway."""
        block = slice(first_env, first_env + num_envs)
        head, begun = self._position(block)
        if not begun:
            return None
        # The row that has only an observation becomes one that is no experience.
        slots = self._slots(block, head, 2)
        rows = slots[:, :1]
        retired = self._forget(slots[:, 1:])
        self.rewards[rows] = 0.0
        self._put_masks(rows, None)
        self._begun[block] = False
        return self._append(block, rows, np.full(rows.shape, NO_EXPERIENCE, np.uint8), retired)

    def _check(self, rollout: Rollout, first_env: int) -> None:
        check_shapes(rollout)
        steps, envs = np.shape(rollout.rewards)
        check_envs(first_env, envs, self.num_envs)
        check_capacity(self.capacity, self.num_envs, steps, self.n_step, self.frame_stack)
        if self._like is not None:
            check_kind((rollout.observations, rollout.actions), self._like)

    def _position(self, block: slice) -> tuple[int, bool]:
        heads, begun = self.heads[block], self._begun[block]
        if (heads != heads[0]).any() or (begun != begun[0]).any():
            raise UserError(
                f"environments {block.start} to {block.stop - 1} have not come together so far: "
                "add the rollouts of the same ones together each time"
            )
        return int(heads[0]), bool(begun[0])

    def _slots(self, block: slice, row: int, count: int) -> np.ndarray:
        """Slots `[N, count]` of rows that follow one another."""
        envs = np.arange(block.start, block.stop)[:, None]
        return envs * self.rows_per_env + np.arange(row, row + count) % self.rows_per_env

    def check_memory(self, observations: Tree, actions: Tree, available: int | None = None) -> Tree:
        """Looks whether there is memory for such rows `[T, N, ...]`; returns kinds of columns."""
        if self.frame_stack:
            check_images(observations, self.frame_stack)
        like = observations, actions
        kinds = column_kinds(observations, self.frame_stack), map_tree(lambda _: Column, actions)
        sizes = [self._bytes_beside, np.dtype(self._length_type).itemsize, 10, PLACE_BYTES]
        sizes += tree_leaves(map_tree(lambda x, kind: kind.row_bytes(x), like, kinds))
        images = not self.frame_stack and any(map(is_image, tree_leaves(observations)))
        check_memory(self.capacity, self.num_envs, sum(sizes), images, available)
        return kinds

    def _allocate(self, observations: Tree, actions: Tree) -> None:
        slots, like = self.num_slots, (observations, actions)
        kinds = self.check_memory(observations, actions)
        self.observations, self.actions = map_tree(
            lambda x, kind: kind(self.num_envs, self.rows_per_env, x), like, kinds
        )
        self.rewards, self._returns = (np.zeros(slots, np.float32) for _ in range(2))
        self.ends = np.zeros(slots, np.uint8)
        self.lengths = np.zeros(slots, self._length_type)
        self._finals = SparseRows(slots, observations)
        self._like = map_tree(lambda x: np.empty((0, 0, *x.shape[2:]), x.dtype), like)

    def _continues(self, slots: np.ndarray, observations: Tree) -> bool:
        columns = self.observations
        held = map_tree(lambda column, x: column.holds(slots, x[0]), columns, observations)
        return all(tree_leaves(held))

    def _forget(self, slots: np.ndarray) -> np.ndarray:
        """Lets go of the rows in slots that will be written over; returns what it retired."""
        retired = self._retire(slots)
        if (self.ends[slots] == TRUNCATED_ASIDE).any():
            self._finals.drop(slots)
        for column in tree_leaves(self.observations):
            column.forget(slots)
        self.ends[slots] = GOES_ON
        return retired

    def _retire(self, slots: np.ndarray) -> np.ndarray:
        live = slots[self.lengths[slots] > 0]
        self.lengths[live] = 0
        return live

    def _put_masks(self, slots: np.ndarray, masks: Any) -> None:
        if masks is not None and self._masks is None:
            self._masks = Column(self.num_envs, self.rows_per_env, np.asarray(masks, np.bool_))
            self._masks.rows[:] = True
        if self._masks is not None and masks is None:
            self._masks.rows[slots] = True
        elif self._masks is not None:
            self._masks.put(slots, np.asarray(masks, np.bool_))

    def _append(
        self, block: slice, rows: np.ndarray, ends: np.ndarray, retired: np.ndarray
    ) -> Change:
        """Moves the heads past rows that were written, and finds what is complete with them."""
        head, steps = int(self.heads[block.start]), ends.shape[1]
        self.ends[rows] = ends
        if head:
            last = self._slots(block, head - 1, 1)[:, 0]
            lost = (self.ends[last] == GOES_ON) & (ends[:, 0] == NO_EXPERIENCE)
            self.ends[last[lost]] = TRUNCATED
        self.heads[block] += steps
        self.filled = max(self.filled, min(head + steps, self.rows_per_env))
        waiting = min(head, self.n_step)  # rows before these that may have waited for them
        window = self._slots(block, head - waiting, waiting + steps)
        ends = self.ends[window]
        returns, lengths = n_step_returns(self.rewards[window], ends, self.n_step, self.gamma)
        if self._masks is not None and self._begun[block.start]:
            # What is allowed at the head comes with the next rollout.
            last = np.arange(window.shape[1]) + lengths - 1
            known = bears_no_mask(np.take_along_axis(ends, last, 1))
            lengths[(last == window.shape[1] - 1) & ~known] = 0
        fresh = (lengths > 0) & (self.lengths[window] == 0)
        complete = window[fresh]
        self.lengths[complete], self._returns[complete] = lengths[fresh], returns[fresh]
        unreadable = self._unreadable(block)
        return Change(np.concatenate([retired, self._retire(unreadable)]), complete, fresh)

    def _unreadable(self, block: slice) -> np.ndarray:
        """Slots of rows that need frames which have been written over."""
        oldest = int(self.heads[block.start]) - self.rows_per_env + 1
        if self.frame_stack is None or oldest <= 0:
            return np.zeros(0, np.int64)
        slots = self._slots(block, oldest, self.frame_stack - 1)
        found = np.zeros(slots.shape, np.bool_)
        for column in tree_leaves(self.observations):
            found |= column.unreadable(slots)
        return slots[found]

    # ---- reading

    def read(self, slots: np.ndarray, weights: np.ndarray) -> Batch:
        """The transitions in slots `[M]`, all of which can be sampled, not yet in batches."""
        envs, rows = np.divmod(slots, self.rows_per_env)
        first, lengths = slots - rows, self.lengths.take(slots)
        beyond = rows + lengths
        last = first + (beyond - 1) % self.rows_per_env
        following = first + beyond % self.rows_per_env
        ends = self.ends.take(last)
        discounts = self._discounts.take(lengths)
        discounts[ends == TERMINATED] = 0.0
        newest = self.heads.take(envs) - 1
        return Batch(
            map_tree(lambda column: column.take(slots), self.observations),
            map_tree(lambda column: column.take(slots), self.actions),
            self._returns.take(slots),
            discounts,
            self.next_observations(last, following, ends),
            self._next_masks(following, ends),
            weights,
            (newest - (newest - rows) % self.rows_per_env) * self.num_envs + envs,
        )

    def find(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots of transitions by their indices, and which of them are still there."""
        rows, envs = np.divmod(indices, self.num_envs)
        slots = envs * self.rows_per_env + rows % self.rows_per_env
        heads = self.heads[envs]
        there = (rows > heads - self.rows_per_env) & (rows < heads)
        return slots, there & (self.lengths[slots] > 0)

    def next_observations(self, last: np.ndarray, following: np.ndarray, ends: np.ndarray) -> Tree:
        """What steps in slots `last` truly led to, where `following` are the slots after them."""
        found = map_tree(lambda column: column.take(following), self.observations)
        aside = np.flatnonzero(ends == TRUNCATED_ASIDE)
        if len(aside):
            finals = self._finals.take(last[aside])
            map_tree(lambda x, final: x.__setitem__(aside, final), found, finals)
        return found

    def _next_masks(self, following: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
        if self._masks is None:
            return None
        masks = self._masks.take(following)
        masks[bears_no_mask(ends)] = True
        return masks

    # ---- keeping it

    def state(self) -> dict[str, np.ndarray]:
        """All of it as a flat group of arrays, some of which are views."""
        if self._like is None:
            return {}
        leaves: list[np.ndarray] = []
        structure = pack_tree(self._like, leaves)
        form = [structure, [[x.dtype.str, x.shape[2:]] for x in leaves]]
        return {
            "form": np.frombuffer(json.dumps(form).encode(), np.uint8),
            "heads": self.heads,
            "begun": self._begun,
            **{name: self._used(array) for name, array in self._arrays().items()},
            **{
                f"{name}.{key}": array
                for name, rows in self._sparse().items()
                for key, array in rows.state().items()
            },
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state` gave, into rings that are empty; see `Replay.restore`."""
        if "form" not in state:
            return
        structure, leaves = json.loads(state["form"].tobytes())
        empty = [np.empty((0, 0, *shape), np.dtype(dtype)) for dtype, shape in leaves]
        self._allocate(*unpack_tree(structure, empty))
        self.heads[:], self._begun[:] = state["heads"], state["begun"]
        self.filled = min(int(self.heads.max()), self.rows_per_env)
        if "masks" in state:
            self._masks = Column(self.num_envs, self.rows_per_env, state["masks"])
        for name, array in self._arrays().items():
            self._used(array)[...] = state[name]
        for name, rows in self._sparse().items():
            rows.restore({key: state[f"{name}.{key}"] for key in rows.state()})

    def _used(self, array: np.ndarray) -> np.ndarray:
        """The part `[N, R, ...]` of an array that has been written, as a view."""
        rows = array.reshape(self.num_envs, self.rows_per_env, *array.shape[1:])
        return rows[:, : self.filled + 1]

    def _columns(self) -> dict[str, Column]:
        columns = tree_leaves((self.observations, self.actions))
        return {f"column{i}": column for i, column in enumerate(columns)}

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            "rewards": self.rewards,
            "returns": self._returns,
            "ends": self.ends,
            "lengths": self.lengths,
        }
        if self._masks is not None:
            arrays["masks"] = self._masks.rows
        for name, column in self._columns().items():
            arrays[name] = column.rows
            if isinstance(column, StackedColumn):
                arrays[f"{name}.ages"] = column.ages
        return arrays

    def _sparse(self) -> dict[str, SparseRows]:
        breaks = {
            f"{name}.breaks": column.breaks
            for name, column in self._columns().items()
            if isinstance(column, StackedColumn)
        }
        return {"finals": self._finals, **breaks}
