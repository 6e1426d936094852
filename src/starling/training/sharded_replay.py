"""A replay whose rows are with several processes of a Ray cluster, as the learner sees it.

Each shard has the rows of some of the workers. The learner says which shard gets a rollout, where
in all of the priorities the next minibatches lie, and what the new priorities are: it has the
counts, the shards have the transitions.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from starling.errors import StarlingError, StoppedError, UserError
from starling.memory import available_memory
from starling.storage.batch import Batch, join_batches, map_batches, with_masks
from starling.storage.replay import Replay, importance_weights
from starling.storage.replay_shard import Content
from starling.storage.replay_states import join_states, part_of_state
from starling.storage.rollout import Rollout, Tree
from starling.training.ray_cluster import ActorLostError, CallFailedError, Cluster
from starling.training.shards import Shard, Shards

_INDEX_BITS = 44  # of an index, for a transition within its shard; those above say which shard

_log = logging.getLogger(__name__)


class Request(NamedTuple):
    """Minibatches that shards are drawing.

    Attributes:
        shape: (K, B).
        beta: Of the importance weights.
        size: Transitions that there were to draw from.
        shards: Which shard draws each row, `[K * B]`.
        shares: Probability that a row is drawn from that shard, `[K * B]`.
        answers: Of each shard that draws some: its place in the list, itself, and Ray's promise.
    """

    shape: tuple[int, int]
    beta: float
    size: int
    shards: np.ndarray
    shares: np.ndarray
    answers: list[tuple[int, Shard, Any]]


class ShardedReplay:
    """What DQN asks of a replay, of shards that have the environments of some workers each.

    Transitions are drawn as from one replay of all of them, and while the learner learns, shards
    draw the next minibatches: these know nothing yet of the last rollout and of the priorities that
    follow from the minibatches before. Weights are right all the same, since they are computed from
    the probabilities with which transitions were drawn.

    A shard that is lost is replaced by an empty one; what it had, and the priorities of that, are
    gone.

    Args:
        cluster: Where the shards are.
        new_shard: Makes a `ReplayShard` of some workers; Ray's handle of it.
        whole: A replay of all environments. It stays empty, and keeps the counters.
        num_shards: How many shards there are.
        num_writers: Workers, with equally many environments each.
        restarts: Shards that may be lost.

    Attributes:
        faults: Shards lost so far, by the name that they are logged under.
    """

    def __init__(
        self,
        cluster: Cluster,
        new_shard: Callable[[range], Any],
        whole: Replay,
        num_shards: int,
        num_writers: int,
        restarts: int,
    ):
        self._whole, self.duplicates = whole, 0
        ends = [num_writers * (i + 1) // num_shards for i in range(num_shards)]
        writers = [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]
        self._shards = Shards(cluster, new_shard, writers, restarts)
        self.faults = self._shards.faults
        self._shard_of = [i for i, shard in enumerate(self._shards) for _ in shard.writers]
        self._envs = whole.num_envs // num_writers
        self._batch_size = 0  # of what was drawn ahead
        self._drawn: list[Batch] = []
        self._under_way: Request | None = None

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return sum(shard.content.size for shard in self._shards)

    @property
    def inserted(self) -> int:
        """Transitions that could be sampled, ever."""
        return self._whole.inserted

    @property
    def sampled(self) -> int:
        """Transitions that were, ever."""
        return self._whole.sampled

    def _change(self, index: int, method: str, *arguments: Any) -> int:
        """Has a shard change what it has; how many transitions that added."""
        content = self._shards.ask(index, method, *arguments)
        return self._take(self._shards[index], content)

    def _take(self, shard: Shard, content: Content) -> int:
        if content.answers < shard.content.answers:  # what was drawn before the last rollout came
            return 0
        added = content.inserted - shard.content.inserted
        self.duplicates += content.duplicates - shard.content.duplicates
        self._whole.inserted += added
        shard.content = content
        return added

    # ---- as a replay does it

    def add(self, rollout: Rollout, *, content: Any = None) -> int:
        """Has a shard take a rollout.

        Args:
            rollout: Of a worker; of this only its origin counts where `content` is given.
            content: Where the whole rollout is in Ray's object store.

        Returns:
            How many transitions can now be sampled in addition; 0 where the shard does not answer,
            and the run was asked to stop.
        """
        index = self._shard_of[rollout.origin.worker]
        try:
            return self._change(index, "add", rollout if content is None else content)
        except (CallFailedError, StoppedError) as error:
            if isinstance(error, CallFailedError) and not error.of_ray:
                raise
            worker = rollout.origin.worker
            _log.warning("a rollout of worker %d did not come to its shard: %s", worker, error)
            return 0

    def cut(self) -> None:
        """Says that all environments begin anew, as `Replay.cut`."""
        for index in range(len(self._shards)):
            self._change(index, "cut")

    def sample(self, batch_size: int, num_batches: int = 1, beta: float = 0.4) -> Batch | None:
        """Draws transitions, as `Replay.sample`, and has the shards draw the next ones.

        Returns:
            A batch; None if shards were lost, and the others have nothing to draw from, or if one
            does not answer, and the run was asked to stop.
        """
        if batch_size != self._batch_size:
            self._batch_size, self._drawn, self._under_way = batch_size, [], None
        while sum(len(batch.returns) for batch in self._drawn) < num_batches:
            request = self._under_way or self._request(batch_size, num_batches, beta)
            self._under_way = None
            if request is None:
                return None
            try:
                self._fetch(request)
            except StoppedError as error:
                _log.warning("the last minibatches were not drawn: %s", error)
                return None
        if self._under_way is None:
            self._under_way = self._request(batch_size, num_batches, beta)
        drawn = join_batches(self._drawn)
        batch = map_batches(lambda x: x[:num_batches], drawn)
        rest = map_batches(lambda x: x[num_batches:], drawn)
        self._drawn = [rest] if len(rest.returns) else []
        self._whole.sampled += batch.returns.size
        return batch

    def set_priorities(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """Gives transitions new priorities; those that are gone, alone or with theirs, are ignored.

        Args:
            indices: As in `Batch.indices`, of any shape.
            priorities: Positive, of the same shape.
        """
        numbers = indices >> _INDEX_BITS
        for shard in self._shards:
            ours = numbers == shard.number
            if ours.any():  # nobody waits for it: whoever draws from the shard next comes after it
                rows = indices[ours] & ((1 << _INDEX_BITS) - 1)
                self._shards.begin(shard, "set_priorities", rows, priorities[ours])

    # ---- drawing

    def _request(self, batch_size: int, num_batches: int, beta: float) -> Request | None:
        """Asks shards to draw minibatches; None where there is nothing to draw from."""
        totals = np.array([shard.content.total for shard in self._shards], np.float64)
        if not totals.any():
            return None
        shape = (num_batches, batch_size)
        places = self._whole.places(shape).ravel()
        shares = totals / totals.sum()
        ends = np.cumsum(shares)
        # What rounding carries past the end must not fall on a shard that is empty.
        shards = np.minimum(np.searchsorted(ends, places, "right"), np.flatnonzero(totals)[-1])
        answers = []
        for index in np.unique(shards).tolist():
            shard, end, share = self._shards[index], ends[index], shares[index]
            within = (places[shards == index] - (end - share)) / share
            within = np.clip(within, 0.0, np.nextafter(1.0, 0.0))
            answers.append((index, shard, self._shards.begin(shard, "draw", within)))
        return Request(shape, beta, len(self), shards, shares[shards], answers)

    def _fetch(self, request: Request) -> None:
        """Takes what shards have drawn; where one was lost, nothing of all of it."""
        parts: list[tuple[int, Batch]] = []
        for index, shard, answer in request.answers:
            try:
                batch, content = self._shards.get(answer)
            except ActorLostError as error:
                if error.may_answer:
                    self._shards.ask(index, "where")  # until that is known
                elif shard is self._shards[index]:
                    self._shards.lose(index, str(error))
                continue
            if shard is self._shards[index]:
                self._take(shard, content)
            indices = batch.indices | shard.number << _INDEX_BITS
            parts.append((index, batch._replace(indices=indices)))
        if len(parts) == len(request.answers):
            self._drawn.append(self._put_together(request, parts))

    def _put_together(self, request: Request, parts: list[tuple[int, Batch]]) -> Batch:
        rows = [np.flatnonzero(request.shards == index) for index, _ in parts]

        def together(*leaves: np.ndarray) -> np.ndarray:
            found = np.empty((len(request.shards), *leaves[0].shape[1:]), leaves[0].dtype)
            for at, leaf in zip(rows, leaves, strict=True):
                found[at] = leaf
            return found.reshape(*request.shape, *found.shape[1:])

        batch = map_batches(together, *with_masks([batch for _, batch in parts]))
        probabilities = batch.weights * request.shares.reshape(request.shape)
        weights = np.ones(request.shape, np.float32)
        if self._whole.prioritized:
            weights = importance_weights(probabilities, request.size, request.beta)
        return batch._replace(weights=weights)

    # ---- keeping it

    def check_memory(
        self,
        observations: Tree,
        actions: Tree,
        new_replay: Callable[[int], Replay],
        saved: bool,
    ) -> None:
        """Looks whether the machines have memory for what shards are to keep, and for `state`.

        Args:
            observations: Rows `[T, N, ...]` like those that will come.
            actions: The same.
            new_replay: Makes an empty replay of the environments of so many workers.
            saved: Whether `state` will be asked for, which gathers everything here.

        Raises:
            UserError: One has not; the message has the arithmetic.
        """
        here = socket.gethostname()
        writers, free = Counter[str](), {here: available_memory()}
        for index, shard in enumerate(self._shards):
            node, available = self._shards.ask(index, "where")
            free[node] = available
            writers[node] += len(shard.writers)
        if saved:
            writers[here] += len(self._shard_of)
        for node, count in writers.items():
            try:
                new_replay(count).check_memory(observations, actions, free[node])
            except UserError as error:
                advice = (
                    ", or leave it out of checkpoints, which gather it here (save_replay False)"
                )
                advice = advice if saved and node == here else ""
                raise UserError(f"on node {node}, {error}{advice}") from None

    def state(self) -> dict[str, np.ndarray]:
        """What one replay of all environments would save, as `Replay.state`.

        What is lost is left out, so that a run which ends for that is saved.
        """
        states = []
        for index in range(len(self._shards)):
            try:
                self._shards.answer(index, "where")  # which one that hangs does not say
                states.append(self._shards.answer(index, "state", patience=math.inf))
            except StarlingError as error:
                _log.error("shard %d of the replay cannot be saved any more: %s", index, error)
                states.append({})
                with contextlib.suppress(StarlingError):
                    self._shards.lose(index, str(error))
        envs = [len(shard.writers) * self._envs for shard in self._shards]
        return {**self._whole.state(), **join_states(states, envs, self._whole.rows_per_env)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Replay.restore`, of any number of shards; workers begin anew."""
        self._whole.restore({name: state[name] for name in ("settings", "counters", "random")})
        for index, shard in enumerate(self._shards):
            first, envs = (n * self._envs for n in (shard.writers.start, len(shard.writers)))
            part = part_of_state(state, first, envs, self._whole.rows_per_env)
            self._change(index, "restore", part)

    def close(self) -> None:
        """Ends the shards, with all that they have."""
        self._shards.close()
