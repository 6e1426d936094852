"""Returns and lengths of episodes, counted from the rewards and ends that were stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Episodes(NamedTuple):
    """Episodes that ended, in the order in which they did; K of them.

    Attributes:
        returns: Undiscounted sums of rewards, float64 ``[K]``.
        lengths: Steps, int64 ``[K]``.
        end_steps: Environment steps made by the run when each had ended, int64 ``[K]``.
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    end_steps: NDArray[np.int64]


def joined(parts: Sequence[Episodes]) -> Episodes:
    """The episodes of several groups of environments, in the order in which they ended."""
    returns, lengths, end_steps = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(end_steps, kind="stable")
    return Episodes(returns[order], lengths[order], end_steps[order])


class EpisodeStatistics:
    """Running returns and lengths of N environments, and the last finished episodes.

    Attributes:
        episodes: Number of episodes finished so far.
    """

    def __init__(self, num_envs: int, window: int = 100):
        """Start with no episode finished.

        Args:
            num_envs: Number of environments, N.
            window: Number of latest episodes that the means are taken over.
        """
        self.episodes = 0
        self._window = window
        self._running_returns = np.zeros(num_envs)
        self._running_lengths = np.zeros(num_envs, np.int64)
        self._last_returns = np.zeros(0)
        self._last_lengths = np.zeros(0, np.int64)

    def update(
        self,
        rewards: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        first_step: int,
        envs: slice = slice(None),
        together: int | None = None,
    ) -> Episodes:
        """Count a rollout of T steps.

        Args:
            rewards: Rewards as the environments gave them, ``[T, N]``.
            terminated: Where an episode reached a terminal state, bool ``[T, N]``.
            truncated: Where an episode was cut off, bool ``[T, N]``.
            valid: Rows that are experience, bool ``[T, N]``; the others (resets of an adapter)
                count for nothing, and where one of them ends an episode, that was lost and does
                not count either. None: all of them.
            first_step: Environment steps that the run had made before this rollout.
            envs: Which environments these are, where they are not all.
            together: Environments that count as if they made as many steps at the same time, these
                among them; None: all.

        Returns:
            The episodes that ended in this rollout, ordered by step, then by environment.
        """
        rewards = np.asarray(rewards)
        done = np.asarray(terminated, bool) | np.asarray(truncated, bool)
        steps, num_envs = rewards.shape
        # One row per environment, with what it brings from earlier rollouts as column 0: then the
        # episodes are stretches of the flattened rows, and reduceat sums each on its own.
        # (Differences of one running sum would let an infinite reward spoil all later episodes.)
        row = np.empty((num_envs, steps + 1))
        row[:, 0] = self._running_returns[envs]
        counts = np.ones((num_envs, steps + 1), np.int64)
        counts[:, 0] = self._running_lengths[envs]
        whole = done
        if valid is None:
            row[:, 1:] = rewards.T
            made = np.arange(1, steps + 1) * num_envs
        else:
            valid = np.asarray(valid, bool)
            whole = done & valid
            row[:, 1:] = np.where(valid, rewards, 0).T
            counts[:, 1:] = valid.T
            made = valid.sum(axis=1).cumsum()
        closes = np.zeros((num_envs, steps + 1), bool)
        closes[:, 1:] = done.T
        closes[:, -1] = True

        last = np.flatnonzero(closes)
        first = np.append(0, last[:-1] + 1)
        returns = np.add.reduceat(row.ravel(), first)
        lengths = np.add.reduceat(counts.ravel(), first)
        env, column = np.divmod(last, steps + 1)
        finished = done[column - 1, env]
        at_the_end = column == steps  # of the rollout
        self._running_returns[envs] = np.where(finished, 0.0, returns)[at_the_end]
        self._running_lengths[envs] = np.where(finished, 0, lengths)[at_the_end]

        counted = whole[column - 1, env]
        env, column = env[counted], column[counted]
        order = np.lexsort((env, column))
        together = together or len(self._running_returns)
        episodes = Episodes(
            returns[counted][order],
            lengths[counted][order],
            first_step + made[column[order] - 1] * together // num_envs,
        )
        self.episodes += len(order)
        self._last_returns = self._latest(self._last_returns, episodes.returns)
        self._last_lengths = self._latest(self._last_lengths, episodes.lengths)
        return episodes

    def _latest(self, old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([old, new])[-self._window :]

    @property
    def return_mean(self) -> float | None:
        """Mean return of the last ``window`` episodes, None before the first has ended."""
        return float(self._last_returns.mean()) if self._last_returns.size else None

    @property
    def length_mean(self) -> float | None:
        """Mean length in steps of the last ``window`` episodes, None before the first has ended."""
        return float(self._last_lengths.mean()) if self._last_lengths.size else None

    def make_room(self, num_envs: int) -> None:
        """Count so many environments, or more: others may have joined."""
        more = num_envs - len(self._running_returns)
        if more > 0:
            self._running_returns = np.pad(self._running_returns, (0, more))
            self._running_lengths = np.pad(self._running_lengths, (0, more))

    def forget(self, envs: slice = slice(None)) -> None:
        """Drop the episodes that are under way: the environments were reset in their midst."""
        self._running_returns[envs] = 0.0
        self._running_lengths[envs] = 0

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything as arrays, for a checkpoint."""
        return {
            "episodes": np.asarray(self.episodes, np.int64),
            "running_returns": self._running_returns.copy(),
            "running_lengths": self._running_lengths.copy(),
            "last_returns": self._last_returns.copy(),
            "last_lengths": self._last_lengths.copy(),
        }

    def restore(self, state: Mapping[str, ArrayLike], *, unfinished: bool) -> None:
        """Go on from what ``state`` returned.

        Args:
            state: The arrays.
            unfinished: Whether the environments go on in the midst of the episodes that were under
                way. False where they were reset: then those episodes are forgotten, and the number
                of environments may be another.

        Raises:
            ValueError: With ``unfinished``, the state is of another number of environments.
        """
        self.episodes = int(np.asarray(state["episodes"]))
        self._last_returns = np.array(state["last_returns"], np.float64)[-self._window :]
        self._last_lengths = np.array(state["last_lengths"], np.int64)[-self._window :]
        if unfinished:
            running = np.array(state["running_returns"], np.float64)
            if running.shape != self._running_returns.shape:
                raise ValueError(
                    f"the state is of {running.size} environments, these are "
                    f"{self._running_returns.size}"
                )
            self._running_returns = running
            self._running_lengths = np.array(state["running_lengths"], np.int64)
        else:
            self.forget()
