"""`AsyncDQN`: Q-learning from a replay that actors fill while the network learns (Ape-X)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starling.algorithms.acting import Acting
from starling.algorithms.ape_x import ApeX, epsilons
from starling.configs import AsyncDQNConfig
from starling.storage.replay import Replay
from starling.storage.shared_replay import SharedReplay
from starling.training.actor import Published
from starling.training.actor_pool import ActorPool
from starling.training.async_agent import AsyncAgent
from starling.training.dqn import DQN
from starling.training.sharded_replay import ShardedReplay


class ApeXDQN(DQN):
    """DQN whose replay is filled by several actors: the base of `AsyncDQN` and `DistributedDQN`."""

    algorithm_class = ApeX
    config: Any
    _overlaps = False  # actors collect beside the learner anyway

    def _new_replay(self) -> SharedReplay | ShardedReplay:
        replay = super()._new_replay()
        assert isinstance(replay, Replay)
        return SharedReplay(replay, self.config.num_writers)

    @functools.cached_property
    def last_epsilon(self) -> np.ndarray:
        """Share of random actions in each environment at last, `[N]`."""
        return epsilons(self.config.total_envs)


class AsyncDQN(AsyncAgent, ApeXDQN):
    """Trains action values by DQN while actors go on collecting, each with epsilons of its own.

    Takes what `DQN` takes. Every iteration learns from what one actor's rollout adds to the replay,
    so that gradient steps keep to `updates_per_transition` however fast the actors are: those that
    are ahead wait. Which actor is first depends on timing, so no two runs are alike, except with
    `serial=True`.

    Example:
        >>> agent = starling.AsyncDQN(env_name="CartPole-v1", num_envs=12, num_actors=3)
        >>> result = agent.train(total_timesteps=200_000)
    """

    config_class = AsyncDQNConfig
    config: AsyncDQNConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def make_collector(self) -> ActorPool:
        """The actors, made at the first call."""
        if self._pool is None:
            self._pool = self._new_pool(1, math.inf)
        return self._pool

    def _publish(self) -> None:
        """Lets actors have copies of the newest parameters: the next update writes over its own."""
        params, statistics, epsilon = self.acting
        params, statistics = jax.tree.map(jnp.copy, (params, statistics))
        self.published = Published(self.version, Acting(params, statistics, epsilon))
