"""`AsyncPPO`: PPO on one machine whose environments go on while the policy learns."""

from __future__ import annotations

from typing import Any

from starling.algorithms.vtrace_ppo import Acting, VTracePPO
from starling.configs import AsyncPPOConfig
from starling.storage.rollout import Rollout
from starling.training.actor_pool import ActorPool, Published
from starling.training.async_agent import AsyncAgent
from starling.training.parallel_ppo import ParallelPPO


class AsyncPPO(AsyncAgent, ParallelPPO):
    """Trains a policy by PPO while actors go on collecting with the newest parameters there are.

    Takes what `ParallelPPO` takes, and leaves the same behind. Rollouts lag behind by an update or
    a few; V-trace corrects for it, and how many it were is logged (`async/policy_lag_mean`).
    Which actor is first depends on timing, so no two runs are alike, except with `serial=True`.

    Example:
        >>> agent = starling.AsyncPPO(env_name="Pendulum-v1", num_envs=32, num_actors=2)
        >>> result = agent.train(total_timesteps=1_000_000)
    """

    config_class = AsyncPPOConfig
    algorithm_class = VTracePPO
    config: AsyncPPOConfig
    algorithm: VTracePPO
    published: Published

    def make_collector(self) -> ActorPool:
        """The actors, made at the first call."""
        if self._pool is None:
            self._publish()
            config = self.config
            assert config.num_actors is not None
            self._pool = self._new_pool(
                lambda: self.published, config.num_actors, config.max_policy_lag
            )
        return self._pool

    def _publish(self) -> None:
        """Lets actors have the newest parameters: one reference is swapped, nothing is copied."""
        acting = Acting(self.state.params, self.state.observation_statistics)
        self.published = Published(self.version, acting)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, Any]:
        """Learns from a rollout of this policy or of older ones, and publishes the result.

        Args:
            rollout: With the log-probabilities of the policies that chose its actions.
            progress: Share of the training that is done, in [0, 1], for the schedules.

        Returns:
            Metrics by their logged names.
        """
        metrics = self._learn(rollout, progress)
        self._publish()
        pool = self._pool
        if pool is None:
            return metrics
        return metrics | {
            "async/policy_lag_min": min(pool.lags),
            "async/policy_lag_mean": sum(pool.lags) / len(pool.lags),
            "async/policy_lag_max": max(pool.lags),
            "async/dropped": pool.dropped,
        }
