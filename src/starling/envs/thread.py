"""The thread backend: persistent threads step shards."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from starling.envs.buffers import Buffers
from starling.envs.messages import Description, ShardOptions
from starling.envs.requests import Answer, Workers, as_answer, perform
from starling.envs.shard import Shard
from starling.envs.sharded import ShardedVectorEnv

_GRACE = 1.0  # seconds that close() gives a step that is under way


def _serve(
    worker: int,
    make_shard: Any,
    requests: queue.SimpleQueue,
    answers: queue.SimpleQueue,
) -> None:
    """What a thread does: make its shard, answer requests, close the environments."""
    shard = None
    try:
        shard = make_shard()
        answers.put(Answer(worker, 0, shard.describe(), False))
    except BaseException as error:
        if shard is not None:
            shard.close()
        answers.put(Answer(worker, 0, as_answer("could not start", error), True))
        return
    while (task := requests.get()) is not None:
        request, method, args = task
        answers.put(Answer(worker, request, *perform(shard, method, args)))
    shard.close()


class ThreadWorkers(Workers):
    """Threads with a shard each, which live as long as the vector environment."""

    cannot_be_stopped = (
        "; the thread goes on and cannot be stopped: use backend='process', whose workers can"
    )

    def __init__(self, rows: list[slice], step_timeout: float | None = None):
        """See `Workers`."""
        super().__init__(rows, step_timeout)
        self._threads: list[threading.Thread] = []
        self._queues: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in rows]
        self._answers: queue.SimpleQueue = queue.SimpleQueue()

    def start(self, env_fns: list[list], options: ShardOptions) -> list[Description]:
        """Starts the threads; each makes its environments itself."""
        for w, (rows, makers) in enumerate(zip(self.rows, env_fns, strict=True)):
            first = self.first_env + rows.start
            thread = threading.Thread(
                target=_serve,
                args=(
                    w,
                    lambda makers=makers, first=first: Shard(makers, first, options),
                    self._queues[w],
                    self._answers,
                ),
                name=f"starling-envs-{w}",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)
        return self._descriptions()

    def bind(self, buffers: Buffers) -> None:
        """Gives every shard its part of the buffers."""
        super().bind(buffers)
        everyone = range(len(self.rows))
        self.complete(everyone, "bind", [(buffers.part(w, self.rows[w]),) for w in everyone])

    def _post(self, worker: int, request: int, method: str, args: tuple) -> None:
        self._queues[worker].put((request, method, args))

    def _poll(self, timeout: float | None, every: bool) -> Iterable[Answer]:
        try:
            answers = [self._answers.get(timeout=timeout)]
            while not self._answers.empty():
                answers.append(self._answers.get())
        except queue.Empty:
            return []
        return answers

    def stop(self, overdue: Sequence[int] = ()) -> None:
        """Asks every thread to close its environments and end; leaves a hung one behind."""
        deadline = time.monotonic() + _GRACE
        for requests in self._queues:
            requests.put(None)
        for w, thread in enumerate(self._threads):
            if w not in overdue and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._threads.clear()


class ThreadVectorEnv(ShardedVectorEnv):
    """Steps shards of environments in a pool of threads.

    It pays only where `step` releases the interpreter lock for most of its time: simulators
    written in C or C++ that do so (MuJoCo, for example), or environments that wait. For those
    written in Python it is slower than `serial`; use `process`.
    """

    backend = "thread"
    _workers_class = ThreadWorkers
