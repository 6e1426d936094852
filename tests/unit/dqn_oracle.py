"""DQN in NumPy, row by row, with derivatives by differences: what the compiled program must do."""

from __future__ import annotations

from typing import Any

import numpy as np


def forward(params: dict[str, np.ndarray], x: np.ndarray, sizes: list[int], dueling: bool) -> Any:
    """Q of one observation, a list with an array for each component of an action."""
    wide = max(sizes)

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ params[f"{name}/kernel"].astype(float) + params[f"{name}/bias"]

    if dueling:
        advantage = dense("advantage", np.tanh(dense("advantage_stream/Dense_0", x)))
        value = dense("value", np.tanh(dense("value_stream/Dense_0", x)))[0]
        rows = [advantage[d * wide : d * wide + n] for d, n in enumerate(sizes)]
        return [value + row - row.mean() for row in rows]
    q = dense("q", np.tanh(dense("torso/Dense_0", x)))
    return [q[d * wide : d * wide + n] for d, n in enumerate(sizes)]


def target(online: list, target: list, reward: float, discount: float, **how: Any) -> float:
    """y = R + gamma^m mean_d Q'_d(s', argmax_a Q_d(s', a)), over the allowed a."""
    if discount == 0.0:
        return reward
    chooser = online if how["double"] else target
    total, at = 0.0, 0
    for values, chooses in zip(target, chooser, strict=True):
        allowed = range(len(values))
        if how["mask"] is not None:
            allowed = [a for a in allowed if how["mask"][at + a]]
        total += values[max(allowed, key=lambda a: chooses[a])]
        at += len(values)
    return reward + discount * total / len(target)


def loss_of(error: float, kind: str) -> float:
    """The loss of one TD error."""
    if kind == "mse" or abs(error) <= 1.0:
        return error * error / 2
    return abs(error) - 0.5
