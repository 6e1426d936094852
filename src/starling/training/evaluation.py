"""Scores of a policy over whole episodes, on environments of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from starling.envs.vector_env import VectorEnv, heeding
from starling.errors import WorkerError

Tree = Any

_MOST_CUT = 10  # episodes that are lost or cut off for invalid data, for each that is asked for

# Tells the seeds of evaluation from those of training with the same number.
_EVALUATION = 0x5EED


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What came out of an evaluation.

    Attributes:
        returns: Undiscounted return of each episode, `[episodes]`.
        lengths: Steps of each episode, `[episodes]`.
    """

    returns: np.ndarray
    lengths: np.ndarray

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return float(self.returns.mean())

    @property
    def std_return(self) -> float:
        """Standard deviation over the episodes."""
        return float(self.returns.std())

    @property
    def median_return(self) -> float:
        """Median over the episodes."""
        return float(np.median(self.returns))

    @property
    def mean_length(self) -> float:
        """Mean length in steps."""
        return float(self.lengths.mean())

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.returns)

    def summary(self) -> dict[str, float | int]:
        """The figures as one JSON object."""
        names = ("mean_return", "std_return", "median_return", "mean_length", "episodes")
        return {name: getattr(self, name) for name in names}


def evaluation_seed(seed: int) -> int:
    """A seed for evaluation that no training with the same seed has."""
    return int(np.random.SeedSequence([_EVALUATION, seed]).generate_state(1)[0])


def evaluate_policy(
    predict: Callable[[Tree, np.ndarray | None], Tree],
    envs: VectorEnv,
    episodes: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:
    """Plays episodes to their end.

    Each environment plays a share fixed beforehand: taking whichever episodes end first would
    favour short ones. One that is lost, since its environment failed, is played anew.

    Args:
        predict: Actions for observations and action masks.
        envs: Environments for this alone.
        episodes: How many to play.
        seed: Of the environments.
        stop: Asked before each step.

    Returns:
        The result; None if `stop` said so before it was complete.

    Raises:
        WorkerError: Far more episodes were lost or cut off for invalid data than came to an end.
    """
    with heeding(envs, stop):
        return _played(predict, envs, episodes, seed, stop)
    return None


def _played(
    predict: Callable[[Tree, np.ndarray | None], Tree],
    envs: VectorEnv,
    episodes: int,
    seed: int,
    stop: Callable[[], bool],
) -> EvaluationResult | None:
    n = envs.num_envs
    quota = np.array([episodes // n + (i < episodes % n) for i in range(n)])
    observations, infos = envs.reset(seed=evaluation_seed(seed))
    total, length = np.zeros(n), np.zeros(n, np.int64)
    returns: list[list[float]] = [[] for _ in range(n)]
    lengths: list[list[int]] = [[] for _ in range(n)]
    played, cut = np.zeros(n, np.int64), 0
    while (played < quota).any():
        if stop():
            return None
        actions = predict(observations, infos.get("action_mask"))
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        valid = infos.get("valid")
        total += rewards if valid is None else np.where(valid, rewards, 0.0)
        length += 1 if valid is None else valid
        ended = terminated | truncated
        if not ended.any():
            continue
        for i in np.flatnonzero(ended if valid is None else ended & valid):
            if played[i] < quota[i]:
                returns[i].append(float(total[i]))
                lengths[i].append(int(length[i]))
                played[i] += 1
        total[ended], length[ended] = 0.0, 0
        cut += 0 if valid is None else int((ended & ~valid).sum())
        if cut > _MOST_CUT * episodes:
            raise WorkerError(
                f"{cut} episodes were lost or cut off for invalid data, and "
                f"{played.sum()} of {episodes} came to their end: mend the environment, or use "
                "on_invalid_data replace"
            )
    return EvaluationResult(
        np.array([r for row in returns for r in row]), np.array([x for row in lengths for x in row])
    )
