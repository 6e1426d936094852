"""What algorithms with workers on a Ray cluster can be told. Imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerParameters:
    """Parameters of workers on a Ray cluster."""

    num_workers: int | Literal["all"] | None = None
    """Ray actors that collect. None: as many as 80 % of the cluster's cores give room for; all: as
    many as all cores but one do, however many there are as nodes come and go."""

    num_envs: int = 8
    """Parallel environments of each worker."""

    cpus_per_worker: float = 1.0
    """Cores that Ray keeps for a worker, who may step environments in as many threads or
    processes. Shares of one are possible, for environments that mostly wait."""

    worker_restarts: int = 100
    """Workers, or nodes with theirs, that may be lost and are started anew, before the run fails;
    as many shards of a replay may be lost."""

    address: str | None = None
    """HOST:PORT of the Ray cluster to use. None: that which is connected already, or one that is
    started on this machine for the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardParameters:
    """Parameters of a replay on a Ray cluster."""

    replay_shards: int = 0
    """Ray actors that keep the replay between them, each for some of the workers, at most
    num_workers. 0: the learner keeps it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedParameters(WorkerParameters):
    """Parameters of how the rollouts of workers come together."""

    num_steps: int = 64
    """Steps each environment makes per rollout; steps_per_worker, where given, decides it."""

    steps_per_worker: int | None = None
    """Rows (environment steps) in a worker's rollout. None: num_envs x num_steps."""

    buffer_size: int | None = None
    """Rows that an update learns from, made of rollouts of any workers that there are. None:
    num_workers x steps_per_worker, and with num_workers all that of the workers at the time."""

    sync_mode: Literal["blocking", "non_blocking"] = "blocking"
    """blocking: workers collect with the newest parameters, and wait for the update. non_blocking:
    they go on meanwhile; V-trace corrects for the lag."""
