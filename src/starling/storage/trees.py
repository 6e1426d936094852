"""Trees of arrays taken apart into a list and JSON, and put together again, without pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Tree = Any


def pack_tree(tree: Tree, arrays: list[np.ndarray]) -> Any:
    """Appends the leaves of a tree to a list.

    Args:
        tree: Nested dicts, tuples and lists of arrays; None for a branch that is not there.
        arrays: Where the leaves go.

    Returns:
        The tree's structure as JSON can hold it, with each leaf's place in the list.
    """
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {"dict": [[key, pack_tree(value, arrays)] for key, value in tree.items()]}
    if isinstance(tree, tuple | list):
        return {"tuple": [pack_tree(value, arrays) for value in tree]}
    arrays.append(np.asarray(tree))
    return len(arrays) - 1


def unpack_tree(structure: Any, arrays: Sequence[np.ndarray]) -> Tree:
    """The inverse of `pack_tree`; lists come back as tuples."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return arrays[structure]
    if "dict" in structure:
        return {key: unpack_tree(value, arrays) for key, value in structure["dict"]}
    return tuple(unpack_tree(value, arrays) for value in structure["tuple"])
