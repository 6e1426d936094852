"""`DistributedPPO`: PPO whose environments are spread over a Ray cluster."""

from __future__ import annotations

from starling.algorithms.vtrace_ppo import VTracePPO
from starling.configs import DistributedPPOConfig
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
                None if follows else config.num_parts,
                config.sync_mode == "blocking",
                config.max_policy_lag,
            )
        return self._pool
