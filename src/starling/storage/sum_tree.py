"""A sum tree: draws in proportion to weights, and changes weights, for many rows at once."""

from __future__ import annotations

import numpy as np


class SumTree:
    """Weights, the sums of pairs of them, the sums of pairs of those, and so on.

    Every sum is made anew from the two below it, so that no error of rounding builds up, and the
    tree is the same whatever order its weights came in.

    Args:
        size: Number of weights, which all are 0 at first.
    """

    LEAF_BYTES = 16  # of a weight and all the sums, for each weight

    def __init__(self, size: int):
        self._levels: list[np.ndarray] = []  # each [pairs, 2], the weights first, the root last
        while size > 1 or not self._levels:
            size = -(-size // 2)
            self._levels.append(np.zeros((size, 2)))

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._levels[-1].sum())

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(level.nbytes for level in self._levels)

    def get(self, leaves: np.ndarray) -> np.ndarray:
        """Weights of the given leaves."""
        return self._levels[0].reshape(-1).take(leaves)

    def set(self, leaves: np.ndarray, weights: np.ndarray | float) -> None:
        """Changes weights `[M]`; where a leaf is named twice, the last one counts."""
        self._levels[0].reshape(-1)[leaves] = weights
        nodes = np.sort(leaves)
        for lower, upper in zip(self._levels, self._levels[1:], strict=False):
            nodes >>= 1
            new = np.ones(len(nodes), np.bool_)
            np.not_equal(nodes[1:], nodes[:-1], out=new[1:])
            nodes = nodes[new]
            pairs = lower.take(nodes, 0)
            upper.reshape(-1)[nodes] = pairs[:, 0] + pairs[:, 1]

    def find(self, targets: np.ndarray) -> np.ndarray:
        """The leaf in which the running sum of weights passes each target.

        Args:
            targets: `[M]`, from 0 up to the total, which must not be 0.

        Returns:
            Leaves `[M]`, none of which has the weight 0.
        """
        targets = np.array(targets, np.float64)
        nodes = np.zeros(len(targets), np.int64)
        for level in reversed(self._levels):
            pairs = level.take(nodes, 0)
            left = pairs[:, 0]
            # What rounding carried past the end must not fall on a weight of 0.
            right = (targets >= left) & (pairs[:, 1] > 0)
            targets -= left * right
            nodes += nodes
            nodes += right
        return nodes
