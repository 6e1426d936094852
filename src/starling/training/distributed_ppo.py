"""`DistributedPPO`: PPO whose environments are spread over a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import gymnasium
import jax

from starling.algorithms.vtrace_ppo import Acting, VTracePPO
from starling.configs import DistributedPPOConfig
from starling.envs.vector_env import VectorEnv
from starling.errors import UserError
from starling.storage.rollout import Rollout
from starling.training.actor_pool import Published
from starling.training.ray_cluster import Cluster
from starling.training.ray_pool import RayPool, rooms
from starling.training.ray_worker import RolloutWorker
from starling.training.training_agent import TrainingAgent


class DistributedPPO(TrainingAgent):
    """Trains a policy by PPO from rollouts of workers on a Ray cluster, or on this machine's cores.

    Takes what `TrainingAgent` takes, and leaves the same behind, all of it here: nothing of a run
    is kept in the cluster. With sync_mode "blocking", runs of a seed and a number of workers are
    alike to the bit, as long as no worker is lost.

    Example:
        >>> agent = starling.DistributedPPO(env_name="Pendulum-v1", num_workers=4, num_envs=4)
        >>> result = agent.train(total_timesteps=1_000_000)
    """

    config_class = DistributedPPOConfig
    algorithm_class = VTracePPO
    in_programs = True
    config: DistributedPPOConfig

    _cluster: Cluster | None = None
    _pool: RayPool | None = None

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        if isinstance(self._source, gymnasium.vector.VectorEnv):
            self.close()
            raise UserError(
                "workers make environments of their own, and a vector environment that exists "
                "cannot be shared out: give an id or a factory"
            )

    @property
    def envs(self) -> VectorEnv:
        """One environment, which says what the policy is to be made for; workers have their own."""
        if self._envs is None:
            self._envs = self._new_envs(1, 1)
            # Before JAX has threads: starting Ray forks.
            self._cluster = Cluster(self.config.address)
            self._fit_to(self._cluster.cores())
        return self._envs

    def make_collector(self) -> RayPool:
        """The workers, made at the first call."""
        if self._pool is None:
            config, cluster = self.config, self._cluster
            assert cluster is not None
            parts = config.num_parts
            if config.num_workers == "all" and config.buffer_size is None:
                parts = None
            self._pool = RayPool(
                cluster,
                self._worker_maker(cluster.ray),
                self._published,
                num_workers=None if config.num_workers == "all" else config.num_workers,
                cpus_per_worker=config.cpus_per_worker,
                num_parts=parts,
                blocking=config.sync_mode == "blocking",
                max_policy_lag=config.max_policy_lag,
                restarts=config.worker_restarts,
            )
        return self._pool

    def _fit_to(self, cores: int) -> None:
        """Settles on a number of workers, or refuses the one that was asked for."""
        config = self.config
        if config.num_workers is None:
            workers = rooms(cores, config.cpus_per_worker)
            self.config = dataclasses.replace(config, num_workers=workers)
        elif config.num_workers != "all" and config.num_workers * config.cpus_per_worker > cores:
            needed = config.num_workers * config.cpus_per_worker
            raise UserError(
                f"num_workers {config.num_workers} x cpus_per_worker {config.cpus_per_worker:g} = "
                f"{needed:g} cores, and the cluster has {cores}: use num_workers "
                f"{max(1, int(cores / config.cpus_per_worker))}, more environments in each "
                "(num_envs), or a share of a core for each (cpus_per_worker 0.5)"
            )

    def _worker_maker(self, ray: Any) -> Any:
        config = dataclasses.replace(self.config, device="cpu")
        spaces = (self.observation_space, self.action_space)
        shared = ray.put((self._source, config, spaces))
        remote = ray.remote(RolloutWorker)
        options = {
            "num_cpus": config.cpus_per_worker,
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"JAX_PLATFORMS": "cpu", "PYTHONPATH": _own_path()}},
        }
        return lambda index: remote.options(**options).remote(index, shared)

    def _published(self) -> Published:
        acting = Acting(self.state.params, self.state.observation_statistics)
        return Published(self.version, jax.device_get(acting))

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, Any]:
        """Learns from rollouts of this policy or of older ones.

        Args:
            rollout: With the log-probabilities of the policies that chose its actions.
            progress: Share of the training that is done, in [0, 1], for the schedules.

        Returns:
            Metrics by their logged names.
        """
        metrics = self._learn(rollout, progress)
        pool = self._pool
        if pool is None:
            return metrics
        return metrics | {
            "async/policy_lag_min": min(pool.lags),
            "async/policy_lag_mean": sum(pool.lags) / len(pool.lags),
            "async/policy_lag_max": max(pool.lags),
            "async/dropped": pool.dropped,
            "distributed/workers": sum(worker.ready for worker in pool.workers),
            "distributed/collect_seconds": pool.seconds,
        }

    def close(self) -> None:
        """Ends the workers, the connection to Ray, and the environments; idempotent."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
        super().close()


def _own_path() -> str:
    """Where this process finds modules that are not installed: workers here find them, too."""
    installed = (sys.prefix, sys.base_prefix)
    return os.pathsep.join(os.path.abspath(p) for p in sys.path if not p.startswith(installed))
