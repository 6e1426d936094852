"""The serial backend: the caller's thread steps one environment after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from starling.envs.buffers import Buffers
from starling.envs.messages import Description, ShardOptions
from starling.envs.requests import Answer, Workers, perform
from starling.envs.shard import Shard
from starling.envs.sharded import ShardedVectorEnv


class SerialWorkers(Workers):
    """Shards that the caller works through while it hands out the work."""

    def __init__(self, rows: list[slice], step_timeout: float | None = None):
        """See `Workers`; without a second thread there is nobody to notice a time-out."""
        super().__init__(rows, None)
        self._shards: list[Shard] = []
        self._answers: list[Answer] = []

    def start(self, env_fns: list[list], options: ShardOptions) -> list[Description]:
        """Makes the shards."""
        for rows, makers in zip(self.rows, env_fns, strict=True):
            self._shards.append(Shard(makers, self.first_env + rows.start, options))
        return [shard.describe() for shard in self._shards]

    def bind(self, buffers: Buffers) -> None:
        """Gives every shard its part of the buffers."""
        super().bind(buffers)
        for w, (shard, rows) in enumerate(zip(self._shards, self.rows, strict=True)):
            shard.bind(buffers.part(w, rows))

    def _post(self, worker: int, request: int, method: str, args: tuple) -> None:
        result, failed = perform(self._shards[worker], method, args, interruptible=True)
        self._answers.append(Answer(worker, request, result, failed))

    def _poll(self, timeout: float | None, every: bool) -> Iterable[Answer]:
        answers, self._answers = self._answers, []
        return answers

    def stop(self, overdue: Sequence[int] = ()) -> None:
        """Closes the environments."""
        for shard in self._shards:
            shard.close()
        self._shards.clear()


class SerialVectorEnv(ShardedVectorEnv):
    """Steps environments one after the other, in the caller's thread.

    The fastest choice for a few cheap environments, and the oracle that the other backends are
    tested against. With a `batch_size` below `num_envs`, `recv` returns what was sent first.
    `step_timeout` has no effect: nobody is there to notice.
    """

    backend = "serial"
    keeps_timeouts = False
    _workers_class = SerialWorkers

    @staticmethod
    def _default_workers() -> int:
        return 1
