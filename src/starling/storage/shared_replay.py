"""One replay that several threads fill and draw from, at rates that depend on one another."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping

import numpy as np

from starling.errors import UserError
from starling.storage.batch import Batch
from starling.storage.replay import Replay
from starling.storage.rollout import Rollout


class RateLimiter:
    """Holds the number of samples at a multiple of the number of inserts.

    Samples aimed at are `samples_per_insert * (inserted - min_size)`. Writers wait once the learner
    is more than `slack` samples behind that, and the learner waits rather than be as much ahead: by
    default the ratio is within 10 % of its target once there are twice `min_size` inserts.

    Args:
        samples_per_insert: How often a transition is sampled on average.
        min_size: Inserts before the first sample.
        slack: Samples to be ahead or behind; 10 % of `samples_per_insert * min_size` if None. One
            rollout, or one call, more may come on top: somebody has to go first.
    """

    def __init__(self, samples_per_insert: float, min_size: int, slack: float | None = None):
        positive = 0 < samples_per_insert < math.inf and min_size >= 1
        if not positive or (slack is not None and not slack >= 0):
            raise UserError(
                f"samples_per_insert {samples_per_insert} and min_size {min_size} have to be "
                f"positive and finite, and slack {slack} not negative"
            )
        self.samples_per_insert, self.min_size = samples_per_insert, min_size
        self.slack = 0.1 * samples_per_insert * min_size if slack is None else slack

    def behind(self, inserted: int, sampled: int) -> float:
        """Samples that are missing; negative where there are more than aimed at."""
        return self.samples_per_insert * (inserted - self.min_size) - sampled

    def may_insert(self, inserted: int, sampled: int) -> bool:
        """Whether another rollout may come."""
        return self.behind(inserted, sampled) <= self.slack

    def may_sample(self, inserted: int, sampled: int, count: int) -> bool:
        """Whether `count` more may be drawn.

        At least one call's worth may be ahead: else writers and learner could wait for each other.
        """
        if inserted < self.min_size:
            return False
        return self.behind(inserted, sampled + count) >= -max(self.slack, count)


class SharedReplay:
    """A replay for several threads, each of whose writers has environments of its own.

    A rollout's `origin` says which writer it is from and its number, which goes up by one: a number
    that was there already is left out, and where one is missing, or the writer began anew, episodes
    under way are cut. Rollouts come whole or not at all.

    Args:
        replay: Of the environments of all writers, in the order of their numbers.
        num_writers: Writers, with equally many environments each.
        limiter: Makes writers and learner wait for each other; nobody waits if None.

    Attributes:
        duplicates: Rollouts that were left out.
    """

    def __init__(self, replay: Replay, num_writers: int, limiter: RateLimiter | None = None):
        self._envs, rest = divmod(replay.num_envs, num_writers)
        if rest or not self._envs:
            raise UserError(
                f"{num_writers} writers cannot have equally many of {replay.num_envs} "
                f"environments: make num_envs of the replay a multiple of {num_writers}"
            )
        self._replay, self._limiter = replay, limiter
        self._newest: list[tuple[int, int] | None] = [None] * num_writers
        self._changed = threading.Condition()
        self._stopped = False
        self.duplicates = 0

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return len(self._replay)

    @property
    def inserted(self) -> int:
        """Transitions that could be sampled, ever."""
        return self._replay.inserted

    @property
    def sampled(self) -> int:
        """Transitions that were, ever."""
        return self._replay.sampled

    def add(self, rollout: Rollout) -> int | None:
        """Copies a rollout in, once the learner has kept up.

        Args:
            rollout: Of one writer's environments.

        Returns:
            How many transitions can now be sampled in addition; None if it was stopped.
        """
        replay, limiter = self._replay, self._limiter
        with self._changed:
            while not self._stopped and not (
                limiter is None or limiter.may_insert(replay.inserted, replay.sampled)
            ):
                self._changed.wait()
            if self._stopped:
                return None
            added = self._add(rollout)
            self._changed.notify_all()
            return added

    def _add(self, rollout: Rollout) -> int:
        origin, envs = rollout.origin, np.shape(rollout.rewards)[1]
        if not 0 <= origin.worker < len(self._newest) or envs != self._envs:
            raise UserError(
                f"a rollout of {envs} environments from writer {origin.worker} does not fit into a "
                f"replay of {len(self._newest)} writers with {self._envs} environments each"
            )
        newest, number = self._newest[origin.worker], (origin.restarts, origin.sequence)
        if newest is not None and number <= newest:
            self.duplicates += 1
            return 0
        first, added = origin.worker * self._envs, 0
        if newest is None or number != (newest[0], newest[1] + 1):
            added = self._replay.cut(first, self._envs)
        added += self._replay.add(rollout, first_env=first)
        self._newest[origin.worker] = number
        return added

    def sample(
        self,
        batch_size: int,
        num_batches: int = 1,
        beta: float = 0.4,
        timeout: float | None = None,
    ) -> Batch | None:
        """Draws transitions, once writers have kept up.

        Args:
            batch_size: B.
            num_batches: K.
            beta: As for `Replay.sample`.
            timeout: Seconds to wait for writers at most; without end if None.

        Returns:
            A batch; None if it was stopped.

        Raises:
            TimeoutError: Writers did not bring enough in time.
        """
        replay, limiter, count = self._replay, self._limiter, batch_size * num_batches
        if limiter is not None and batch_size > limiter.min_size:
            raise UserError(
                f"batches of {batch_size} need a min_size of as many at least, not "
                f"{limiter.min_size}"
            )
        with self._changed:
            enough = self._changed.wait_for(
                lambda: (
                    self._stopped
                    or limiter is None
                    or limiter.may_sample(replay.inserted, replay.sampled, count)
                ),
                timeout,
            )
            if self._stopped:
                return None
            if not enough:
                raise TimeoutError(
                    f"no writer added anything to the replay for {timeout:g} s, which has had "
                    f"{replay.inserted} transitions, and {replay.sampled} samples taken"
                )
            batch = replay.sample(batch_size, num_batches, beta)
            self._changed.notify_all()
            return batch

    def set_priorities(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """Gives transitions new priorities, as `Replay.set_priorities`."""
        with self._changed:
            self._replay.set_priorities(indices, priorities)

    def cut(self) -> None:
        """Says that all environments begin anew, as `Replay.cut`."""
        with self._changed:
            for first in range(0, self._replay.num_envs, self._envs):
                self._replay.cut(first, self._envs)

    def stop(self) -> None:
        """Ends all waiting: from now on nothing is added or drawn."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps all others waiting, so that what `state` gives can be written somewhere."""
        with self._changed:
            yield

    def state(self) -> dict[str, np.ndarray]:
        """As `Replay.state`: no copies, so that where others write it is read while `paused`."""
        with self._changed:
            return self._replay.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Replay.restore`; writers begin anew."""
        with self._changed:
            self._replay.restore(state)
            self._changed.notify_all()
