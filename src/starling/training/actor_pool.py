"""Actors on threads of their own, which fill rollouts while the learner learns.

Every actor has its own environments, noise and two buffers. It fills one with the newest
parameters, hands it over by reference, and goes on with the other; when both are with the learner
it waits. So nothing is pickled, no queue grows, and a rollout is a few updates old at most.

Threads suffice: compiled programs run without the interpreter lock, and so do environments in
worker processes, in EnvPool or asleep.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from starling.envs.restarts import first_line
from starling.envs.seeding import child_seeds
from starling.envs.vector_env import VectorEnv
from starling.errors import StarlingError, StoppedError, UserError
from starling.storage.rollout import Rollout, RolloutBuffer, join_rollouts
from starling.training.actor import Actor, Published
from starling.training.episode_counter import only_counted
from starling.training.policy_lag import lag_class, lag_metrics

Tree = Any
BeginAnew = Callable[[Callable[[], bool]], bool]
"""Makes other environments for an actor; False if what it is given said to stop."""

_POLL = 0.05  # seconds between two questions whether to stop
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0  # seconds before an actor is begun anew once more
_TELL_AFTER = 30.0  # seconds of an actor's rollout, or ten times as long as it ever took
_PATIENCE = 5.0  # seconds that closing waits for an actor to end its step

_log = logging.getLogger(__name__)


class HandedOver(NamedTuple):
    """What an actor's thread puts into the queue: a full buffer, or what ended it.

    With neither it has begun anew.
    """

    actor: Actor
    buffer: RolloutBuffer | None = None
    rollout: Rollout | None = None
    error: BaseException | None = None


class ActorPool:
    """Actors, and the learner's side of them: a source of rollouts for a trainer.

    A rollout that it gives is made of `num_parts` of the actors', from whichever were first, and is
    valid until the next is asked for.

    Args:
        actors: Each with as many environments as the others.
        new_envs: Makes environments for an actor that failed, by its index.
        published: Gives the newest parameters; called by the actors at each rollout's beginning.
        num_parts: Rollouts of actors in one of the pool's.
        max_policy_lag: Rollouts older than this are dropped.
        restarts: Failures of actors to survive.
        serial: Collect on the caller's thread, one actor after the other.

    Attributes:
        taken: What the last rollout was made of, and what was dropped meanwhile (without its
            observations), in order.
        lags: Updates since the parameters of each part of the last rollout.
        lag_counts: Parts of all rollouts so far by their lag, by logged names.
        dropped: Rollouts dropped so far.
        restarted: Actors begun anew so far.
        retired: Indices of actors that have no environment left; the others go on without them.
        activity: What a trainer that waits for a rollout is doing.
    """

    def __init__(
        self,
        actors: list[Actor],
        new_envs: Callable[[int], VectorEnv],
        published: Callable[[], Published],
        num_parts: int,
        max_policy_lag: float,
        restarts: int,
        serial: bool,
    ):
        self.actors, self.new_envs, self.published = actors, new_envs, published
        self.num_parts, self.max_policy_lag = num_parts, max_policy_lag
        self.restarts, self.serial = restarts, serial
        self.activity = "collect" if serial else "wait"
        self.dropped = self.restarted = 0
        self.lag_counts: Counter[str] = Counter()
        self.retired: set[int] = set()
        self.sequence = self._turns = 0
        self._seed: int | None = None
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._away: set[int] = set()  # who has yet to begin anew
        self._pauses: dict[int, float] = {}  # before the next time, for who has given nothing since
        self._begin()

    def _begin(self) -> None:
        self._ready: queue.SimpleQueue[HandedOver] = queue.SimpleQueue()
        self._held: list[HandedOver] = []
        self._parts: list[HandedOver] = []
        self.taken: list[Rollout] = []
        self.lags: list[int] = []
        self._expected = {actor.index: actor.collector.sequence for actor in self.actors}
        self._told: set[int] = set()  # actors that were said to hang

    @property
    def going(self) -> list[Actor]:
        """The actors that have environments left."""
        return [actor for actor in self.actors if actor.index not in self.retired]

    @property
    def faults(self) -> Counter[str]:
        """What went wrong so far and was survived, in all actors, by name."""
        restarted = Counter(actor_restarts=self.restarted)
        return sum((actor.faults for actor in self.actors), restarted)

    def metrics(self) -> dict[str, Any]:
        """How old the last rollout is, by logged names."""
        return lag_metrics(self.lags, self.lag_counts, self.dropped)

    def reset(self, seed: int | None) -> None:
        """Begins new episodes everywhere, and the actors' threads.

        Raises:
            StarlingError: Threads of before are still at a step, and have the environments.
        """
        if busy := self._end_threads(_TELL_AFTER):
            raise StarlingError(
                f"{busy} did not end its step within {_TELL_AFTER:g} s: train again once it has, "
                "or with an agent of its own"
            )
        self._seed = seed
        width = self.actors[0].envs.num_envs
        seeds = child_seeds(seed, width * len(self.actors)) if len(self.actors) > 1 else []
        for actor in self.going:
            own = seeds[actor.index * width :][:width] if seeds else seed
            try:
                if actor.index in self._away:
                    actor.envs.close()
                    actor.begin_anew(self.new_envs(actor.index), own)
                else:
                    actor.reset(own)
            except Exception as error:
                self._retire(actor, error)
        self._away, self._pauses = set(), {}
        self._begin()
        self._share_buffers()
        if not self.serial:
            # A process that ends without `close` must not leave threads inside compiled programs.
            weakref.finalize(self, _ask_to_end, self._closing, self.actors)
            for actor in self.going:
                self._start(actor)

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Refused: what actors are about to do cannot be brought back."""
        raise UserError("actors cannot go on exactly where they stopped: leave out exact_resume")

    def _start(self, actor: Actor, begin_anew: BeginAnew | None = None) -> None:
        name = f"starling-actor-{actor.index}"
        told = (actor, begin_anew)
        thread = threading.Thread(target=self._work, args=told, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, actor: Actor, begin_anew: BeginAnew | None) -> None:
        ready, closing = self._ready, self._closing.is_set  # those of now: a reset makes others
        try:
            if begin_anew is not None:
                if not begin_anew(closing):
                    return
                ready.put(HandedOver(actor))
            free = actor.free
            while not closing() and (buffer := free.get()) is not None:
                rollout = actor.collect(buffer, self.published(), closing)
                if rollout is None:
                    return
                ready.put(HandedOver(actor, buffer, rollout))
        except BaseException as error:
            ready.put(HandedOver(actor, error=error))

    def collect(self, policy: Any, stop: Callable[[], bool]) -> Rollout | None:
        """Takes `num_parts` rollouts, and joins them.

        Args:
            policy: The learner's; its version says how old a rollout is.
            stop: Asked while waiting.

        Returns:
            A rollout, valid until the next one; None if `stop` said so before it was whole.

        Raises:
            Exception: What ended an actor, with its traceback.
        """
        if not self._parts:
            self._release()
        while len(self._parts) < self.num_parts:
            handed_over = self._next(stop)
            if handed_over is None:
                return None
            try:
                self._take(handed_over, policy.version, stop)
            except StoppedError:
                return None
        self._held, self._parts = self._parts, []
        rollouts = [part.rollout for part in self._held if part.rollout is not None]
        self.lags = [policy.version - rollout.origin.version for rollout in rollouts]
        self.lag_counts.update(map(lag_class, self.lags))
        return join_rollouts(rollouts)

    def _release(self) -> None:
        for actor, buffer, rollout, _ in self._held:
            # Who has begun anew since then has buffers of its own.
            if rollout is not None and rollout.origin.restarts == actor.restarts:
                actor.free.put(buffer)
        self._held, self.taken = [], []

    def _next(self, stop: Callable[[], bool]) -> HandedOver | None:
        if self.serial:
            while (actor := self.going[self._turns % len(self.going)]).free.empty():
                self._turns += 1
            buffer = actor.free.get()
            assert buffer is not None
            try:
                rollout = actor.collect(buffer, self.published(), stop)
            except Exception as error:
                return HandedOver(actor, error=error)
            if rollout is None:
                return None
            self._turns += 1
            return HandedOver(actor, buffer, rollout)
        while not stop():
            self._tell_of_silence()
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=_POLL)
        return None

    def _tell_of_silence(self) -> None:
        now = time.monotonic()
        for actor in self.actors:
            since = actor.since
            if since is None or now - since <= max(_TELL_AFTER, 10 * actor.longest):
                self._told.discard(actor.index)
            elif actor.index not in self._told:
                self._told.add(actor.index)
                _log.warning(
                    "actor %d has handed over nothing for %.0f s: if an environment hangs, "
                    "step_timeout ends it in worker processes only (backend process)",
                    *(actor.index, now - since),
                )

    def _take(self, handed_over: HandedOver, version: int, stop: Callable[[], bool]) -> None:
        actor, buffer, rollout, error = handed_over
        if error is not None:
            return self._survive(actor, error, stop)
        if rollout is None:
            return self._has_begun(actor)
        sequence = rollout.origin.sequence
        if sequence != self._expected[actor.index]:
            raise StarlingError(
                f"actor {actor.index} handed over rollout {sequence}, not the expected "
                f"{self._expected[actor.index]}: please report this"
            )
        self._expected[actor.index] += 1
        self._pauses.pop(actor.index, None)
        if version - rollout.origin.version <= self.max_policy_lag:
            self.taken.append(rollout)
            self._parts.append(handed_over)
            return None
        self.taken.append(only_counted(rollout))
        self.dropped += 1
        assert buffer is not None
        return actor.free.put(buffer)

    def _survive(self, actor: Actor, error: BaseException, stop: Callable[[], bool]) -> None:
        """Has an actor begin anew, goes on without it, or raises what ended it."""
        spent = self.restarted >= self.restarts or not isinstance(error, Exception)
        if spent or _none_left(actor):
            self._retire(actor, error)
            return self._share_buffers()
        self.restarted += 1
        told = first_line(error) if isinstance(error, StarlingError) else repr(error)
        _log.warning("actor %d failed and begins anew: %s", actor.index, told)
        self._away.add(actor.index)
        pause = self._pauses.get(actor.index, 0.0)
        self._pauses[actor.index] = min(_LONGEST_PAUSE, max(_FIRST_PAUSE, 2 * pause))
        self._expected[actor.index] = actor.collector.sequence
        self._share_buffers()
        seed = np.random.SeedSequence([self._seed or 0, actor.index, self.restarted])
        seeds = child_seeds(int(seed.generate_state(1)[0]), actor.envs.num_envs)
        begin_anew = functools.partial(self._begin_anew, actor, pause, seeds)
        if not self.serial:
            return self._start(actor, begin_anew)  # the others go on meanwhile
        try:
            begun = begin_anew(stop)
        except Exception as again:
            return self._survive(actor, again, stop)
        if not begun:
            raise StoppedError
        return self._has_begun(actor)

    def _begin_anew(
        self, actor: Actor, pause: float, seeds: list[int], stop: Callable[[], bool]
    ) -> bool:
        """Makes other environments for an actor; False if `stop` said so meanwhile."""
        actor.since = time.monotonic()
        with contextlib.suppress(Exception):
            actor.envs.close()
        if not _wait(pause, stop):
            return False
        envs = self.new_envs(actor.index)
        if stop():  # and whoever asked may have the actor begin by now
            envs.close()
            return False
        actor.begin_anew(envs, seeds)
        return True

    def _has_begun(self, actor: Actor) -> None:
        self._away.remove(actor.index)
        self._share_buffers()

    def _retire(self, actor: Actor, error: BaseException) -> None:
        """Goes on without an actor that has no environment left; raises anything else."""
        if not _none_left(actor) or len(self.going) == 1:
            error.add_note(f"(in actor {actor.index} of {len(self.actors)})")
            raise error
        self.retired.add(actor.index)
        self._away.discard(actor.index)
        actor.since = None
        actor.envs.close()
        _log.warning(
            "actor %d ends, as none of its environments is left (actors that go on: %d): %s",
            *(actor.index, len(self.going), first_line(error)),
        )

    def _share_buffers(self) -> None:
        """Gives the actors that collect as many buffers as a rollout has parts, all told."""
        collecting = [actor for actor in self.going if actor.index not in self._away]
        for actor in collecting:
            actor.provide(-(-self.num_parts // len(collecting)))

    def close(self) -> None:
        """Ends the threads and the environments; idempotent."""
        if busy := self._end_threads(_PATIENCE):
            _log.warning("%s did not end its step within %g s", busy, _PATIENCE)
        for actor in self.actors:
            actor.envs.close()

    def _end_threads(self, patience: float) -> str:
        """Has the threads end; the names of those that have not."""
        _ask_to_end(self._closing, self.actors)
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if not self._threads:
            self._closing = threading.Event()
        return ", ".join(thread.name for thread in self._threads)


def _none_left(actor: Actor) -> bool:
    """Whether all environments of an actor were dropped."""
    return actor.envs.faults["dropped_envs"] == actor.envs.num_envs


def _wait(seconds: float, stop: Callable[[], bool]) -> bool:
    """Waits; False if `stop` said so meanwhile."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stop():
            return False
        time.sleep(min(left, _POLL))
    return True


def _ask_to_end(closing: threading.Event, actors: list[Actor]) -> None:
    closing.set()
    for actor in actors:  # whoever has other buffers from here on looks whether it is closing
        actor.free.put(None)
