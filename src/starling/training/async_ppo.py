"""`AsyncPPO`: PPO on one machine whose environments go on while the policy learns."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import gymnasium

from starling.algorithms.vtrace_ppo import Acting, VTracePPO
from starling.config import AsyncPPOConfig
from starling.envs.sharded import usable_cores
from starling.envs.vector_env import VectorEnv
from starling.envs.waiting import waits
from starling.errors import UserError
from starling.storage.rollout import Rollout
from starling.training.actor_pool import Actor, ActorPool, Published
from starling.training.device import prepare_cpu
from starling.training.parallel_ppo import ParallelPPO
from starling.training.sampler import Sampler

# With more, an actor's rollout is so narrow that acting costs more than waiting.
_MOST_ACTORS = 8


class AsyncPPO(ParallelPPO):
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

    _pool: ActorPool | None = None
    published: Published

    def __init__(self, *args: Any, **settings: Any):
        # With the one thread that small networks get otherwise, the programs of actors and learner
        # would wait for each other.
        prepare_cpu(math.inf)
        super().__init__(*args, **settings)
        if self.config.actor_restarts and isinstance(self._source, gymnasium.vector.VectorEnv):
            self.close()
            raise UserError(
                "actor_restarts needs environments that can be made anew, and a vector environment "
                "that exists cannot: give an id or a factory, or leave actor_restarts out"
            )

    @property
    def envs(self) -> VectorEnv:
        """The environments of the first actor, made when first asked for."""
        if self._pool is not None:
            return self._pool.actors[0].envs
        if self._envs is None:
            if self.config.num_actors is None:
                self.config = self._with_actors()
            self._envs = self._actor_envs()
        return self._envs

    def _with_actors(self) -> AsyncPPOConfig:
        """The settings with a number of actors that suits the environment.

        One keeps the learner busy wherever stepping takes the interpreter's lock or all cores.
        """
        config = self.config
        most = config.num_envs if config.backend in ("auto", "serial", "thread") else 1
        if most == 1 or isinstance(self._source, gymnasium.vector.VectorEnv):
            return dataclasses.replace(config, num_actors=1)
        if not waits(self._source, config.env_kwargs):
            return dataclasses.replace(config, num_actors=1)
        actors = max(n for n in range(1, _MOST_ACTORS + 1) if most % n == 0)
        print(f"starling: {actors} actors, since a step mostly waits", file=sys.stderr)
        backend = "serial" if config.backend == "auto" else config.backend
        return dataclasses.replace(config, num_actors=actors, backend=backend)

    def _actor_envs(self) -> VectorEnv:
        """Environments for one actor, with its share of the worker threads or processes."""
        config = self.config
        assert config.num_actors is not None
        if config.num_actors > 1 and isinstance(self._source, gymnasium.vector.VectorEnv):
            raise UserError(
                f"num_actors is {config.num_actors}, but a vector environment that exists cannot "
                "be shared out: give an id or a factory, or num_actors 1"
            )
        workers = (config.num_workers or usable_cores()) // config.num_actors
        return self._new_envs(config.num_envs // config.num_actors, max(1, workers))

    def make_collector(self) -> ActorPool:
        """The actors, made at the first call."""
        if self._pool is None:
            config, algorithm = self.config, self.algorithm
            assert config.num_actors is not None
            self._publish()
            actors = []
            for i in range(config.num_actors):
                first = self.sampler.next_table + i
                sampler = Sampler(
                    algorithm, config.num_steps, config.seed, self.device, first, config.num_actors
                )
                envs = self.envs if i == 0 else self._actor_envs()
                actors.append(Actor(i, envs, algorithm, sampler))
            self._pool = ActorPool(
                actors,
                self._actor_envs,
                lambda: self.published,
                config.max_policy_lag,
                config.actor_restarts,
                config.serial,
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
        # Who resumes takes noise that no actor has used yet.
        self.sampler.next_table = max(actor.sampler.next_table for actor in pool.actors)
        return metrics | {
            "async/policy_lag_min": min(pool.lags),
            "async/policy_lag_mean": sum(pool.lags) / len(pool.lags),
            "async/policy_lag_max": max(pool.lags),
            "async/dropped": pool.dropped,
        }

    def close(self) -> None:
        """Ends the actors and all environments; idempotent."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        super().close()
