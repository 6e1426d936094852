"""The block of memory through which environments and their caller exchange steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from starling.envs.spaces import Leaf, choice_counts

# Columns of `Buffers.progress`, a row per worker. A row fills a cache line of its own.
SEQUENCE = 0  # request whose results lie in the buffers; negative while they are being written
ENVIRONMENT = 1  # index, within the worker, of the environment that is being stepped or reset
STEPS = 2  # steps made since the worker started
BUSY = 3  # nanoseconds that it has spent stepping
_PROGRESS_COLUMNS = 8

NO_SEED = -1
_ALIGNMENT = 64


@dataclass(frozen=True)
class Buffers:
    """Arrays for N environments in W workers, all in one block of memory.

    Attributes:
        actions: What to do next, one array `[N, ...]` per leaf of the action space.
        observations: What was seen, one array `[N, ...]` per leaf of the observation space.
        final_observations: The last observation of an episode, written where one ended.
        rewards: float64 `[N]`.
        terminations: bool `[N]`.
        truncations: bool `[N]`.
        action_masks: bool `[N, K]`, K choices in the discrete leaves of the action space.
        seeds: int64 `[N]`, of each environment's last seeded reset, or `NO_SEED`.
        progress: int64 `[W, 8]`, see the columns above.
    """

    actions: list[np.ndarray]
    observations: list[np.ndarray]
    final_observations: list[np.ndarray]
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    action_masks: np.ndarray
    seeds: np.ndarray
    progress: np.ndarray

    def part(self, worker: int, rows: slice) -> Buffers:
        """The same memory, as seen by the worker that owns `rows`; `progress` is its row."""
        return replace(
            self,
            actions=[array[rows] for array in self.actions],
            observations=[array[rows] for array in self.observations],
            final_observations=[array[rows] for array in self.final_observations],
            rewards=self.rewards[rows],
            terminations=self.terminations[rows],
            truncations=self.truncations[rows],
            action_masks=self.action_masks[rows],
            seeds=self.seeds[rows],
            progress=self.progress[worker],
        )


def _columns(
    observation_leaves: Sequence[Leaf], action_leaves: Sequence[Leaf], n: int, workers: int
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array, in the order of the fields of `Buffers`."""
    observations = [((n, *leaf.shape), leaf.dtype) for leaf in observation_leaves]
    actions = [((n, *leaf.shape), leaf.dtype) for leaf in action_leaves]
    flag = ((n,), np.dtype(np.bool_))
    choices = sum(sum(choice_counts(leaf.space)) for leaf in action_leaves)
    return [
        *actions,
        *observations,
        *observations,
        ((n,), np.dtype(np.float64)),
        flag,
        flag,
        ((n, choices), np.dtype(np.bool_)),
        ((n,), np.dtype(np.int64)),
        ((workers, _PROGRESS_COLUMNS), np.dtype(np.int64)),
    ]


def _padded_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def buffer_size(
    observation_leaves: Sequence[Leaf], action_leaves: Sequence[Leaf], n: int, workers: int
) -> int:
    """Bytes that `make_buffers` needs."""
    columns = _columns(observation_leaves, action_leaves, n, workers)
    return sum(_padded_size(*column) for column in columns)


def make_buffers(
    observation_leaves: Sequence[Leaf],
    action_leaves: Sequence[Leaf],
    n: int,
    workers: int,
    memory: object,
) -> Buffers:
    """Lays the arrays into `memory`, a writable buffer of at least `buffer_size` bytes."""
    arrays, offset = [], 0
    for shape, dtype in _columns(observation_leaves, action_leaves, n, workers):
        count = int(np.prod(shape, dtype=np.int64))
        # frombuffer refuses an empty array at the very end of the buffer
        flat = np.frombuffer(memory, dtype, count, offset) if count else np.empty(0, dtype)  # type: ignore[call-overload]
        arrays.append(flat.reshape(shape))
        offset += _padded_size(shape, dtype)
    a, o = len(action_leaves), len(observation_leaves)
    return Buffers(arrays[:a], arrays[a : a + o], arrays[a + o : a + 2 * o], *arrays[a + 2 * o :])
