"""What a Ray actor does: collects rollouts, with environments and a copy of the policy."""

from __future__ import annotations

import collections
import logging
import os
import socket
import time
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np

from starling.envs.seeding import child_seeds
from starling.errors import StarlingError, UserError, said, traceback_of
from starling.networks.normalization import RunningStatistics
from starling.storage.rollout import Rollout, RolloutBuffer
from starling.training.actor import Actor, Published
from starling.training.compilation_cache import keep_compiled_programs
from starling.training.device import prepare_cpu
from starling.training.environments import new_envs
from starling.training.fit import check_fit
from starling.training.sampler import Sampler

_MOST_WARNINGS = 100  # that a worker keeps for the learner

Warned = tuple[int, str, str]
"""Level of something that Starling's code logged, its logger, and what it says."""


class Started(NamedTuple):
    """What a worker gives that is ready.

    Attributes:
        where: Its process and node.
        node: Ray's name of the node.
    """

    where: str
    node: str


class Report(NamedTuple):
    """What a worker gives for a request.

    Attributes:
        rollout: In NumPy; of a rollout that is elsewhere only what episodes are counted from.
        faults: What went wrong in its environments and was survived, by name.
        seconds: That collecting took.
        warnings: What was warned of there, since the last report.
        content: Where the whole rollout is in Ray's object store; None where it is here.
        seen: Statistics of its observations, where these are elsewhere and are to be normalised.
    """

    rollout: Rollout
    faults: dict[str, int]
    seconds: float
    warnings: list[Warned]
    content: Any = None
    seen: RunningStatistics | None = None


class Failure(NamedTuple):
    """What a worker gives where it cannot go on.

    Attributes:
        where: Its process and node.
        error: What it says.
        traceback: Of what has failed.
        wrong_input: Whether it was the user's mistake.
        warnings: As in `Report`.
    """

    where: str
    error: str
    traceback: str
    wrong_input: bool
    warnings: list[Warned]


class Warnings(logging.Handler):
    """Keeps what Starling's own code warns of, until the learner is told."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self._kept: collections.deque[Warned] = collections.deque(maxlen=_MOST_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one, the newest rather than the oldest where there are too many."""
        self._kept.append((record.levelno, record.name, record.getMessage()))

    def take(self) -> list[Warned]:
        """What was warned of since this was last asked."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


class RolloutWorker:
    """Collects when it is asked to. Nothing but whole rollouts goes back.

    What it was doing is lost with it: whoever takes its place is told the same number of episodes
    begun anew, plus one, and begins others.

    Args:
        index: Its number among the workers.
        told: Source of the environments, as `make_vec` takes it; the run's configuration; the
            spaces of observations and actions, as the policy has them; what makes the algorithm;
            and whether compiled environments may be stepped inside a program.
    """

    def __init__(
        self,
        index: int,
        told: tuple[Any, Any, tuple[gymnasium.Space, gymnasium.Space], Any, bool],
    ):
        self.index = index
        self.source, self.config, self.spaces, self.algorithm_class, self.in_programs = told
        self.where = f"pid {os.getpid()} on node {socket.gethostname()}"
        self._episodes: tuple[int, int] | None = None
        self._warnings = Warnings()
        logging.getLogger("starling").addHandler(self._warnings)

    def start(self) -> Started | Failure:
        """Makes the environments; says where it is."""
        import ray  # which is not needed to import this

        try:
            config, cores = self.config, worker_cores(self.config)
            prepare_cpu(0.0 if cores == 1 else np.inf)
            keep_compiled_programs()
            n, first = config.num_envs, self.index * config.num_envs
            self.envs = new_envs(self.source, config, n, cores, self.in_programs, first)
            spaces = (self.envs.single_observation_space, self.envs.single_action_space)
            check_fit(config.env, self.spaces, spaces)
            self.algorithm = self.algorithm_class(*self.spaces, config, config, config.num_envs)
        except Exception as error:
            return self._failure(error)
        return Started(self.where, ray.get_runtime_context().get_node_id())

    def collect(
        self, published: Published, seed: int, begun: int, sequence: int
    ) -> Report | Failure:
        """Collects one rollout.

        Args:
            published: What to act with.
            seed: Of the run.
            begun: How often this worker's episodes were begun anew.
            sequence: The number that the rollout gets.
        """
        start = time.monotonic()
        try:
            if self._episodes != (seed, begun):
                self._begin(seed, begun)
            self.actor.collector.sequence = sequence
            rollout = self.actor.collect(self.buffer, published, _never)
        except Exception as error:
            return self._failure(error)
        assert rollout is not None
        rollout, faults = jax.device_get(rollout), dict(self.envs.faults)
        return Report(rollout, faults, time.monotonic() - start, self._warnings.take())

    def collect_apart(self, *request: Any) -> tuple[Report | Failure, Rollout | None]:
        """As `collect`, in two objects: what the learner counts by, and the whole rollout."""
        report = self.collect(*request)
        if isinstance(report, Failure):
            return report, None
        rollout, seen = report.rollout, None
        if self.config.normalize_observations:
            before = jax.tree.map(lambda x: x[:-1], rollout.observations)
            seen = jax.device_get(self.algorithm.seen(before, rollout.valid))
        counted = rollout._replace(
            observations=None, actions=None, final_observations=None, final_index=None,
            action_masks=None, priorities=None,
        )  # fmt: skip
        return report._replace(rollout=counted, seen=seen), rollout

    def _begin(self, seed: int, begun: int) -> None:
        config, device = self.config, jax.local_devices(backend="cpu")[0]
        words = np.random.SeedSequence([seed, self.index, begun]).generate_state(2)
        sampler = Sampler(self.algorithm, config.num_steps, int(words[0]), device)
        self.actor = Actor(self.index, self.envs, self.algorithm, sampler, self.in_programs)
        self.actor.restarts = begun
        self.buffer = RolloutBuffer(config.num_steps, config.num_envs)
        self.actor.reset(child_seeds(int(words[1]), config.num_envs))
        self._episodes = (seed, begun)

    def _failure(self, error: Exception) -> Failure:
        own = isinstance(error, StarlingError)
        told = str(error) if own else f"{type(error).__name__}: {said(error)}"
        # Of an environment's failure that of the environment, which the message has already.
        text = getattr(error, "original_traceback", "") or traceback_of(error)
        wrong_input = isinstance(error, UserError)
        return Failure(self.where, told, text, wrong_input, self._warnings.take())


def worker_cores(config: Any) -> int:
    """Whole cores that a worker has: its threads or processes that step environments."""
    return max(1, int(config.cpus_per_worker))


def _never() -> bool:
    return False
