"""Gymnasium spaces as JSON, so that a checkpoint says what its policy sees and does."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space, spaces

from starling.errors import CheckpointError


def space_to_json(space: Space) -> dict[str, Any]:
    """Describes any nesting of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple."""
    match space:
        case spaces.Box():
            bounds = {"low": _bound(space.low), "high": _bound(space.high)}
            return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {
                "type": "MultiDiscrete",
                "nvec": space.nvec.tolist(),
                "start": space.start.tolist(),
                "dtype": str(space.dtype),
            }
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "shape": list(space.shape)}
        case spaces.Dict():
            # As pairs: a Dict space keeps its keys in order, and JSON objects need not.
            pairs = [[key, space_to_json(s)] for key, s in space.spaces.items()]
            return {"type": "Dict", "spaces": pairs}
        case spaces.Tuple():
            return {"type": "Tuple", "spaces": [space_to_json(s) for s in space.spaces]}
    raise TypeError(f"{space} cannot be described")


def space_from_json(data: dict[str, Any]) -> Space:
    """What `space_to_json` described.

    Raises:
        CheckpointError: It is no such description.
    """
    try:
        match data["type"]:
            case "Box":
                dtype, shape = np.dtype(data["dtype"]), tuple(data["shape"])
                low, high = (_array(data[name], dtype, shape) for name in ("low", "high"))
                return spaces.Box(low, high, shape, dtype.type)
            case "Discrete":
                return spaces.Discrete(data["n"], start=data["start"])
            case "MultiDiscrete":
                return spaces.MultiDiscrete(
                    data["nvec"], dtype=np.dtype(data["dtype"]).type, start=data["start"]
                )
            case "MultiBinary":
                shape = data["shape"]
                return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
            case "Dict":
                # As pairs again: Gymnasium sorts the keys of a dict.
                return spaces.Dict([(key, space_from_json(part)) for key, part in data["spaces"]])
            case "Tuple":
                return spaces.Tuple([space_from_json(part) for part in data["spaces"]])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's description of a space is damaged: {error!r}"
        ) from None
    raise CheckpointError(f"the checkpoint holds a space of unknown type {data['type']!r}")


def _bound(values: np.ndarray) -> Any:
    """A bound as text, one number where all are equal; text, because JSON has no infinity."""
    if values.size and np.all(values == values.flat[0]):
        return str(values.flat[0])
    return [str(value) for value in values.reshape(-1)]


def _array(bound: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(bound, str):
        return np.full(shape, np.array(bound, dtype=str).astype(dtype))
    return np.array(bound, dtype=str).astype(dtype).reshape(shape)
