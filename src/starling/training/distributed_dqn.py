"""`DistributedDQN`: Q-learning from a replay that workers on a Ray cluster fill."""

from __future__ import annotations

import math

from starling.configs import DistributedDQNConfig
from starling.training.async_dqn import ApeXDQN
from starling.training.distributed_agent import DistributedAgent
from starling.training.ray_pool import RayPool


class DistributedDQN(DistributedAgent, ApeXDQN):
    """Trains action values by DQN from rollouts of workers on a Ray cluster (Ape-X).

    Takes what `DQN` takes. The replay is here, with the learner, and so are all checkpoints. As
    with `AsyncDQN`, gradient steps keep to `updates_per_transition`; workers that are ahead wait.

    Example:
        >>> agent = starling.DistributedDQN(env_name="CartPole-v1", num_workers=3, num_envs=4)
        >>> result = agent.train(total_timesteps=200_000)
    """

    config_class = DistributedDQNConfig
    config: DistributedDQNConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def make_collector(self) -> RayPool:
        """The workers, made at the first call."""
        if self._pool is None:
            self._pool = self._new_pool(1, False, math.inf)
        return self._pool
