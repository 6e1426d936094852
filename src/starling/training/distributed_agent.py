"""What trainers have in common whose workers are on a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import gymnasium
import jax

from starling.envs.copies import pack_factories
from starling.envs.vector_env import VectorEnv
from starling.errors import UserError
from starling.storage.rollout import Rollout
from starling.training.actor import Published
from starling.training.environments import chosen_backend
from starling.training.ray_cluster import Cluster, room_on
from starling.training.ray_pool import RayPool
from starling.training.ray_worker import RolloutWorker, worker_cores
from starling.training.training_agent import TrainingAgent


class DistributedAgent(TrainingAgent):
    """Environments that belong to workers: the first base of `DistributedPPO` and `DistributedDQN`.

    Its config has `WorkerParameters`, and its algorithm is an `ActorAlgorithm`.
    """

    config: Any
    _cluster: Cluster | None = None
    _pool: RayPool | None = None

    @property
    def envs(self) -> VectorEnv:
        """One environment, which says what the policy is to be made for; workers have their own."""
        if self._envs is None:
            if isinstance(self._source, gymnasium.vector.VectorEnv):
                raise UserError(
                    "workers make environments of their own, and a vector environment that exists "
                    "cannot be shared out: give an id or a factory"
                )
            config, cores = self.config, worker_cores(self.config)
            # Refused before Ray is started, which has no plain word for it.
            instead = f"algo {config.algo.removeprefix('distributed_')}"
            pack_factories((self._source, config.env_kwargs), "a worker on a cluster", instead)
            # For what a worker has: one environment alone never pays for processes.
            backend = chosen_backend(self._source, config, config.num_envs, cores, self.in_programs)
            self.config = dataclasses.replace(config, backend=backend)
            self._envs = self._new_envs(1, 1)
            # Before JAX has threads: starting Ray forks.
            self._cluster = Cluster(self.config.address)
            self._fit_to_cluster()
        return self._envs

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, Any]:
        """Learns from rollouts of this policy or of older ones.

        Args:
            rollout: As workers describe it.
            progress: Share of the training that is done, in [0, 1], for the schedules.

        Returns:
            Metrics by their logged names.
        """
        metrics = self._learn(rollout, progress)
        return metrics if self._pool is None else metrics | self._pool.metrics()

    def _publish(self) -> Published:
        return Published(self.version, jax.device_get(self.acting))

    def _new_pool(
        self, num_parts: int | None, blocking: bool, max_policy_lag: float, **beside: Any
    ) -> RayPool:
        self.envs  # noqa: B018 - with them goes the cluster, after `close`
        config, cluster = self.config, self._cluster
        assert cluster is not None
        return RayPool(
            cluster,
            self._worker_maker(cluster),
            self._publish,
            num_workers=None if config.num_workers == "all" else config.num_workers,
            cpus_per_worker=config.cpus_per_worker,
            num_parts=num_parts,
            blocking=blocking,
            max_policy_lag=max_policy_lag,
            restarts=config.worker_restarts,
            **beside,
        )

    def _fit_to_cluster(self) -> None:
        """Settles on a number of workers, or refuses the one that was asked for."""
        config, cluster = self.config, self._cluster
        assert cluster is not None
        nodes, cpus, workers = cluster.on_nodes("CPU"), config.cpus_per_worker, config.num_workers
        cores, most = sum(nodes), max(nodes)
        if cpus > most:
            raise UserError(
                f"cpus_per_worker {cpus:g} is more than any node of the cluster has: the largest "
                f"has {most:g} cores; use cpus_per_worker {most:g} or less"
            )
        room = room_on(nodes, cpus)
        if workers is None:
            # 80 % of the cores have room for so many.
            workers = max(1, min(room, int(0.8 * cores / cpus)))
            self.config = dataclasses.replace(config, num_workers=workers)
        elif workers != "all" and workers > room:
            needed = workers * cpus
            apart = "" if needed > cores else f", on nodes with room for {room} such workers"
            raise UserError(
                f"num_workers {workers} x cpus_per_worker {cpus:g} = {needed:g} cores, and the "
                f"cluster has {cores:g}{apart}: use num_workers {room}, more environments in each "
                "(num_envs), or a share of a core for each (cpus_per_worker 0.5)"
            )

    def _worker_maker(self, cluster: Cluster) -> Any:
        config = dataclasses.replace(self.config, device="cpu")
        spaces = (self.observation_space, self.action_space)
        told = (self._source, config, spaces, self.algorithm_class, self.in_programs)
        shared = cluster.put(told)
        remote = spread(cluster.ray, RolloutWorker, config.cpus_per_worker)
        return lambda index: remote.remote(index, shared)

    def close(self) -> None:
        """Ends the workers, the connection to Ray, and the environments; idempotent."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
        super().close()


def spread(ray: Any, actor: type, num_cpus: float) -> Any:
    """Ray's class of actors that are spread over the nodes, and not begun anew by Ray itself."""
    return ray.remote(actor).options(
        num_cpus=int(num_cpus * 10_000) / 10_000,  # the digits that Ray takes; never more than that
        max_restarts=0,
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": {"JAX_PLATFORMS": "cpu", "PYTHONPATH": _own_path()}},
    )


def _own_path() -> str:
    """Where this process finds modules that are not installed: workers here find them, too.

    Ray fills in what the node has been told itself, or nothing: with the stroke behind it, that is
    no empty path, which would be the folder that Ray was started in.
    """
    installed = (sys.prefix, sys.base_prefix)
    own = [os.path.abspath(path) for path in sys.path if not path.startswith(installed)]
    return os.pathsep.join([*own, "${PYTHONPATH}/"])
