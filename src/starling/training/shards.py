"""The shards of a replay on a cluster: asking them, and replacing those that are lost."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from starling.errors import StoppedError, UserError, WorkerDiedError
from starling.storage.replay_shard import Content
from starling.training.ray_cluster import ActorLostError, Cluster

_LOOK_EVERY = 1.0  # seconds of waiting between two looks whether the cluster is still there
_PATIENCE = 30.0  # seconds for a shard that is out of reach to come back
_WHILE_STOPPING = 5.0  # seconds for a shard to answer where the run was asked to stop
_MOST_IN_VAIN = 6  # shards that are lost in a row before they take anything

_log = logging.getLogger(__name__)


class Shard:
    """The learner's view of a shard.

    Attributes:
        number: Of this shard among all that there ever were, so that no other has its indices.
        writers: Workers whose rollouts it takes.
        content: What it has, as far as it has told.
        handle: Ray's.
    """

    def __init__(self, number: int, writers: range, handle: Any):
        self.number, self.writers, self.handle = number, writers, handle
        self.content = Content()


class Shards:
    """The shards that there are, each in its place.

    Args:
        cluster: Where they are.
        new_shard: Makes a `ReplayShard` of some workers; Ray's handle of it.
        writers: Of each shard, the workers whose rollouts it takes.
        restarts: Shards that may be lost.

    Attributes:
        faults: Shards lost so far, by the name that they are logged under.
    """

    def __init__(
        self,
        cluster: Cluster,
        new_shard: Callable[[range], Any],
        writers: list[range],
        restarts: int,
    ):
        self._cluster, self._new_shard, self._restarts = cluster, new_shard, restarts
        self._made = self._in_vain = 0
        self.faults: Counter[str] = Counter()
        self._shards = [self._make(of_shard) for of_shard in writers]

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards)

    def __getitem__(self, index: int) -> Shard:
        return self._shards[index]

    def _make(self, writers: range) -> Shard:
        self._made += 1
        return Shard(self._made - 1, writers, self._cluster.call(self._new_shard, writers))

    def begin(self, shard: Shard, method: str, *arguments: Any) -> Any:
        """Asks a shard; Ray's promise of the answer."""
        return self._cluster.call(getattr(shard.handle, method).remote, *arguments)

    def get(self, answer: Any, patience: float | None = None) -> Any:
        """Waits for an answer, as long as there is a cluster.

        Args:
            answer: Ray's promise of it.
            patience: Seconds to wait at least where the run was asked to stop; 5 if None.

        Raises:
            StoppedError: It was, and there is no answer.
            ActorLostError: The shard is lost or out of reach.
            StarlingError: What the shard raised, or the cluster is lost.
        """
        ray, begun = self._cluster.ray, time.monotonic()
        patience = _WHILE_STOPPING if patience is None else patience
        while True:
            self._cluster.check()
            try:
                return self._cluster.call(ray.get, answer, timeout=_LOOK_EVERY)
            except ray.exceptions.GetTimeoutError:
                if (seconds := time.monotonic() - begun) >= patience and self._cluster.stop():
                    message = f"a shard of the replay has not answered for {seconds:.0f} s"
                    raise StoppedError(message) from None
            except ActorLostError as error:
                if error.unmakeable:  # as it is the next time
                    why = error.unmakeable
                    raise UserError(f"a shard of the replay cannot be made: {why}") from None
                raise

    def answer(
        self, index: int, method: str, *arguments: Any, patience: float | None = None
    ) -> Any:
        """What a shard answers; see `get`.

        One that is out of reach is asked again, since its transitions may still be there: of what
        it was told already it takes nothing twice.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return self.get(self.begin(self._shards[index], method, *arguments), patience)
            except ActorLostError as error:
                if not error.may_answer or time.monotonic() > until:
                    raise
                if self._cluster.stop():
                    raise StoppedError(str(error)) from None
                time.sleep(_LOOK_EVERY)

    def ask(self, index: int, method: str, *arguments: Any) -> Any:
        """What a shard answers, or the one that takes its place."""
        while True:
            try:
                return self.answer(index, method, *arguments)
            except ActorLostError as error:
                self.lose(index, str(error))

    def lose(self, index: int, why: str) -> None:
        """Puts an empty shard in the place of one that is gone."""
        self._cluster.check()
        shard = self._shards[index]
        self.faults["replay_shards_lost"] += 1
        lost, size = self.faults["replay_shards_lost"], shard.content.size
        _log.warning("shard %d of the replay was lost with %d transitions: %s", index, size, why)
        self._in_vain = 0 if shard.content.answers else self._in_vain + 1
        if lost > self._restarts or self._in_vain >= _MOST_IN_VAIN:
            raise WorkerDiedError(
                f"{lost} shards of the replay were lost, {self._in_vain} in a row before they took "
                f"anything, and worker_restarts is {self._restarts}; the last was shard {index}: "
                f"{why}"
            )
        self._cluster.kill(shard.handle)  # it may only have been out of reach
        self._shards[index] = self._make(shard.writers)

    def close(self) -> None:
        """Ends the shards, with all that they have."""
        for shard in self._shards:
            self._cluster.kill(shard.handle)
