"""Workers on a Ray cluster, and the learner's side of them: a source of rollouts for a trainer.

Parameters go into Ray's object store once for each version, whole rollouts come back, and nothing
is sent for single steps. A worker has a bounded number of requests under way. What comes back is
fetched as soon as it is there, also while the learner learns.

Whoever is lost, alone or with its node, is replaced by a new worker with the same number, which
begins other episodes; Ray finds a place for it, now or once there is one.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from starling.errors import UserError, WorkerError
from starling.storage.rollout import Rollout, join_rollouts
from starling.training.actor import Published
from starling.training.actor_pool import ActorPool
from starling.training.episode_counter import only_counted
from starling.training.policy_lag import lag_class, lag_metrics
from starling.training.ray_cluster import ActorLostError, CallFailedError, Cluster, room_on
from starling.training.ray_worker import Failure, Report, Started
from starling.training.worker_view import (
    Asked,
    Losses,
    Request,
    Worker,
    error_of,
    tell_of_silence,
    tell_warnings,
)

_POLL = 0.05  # seconds between two questions whether to stop
_AHEAD = 2  # requests of a worker that are under way while the learner learns
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a lost worker is replaced
_MOST_DOUBLINGS = 10  # of the pause: who fails for a day would go beyond all numbers
_LOOK_EVERY = 1.0  # seconds between two looks at the cores, and at who is silent
_TELL_AFTER = 30.0  # seconds of waiting for workers to start

_log = logging.getLogger(__name__)


class RayPool:
    """Workers, and what they have under way.

    Args:
        cluster: Where they are.
        new_worker: Makes a worker of a number; Ray's handle of it.
        publish: What workers act with now.
        num_workers: How many; None: as many as all cores but one have room for.
        cpus_per_worker: Cores that each takes.
        num_parts: Rollouts in an update; None: one of each worker that there is.
        blocking: Collect with the newest parameters only.
        max_policy_lag: Rollouts older than this are dropped.
        restarts: Workers that may be lost, as `Losses` counts them.
        apart: Leave whole rollouts in Ray's object store: reports say where they are.
        faults: What went wrong beside the workers, kept up to date, by name.

    Attributes:
        reports: What the last rollout was made of, in order.
        taken: The rollouts of these, and of what was dropped meanwhile only what episodes are
            counted from, in order.
        lags: Updates since the parameters of each part of the last rollout.
        lag_counts: Parts of all rollouts so far by their lag, by logged names.
        dropped: Rollouts dropped so far.
        losses: Workers lost so far.
        seconds: The longest that a part of the last rollout took to collect.
        activity: What a trainer that waits for a rollout is doing.
    """

    activity = "wait"

    def __init__(
        self,
        cluster: Cluster,
        new_worker: Callable[[int], Any],
        publish: Callable[[], Published],
        *,
        num_workers: int | None,
        cpus_per_worker: float,
        num_parts: int | None,
        blocking: bool,
        max_policy_lag: float,
        restarts: int,
        apart: bool = False,
        faults: Counter[str] | None = None,
    ):
        self.apart, self._faults_beside = apart, Counter() if faults is None else faults
        self.cluster = cluster
        self.new_worker, self.publish = new_worker, publish
        self.num_workers, self.cpus_per_worker = num_workers, cpus_per_worker
        self.num_parts, self.blocking = num_parts, blocking
        self.max_policy_lag, self.losses = max_policy_lag, Losses(restarts)
        self.dropped = self.sequence = 0
        self.past_faults: Counter[str] = Counter()
        self.lag_counts: Counter[str] = Counter()
        self.workers: list[Worker] = []
        self._looked_at = -math.inf
        self._wanted = 0  # workers that there is room for
        self._seed = 0
        self._requests: dict[Request, Asked] = {}
        self._published: tuple[int, Any] = (-1, None)
        self._answers: queue.SimpleQueue[tuple[Request, Any]] = queue.SimpleQueue()
        self._complete = False  # whether all workers have been there once
        self._tell_at = time.monotonic() + _TELL_AFTER
        self._alone_since = math.inf
        self._parts: list[Report] = []
        self.reports: list[Report] = []
        self.taken: list[Rollout] = []
        self._too_old: list[Rollout] = []  # and not yet told of
        self.lags: list[int] = []
        self.seconds = 0.0

    @property
    def faults(self) -> Counter[str]:
        """What went wrong so far and was survived, in all workers, by name."""
        total = self.past_faults + self._faults_beside + self.losses.counts
        return sum((worker.faults for worker in self.workers), total)

    def metrics(self) -> dict[str, Any]:
        """How the workers fare, and how old the last rollout is, by logged names."""
        return lag_metrics(self.lags, self.lag_counts, self.dropped) | {
            "distributed/workers": len(self._ready()),
            "distributed/collect_seconds": self.seconds,
        }

    def reset(self, seed: int | None) -> None:
        """Begins new episodes everywhere; what is under way is of no use any more."""
        self._seed = seed or 0
        self._parts, self.reports, self.lags = [], [], []
        self.taken, self._too_old = [], []
        for worker in self.workers:
            self._forget(worker)

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Refused: what workers are about to do cannot be brought back."""
        raise UserError("workers cannot go on exactly where they stopped: leave out exact_resume")

    def _forget(self, worker: Worker) -> None:
        worker.begun += 1
        worker.sequence = worker.expected
        worker.pending = 0
        worker.early = {}
        self._requests = {
            request: asked
            for request, asked in self._requests.items()
            if request.worker != worker.index or request.sequence < 0  # whoever starts, starts
        }

    # ---- who is there

    def _tend(self) -> None:
        """Makes workers that are missing, as far as there is room for them."""
        now = time.monotonic()
        self.cluster.check()
        if now - self._looked_at >= _LOOK_EVERY:
            self._looked_at = now
            tell_of_silence(self.workers, self._requests)
            self._tell_of_loss(now)
            self._wanted = self.num_workers or self._room()
            # Whoever comes back later goes on with its numbers and other episodes.
            for index in range(len(self.workers), self._wanted):
                self.workers.append(Worker(index))
        missing = self._wanted - sum(worker.handle is not None for worker in self.workers)
        for worker in self.workers:
            if missing > 0 and worker.handle is None and now >= worker.retry_at:
                missing -= 1
                worker.handle = self.cluster.call(self.new_worker, worker.index)
                started = self.cluster.call(worker.handle.start.remote)
                self._ask(Request(worker.index, worker.begun, -1), [started])

    def _room(self) -> int:
        """How many workers there is room for, on all cores but one."""
        nodes, cpus = self.cluster.cores(), self.cpus_per_worker
        return max(1, min(room_on(nodes, cpus), room_on([sum(nodes) - 1], cpus)))

    def _ready(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.ready]

    def _tell_of_loss(self, now: float) -> None:
        """Warns, again and again, of a run that had workers and has none."""
        if not self._complete or self._ready():
            self._alone_since = now
        elif now - self._alone_since > _TELL_AFTER:
            self._alone_since = now
            _log.warning(
                "none of the workers is left, and the run waits for room for others in the "
                "cluster, which has %d cores in all",
                sum(self.cluster.cores()),
            )

    def _lose(self, worker: Worker, error: WorkerError) -> None:
        """Takes note that a worker is gone; another takes its place after a pause."""
        self.losses.take(worker, self.workers, error)
        self.cluster.kill(worker.handle)  # it may only have been out of reach
        worker.handle, worker.ready, worker.gave = None, False, False
        self.past_faults += worker.faults
        worker.faults, worker.silent = Counter(), False
        self._forget(worker)
        doublings = min(worker.losses - 1, _MOST_DOUBLINGS)
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**doublings)
        worker.retry_at = time.monotonic() + pause

    # ---- rollouts

    def collect(self, policy: Any, stop: Callable[[], bool]) -> Rollout | None:
        """Takes the rollouts of an update, and joins them.

        Args:
            policy: The learner's; its version says how old a rollout is.
            stop: Asked while waiting, also by who waits for a shard of the replay.

        Returns:
            A rollout; None if `stop` said so before it was whole.

        Raises:
            WorkerError: An environment failed, or too many workers or the cluster were lost.
        """
        self.cluster.stop = stop
        while not self._wait_for_all(stop):
            if stop():
                return None
        if policy.version != self._published[0]:
            self._published = policy.version, self.cluster.put(self.publish())
        left, self._parts = self._parts, []
        for part in left:
            self._keep(part, policy.version)
        while True:
            self._tend()
            wanted = self.num_parts or max(1, len(self._ready()))
            if len(self._parts) >= wanted:
                # Where there are fewer workers than when they were asked, none is left for later.
                wanted = len(self._parts) if self.blocking else wanted
                break
            self._ask_for_rollouts(wanted)
            if stop():
                return None
            self._take_next(policy.version)
        parts, self._parts = self._parts[:wanted], self._parts[wanted:]
        # In an order that does not depend on who was first.
        parts.sort(key=lambda part: _place(part.rollout))
        self.reports = parts
        # A worker's versions never fall: what was dropped is older than what is kept for later.
        self.taken = sorted([*self._too_old, *(part.rollout for part in parts)], key=_place)
        self._too_old = []
        self.lags = [policy.version - part.rollout.origin.version for part in parts]
        self.lag_counts.update(map(lag_class, self.lags))
        self.seconds = max(part.seconds for part in parts)
        if not self.blocking:
            self._ask_for_rollouts(wanted)
        joined = join_rollouts([part.rollout for part in parts])
        # A worker that came or went may have left a rollout of the version before.
        return joined._replace(outputs=None) if any(self.lags) else joined

    def _wait_for_all(self, stop: Callable[[], bool]) -> bool:
        """Whether all workers have started, which the first update waits for."""
        self._tend()
        if self._complete:
            return True
        if len(self._ready()) < len(self.workers):
            self._take_next(0)
        ready = len(self._ready())
        late = time.monotonic() > self._tell_at
        # What comes out of a blocking run depends on the number of its workers.
        fixed = self.blocking and self.num_workers is not None
        self._complete = ready == len(self.workers) or (late and ready > 0 and not fixed)
        if late and ready < len(self.workers):
            self._tell_at = time.monotonic() + _TELL_AFTER
            goes_on = ", and the run goes on with them" if self._complete else ""
            _log.warning(
                "%d of %d workers have started%s; the others wait for room in the cluster, which "
                "has %d cores in all",
                *(ready, len(self.workers), goes_on),
                sum(self.cluster.cores()),
            )
        return self._complete

    def _ask_for_rollouts(self, wanted: int) -> None:
        ready = self._ready()
        if not self.blocking:
            for worker in ready:
                while worker.pending < _AHEAD:
                    self._ask_for_rollout(worker)
            return
        missing = wanted - len(self._parts) - sum(worker.pending for worker in ready)
        # Each worker in turn; one that was lost leaves its share to the others.
        given = Counter(part.rollout.origin.worker for part in self._parts)
        for _ in range(missing if ready else 0):
            worker = min(ready, key=lambda w: (w.pending + given[w.index], w.index))
            self._ask_for_rollout(worker)

    def _ask_for_rollout(self, worker: Worker) -> None:
        request = Request(worker.index, worker.begun, worker.sequence)
        worker.sequence += 1
        worker.pending += 1
        told = (self._published[1], self._seed, worker.begun, request.sequence)
        if self.apart:
            in_two = worker.handle.collect_apart.options(num_returns=2)
            answers = self.cluster.call(in_two.remote, *told)
        else:
            answers = [self.cluster.call(worker.handle.collect.remote, *told)]
        self._ask(request, answers)

    def _ask(self, request: Request, answers: list[Any]) -> None:
        # Its thread fetches the first answer, from another node if need be.
        future = self.cluster.call(answers[0].future)
        self._requests[request] = Asked(answers, future, time.monotonic())
        worker = self.workers[request.worker]

        def take_note(done: Any) -> None:
            worker.heard = time.monotonic()
            self._answers.put((request, done))

        future.add_done_callback(take_note)

    def _take_next(self, version: int) -> None:
        try:
            request, done = self._answers.get(timeout=_POLL)
        except queue.Empty:
            return
        if request not in self._requests:  # of episodes that are over
            return
        worker = self.workers[request.worker]
        if request.sequence > worker.expected:  # Ray may hand over the later of two first
            worker.early[request.sequence] = request, done
            return
        answers = self._requests.pop(request).answers
        try:
            answer = self.cluster.call(done.result)
        except (ActorLostError, CallFailedError) as error:
            if why := getattr(error, "unmakeable", ""):
                raise UserError(
                    f"worker {worker.index} cannot be made: {why}\nWhat the environment is made "
                    "from has to be installed on every node of the cluster"
                ) from None
            self._lose(worker, error)
            return
        match answer:
            case Failure():
                tell_warnings(worker, answer.warnings)
                raise error_of(worker, answer)
            case Report():
                tell_warnings(worker, answer.warnings)
                content = answers[1] if self.apart else None
                self._take(worker, answer._replace(content=content), version)
            case Started():
                worker.ready, (worker.where, worker.node) = True, answer

    def _take(self, worker: Worker, report: Report, version: int) -> None:
        origin = report.rollout.origin
        expected = (worker.index, worker.expected, worker.begun)
        if origin[1:] != expected:
            raise WorkerError(
                f"worker {worker.index} gave rollout {origin}, not the expected {expected}: please "
                "report this"
            )
        worker.expected += 1
        worker.pending -= 1
        if worker.expected in worker.early:
            self._answers.put(worker.early.pop(worker.expected))
        worker.gave, worker.losses = True, 0
        worker.longest, worker.silent = max(worker.longest, report.seconds), False
        worker.faults = Counter(report.faults)
        self._keep(report, version)

    def _keep(self, report: Report, version: int) -> None:
        """Has a rollout for the next update, unless it is too old."""
        if version - report.rollout.origin.version <= self.max_policy_lag:
            self._parts.append(report)
        else:
            self.dropped += 1
            self._too_old.append(only_counted(report.rollout))

    def close(self) -> None:
        """Ends the workers; idempotent."""
        for worker in self.workers:
            if worker.handle is not None:
                self.cluster.kill(worker.handle)
            worker.handle, worker.ready = None, False
        self.workers, self._requests = [], {}


def _place(rollout: Rollout) -> tuple[int, int]:
    """Whose rollout it is, and which of these."""
    return rollout.origin.worker, rollout.origin.sequence


Pool = ActorPool | RayPool
"""What gives rollouts that several have collected."""
