"""One actor: environments of its own, stepped with parameters that are published to all."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from starling.algorithms.acting import Acting
from starling.envs.vector_env import VectorEnv
from starling.storage.rollout import Rollout, RolloutBuffer
from starling.training.collector import HostCollector
from starling.training.compiled_collector import CompiledCollector
from starling.training.sampler import Action, Sampler

Tree = Any

_BUFFERS = 2  # one is filled while the learner has the other


class Published(NamedTuple):
    """What to act with, and its version."""

    version: int
    acting: Acting


class ActorAlgorithm(Protocol):
    """What actors ask of an algorithm, besides choosing actions."""

    def begin(self, num_envs: int) -> Any:
        """What an actor carries from rollout to rollout, where its environments begin episodes."""
        ...

    def share(self, acting: Acting, actor: int, num_envs: int) -> Acting:
        """What an actor of so many environments acts with, of what is published to all."""
        ...

    def describe(self, acting: Acting, rollout: Rollout, carry: Any, /) -> tuple[Rollout, Any]:
        """Adds what a rollout needs to be learnt from later; also what is carried on."""
        ...


class Actor:
    """One actor: environments, noise, and what it carries from rollout to rollout.

    Args:
        index: Its number.
        envs: Its environments.
        algorithm: Chooses the actions.
        sampler: Draws them.
        in_programs: Whether compiled environments are stepped inside a program.

    Attributes:
        free: Buffers that it may fill; None ends its thread.
        version: Of the parameters that it acts with.
        acting: These parameters, and what goes with them.
        since: When it began what it is at, a rollout or other environments; None where it waits.
        longest: Seconds that one took, at most.
    """

    acting: Acting

    def __init__(
        self, index: int, envs: VectorEnv, algorithm: Any, sampler: Sampler, in_programs: bool
    ):
        self.index, self.sampler, self.in_programs = index, sampler, in_programs
        self.algorithm: ActorAlgorithm = algorithm
        self.free: queue.SimpleQueue[RolloutBuffer | None] = queue.SimpleQueue()
        self.version = self.restarts = 0
        self.since: float | None = None
        self.longest = 0.0
        self._past_faults: Counter[str] = Counter()
        self._changing = threading.Lock()
        self._take(envs)

    def _take(self, envs: VectorEnv) -> None:
        num_steps = self.sampler.num_steps
        self.envs = envs
        if envs.compiled is None or not self.in_programs:
            self.collector = HostCollector(envs, num_steps)
        else:
            device = self.sampler.device
            self.collector = CompiledCollector(envs, num_steps, self.sampler.algorithm, device)

    def reset(self, seed: int | Sequence[int] | None) -> None:
        """Begins new episodes, with empty buffers."""
        self.since = None
        self.collector.reset(seed)
        self.sampler.forget()
        self.carry = self.algorithm.begin(self.envs.num_envs)
        self.free, self._num_buffers = queue.SimpleQueue(), 0
        self.provide(_BUFFERS)

    def provide(self, num_buffers: int) -> None:
        """Sees to it that there are so many buffers at least."""
        for _ in range(self._num_buffers, num_buffers):
            self.free.put(RolloutBuffer(self.sampler.num_steps, self.envs.num_envs))
        self._num_buffers = max(self._num_buffers, num_buffers)

    @property
    def faults(self) -> Counter[str]:
        """What its environments survived, those that it no longer has included, by name."""
        with self._changing:
            # Copied in one go: whoever steps them may be adding a name.
            return self._past_faults + Counter(dict(self.envs.faults))

    def begin_anew(self, envs: VectorEnv, seeds: int | Sequence[int] | None) -> None:
        """Goes on with other environments, after its own failed."""
        sequence = self.collector.sequence
        with self._changing:
            faults = Counter(dict(self.envs.faults))
            self._take(envs)
            self._past_faults += faults
        self.collector.sequence = sequence
        self.restarts += 1
        self.reset(seeds)

    def collect(
        self, buffer: RolloutBuffer, published: Published, stop: Callable[[], bool]
    ) -> Rollout | None:
        """Fills a buffer with one policy; None if `stop` said so before it was full."""
        if isinstance(self.collector, HostCollector):
            self.collector.buffer = buffer
        self.version = published.version
        self.acting = self.algorithm.share(published.acting, self.index, self.envs.num_envs)
        self.since = start = time.monotonic()
        rollout = self.collector.collect(self, stop)
        self.since, self.longest = None, max(self.longest, time.monotonic() - start)
        if rollout is None:
            return None
        rollout, self.carry = self.algorithm.describe(self.acting, rollout, self.carry)
        origin = rollout.origin._replace(worker=self.index, restarts=self.restarts)
        return rollout._replace(origin=origin)

    def act(self, observations: Tree, action_mask: Any, policy_state: Tree) -> Action:
        """Samples actions with the parameters that the rollout was begun with."""
        return self.sampler.act(self.acting, observations, action_mask, policy_state)
