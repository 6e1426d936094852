"""`AsyncPPO`: PPO on one machine whose environments go on while the policy learns."""

from __future__ import annotations

from starling.algorithms.vtrace_ppo import VTracePPO
from starling.configs import AsyncPPOConfig
from starling.training.actor_pool import ActorPool
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

    def make_collector(self) -> ActorPool:
        """The actors, made at the first call."""
        if self._pool is None:
            config = self.config
            assert config.num_actors is not None
            self._pool = self._new_pool(config.num_actors, config.max_policy_lag)
        return self._pool
