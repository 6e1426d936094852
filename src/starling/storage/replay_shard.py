"""A part of a replay, in a process of its own: the rows of some of the writers."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from starling.memory import available_memory
from starling.storage.batch import Batch
from starling.storage.replay import Replay
from starling.storage.rollout import Rollout
from starling.storage.shared_replay import SharedReplay


class Content(NamedTuple):
    """What there is to draw from in a shard.

    Attributes:
        size: Transitions that can be sampled.
        total: What draws are in proportion to, as `Replay.total`.
        inserted: Transitions that could be sampled, ever.
        duplicates: Rollouts that were left out.
        answers: Answers like this that it has given, this one too: the newest counts.
    """

    size: int = 0
    total: float = 0.0
    inserted: int = 0
    duplicates: int = 0
    answers: int = 0


class ReplayShard:
    """A `SharedReplay` that is asked from elsewhere, and says after each change what it has.

    Args:
        first_writer: Number of its first writer among all.
        num_writers: Its writers, whose numbers follow one another.
        settings: Arguments of its `Replay`.
    """

    def __init__(self, first_writer: int, num_writers: int, settings: Mapping[str, Any]):
        self._first = first_writer
        self._replay = Replay(**settings)
        self._writers = SharedReplay(self._replay, num_writers)
        self._answers = 0

    def where(self) -> tuple[str, int | None]:
        """Its machine, and how many bytes are free there; None if that is not known."""
        return socket.gethostname(), available_memory()

    def add(self, rollout: Rollout) -> Content:
        """As `SharedReplay.add`."""
        origin = rollout.origin
        origin = origin._replace(worker=origin.worker - self._first)
        self._writers.add(rollout._replace(origin=origin))
        return self._content()

    def cut(self) -> Content:
        """As `SharedReplay.cut`."""
        self._writers.cut()
        return self._content()

    def draw(self, places: np.ndarray) -> tuple[Batch, Content]:
        """As `Replay.draw`."""
        return self._replay.draw(places), self._content()

    def set_priorities(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """As `Replay.set_priorities`."""
        self._replay.set_priorities(indices, priorities)

    def state(self) -> dict[str, np.ndarray]:
        """As `Replay.state`."""
        return self._replay.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> Content:
        """Takes over what `part_of_state` gave."""
        self._replay.restore({**self._replay.state(), **state})
        return self._content()

    def _content(self) -> Content:
        replay, duplicates = self._replay, self._writers.duplicates
        self._answers += 1
        return Content(len(replay), replay.total, replay.inserted, duplicates, self._answers)
