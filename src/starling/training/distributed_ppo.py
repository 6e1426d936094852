"""`DistributedPPO`: PPO whose environments are spread over a Ray cluster."""

from __future__ import annotations

from typing import Any

import jax

from starling.algorithms.vtrace_ppo import Acting, VTracePPO
from starling.configs import DistributedPPOConfig
from starling.storage.rollout import Rollout
from starling.training.actor_pool import Published
from starling.training.distributed_agent import DistributedAgent
from starling.training.ray_pool import RayPool


class DistributedPPO(DistributedAgent):
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

    def make_collector(self) -> RayPool:
        """The workers, made at the first call."""
        if self._pool is None:
            config = self.config
            follows = config.num_workers == "all" and config.buffer_size is None
            self._pool = self._new_pool(
                self._published,
                None if follows else config.num_parts,
                config.sync_mode == "blocking",
                config.max_policy_lag,
            )
        return self._pool

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
            **pool.metrics(),
        }
