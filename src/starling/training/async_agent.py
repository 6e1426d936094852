"""What trainers have in common whose actors go on collecting while the learner learns."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import gymnasium

from starling.envs.vector_env import VectorEnv
from starling.envs.waiting import waits
from starling.envs.worker_count import usable_cores
from starling.errors import UserError
from starling.storage.rollout import Rollout
from starling.training.actor import Actor, Published
from starling.training.actor_pool import ActorPool
from starling.training.device import prepare_cpu
from starling.training.environments import requires_timeout
from starling.training.sampler import Sampler
from starling.training.training_agent import TrainingAgent

# With more, an actor's rollout is so narrow that acting costs more than waiting.
_MOST_ACTORS = 8


class AsyncAgent(TrainingAgent):
    """Environments that belong to actors: the first base of `AsyncPPO` and `AsyncDQN`.

    Its config has `ActorParameters`, and its algorithm is an `ActorAlgorithm`.
    """

    config: Any
    published: Published
    _pool: ActorPool | None = None

    def __init__(self, *args: Any, **settings: Any):
        # With the one thread that small networks get otherwise, the programs of actors and learner
        # would wait for each other.
        prepare_cpu(math.inf)
        super().__init__(*args, **settings)
        config = self.config
        if config.actor_restarts and isinstance(self._source, gymnasium.vector.VectorEnv):
            if config.actor_restarts != type(config).actor_restarts:  # somebody asked for it
                self.close()
                raise UserError(
                    f"actor_restarts {config.actor_restarts} needs environments that can be made "
                    "anew, and a vector environment that exists cannot: give an id or a factory, "
                    "or actor_restarts 0"
                )
            self.config = dataclasses.replace(config, actor_restarts=0)

    @property
    def envs(self) -> VectorEnv:
        """The environments of the first actor that has some, made when first asked for."""
        if self._pool is not None:
            return self._pool.going[0].envs
        if self._envs is None:
            if self.config.num_actors is None:
                self.config = self._with_actors()
            self._envs = self._actor_envs(0)
        return self._envs

    def _with_actors(self) -> Any:
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
        chosen = "process" if requires_timeout(config) else "serial"
        backend = chosen if config.backend == "auto" else config.backend
        return dataclasses.replace(config, num_actors=actors, backend=backend)

    def _actor_envs(self, actor: int) -> VectorEnv:
        """Environments for one actor, with its share of the worker threads or processes."""
        config = self.config
        assert config.num_actors is not None
        if config.num_actors > 1 and isinstance(self._source, gymnasium.vector.VectorEnv):
            raise UserError(
                f"num_actors is {config.num_actors}, but a vector environment that exists cannot "
                "be shared out: give an id or a factory, or num_actors 1"
            )
        if isinstance(self._source, gymnasium.vector.VectorEnv):
            return self._new_envs(config.num_envs, config.num_workers)
        workers = (config.num_workers or usable_cores()) // config.num_actors
        width = config.num_envs // config.num_actors
        return self._new_envs(width, max(1, workers), actor * width)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, Any]:
        """Learns from a rollout of this policy or of older ones, and publishes the result.

        Args:
            rollout: As actors describe it.
            progress: Share of the training that is done, in [0, 1], for the schedules.

        Returns:
            Metrics by their logged names.
        """
        metrics = self._learn(rollout, progress)
        self._publish()
        return metrics if self._pool is None else metrics | self._pool.metrics()

    def _publish(self) -> None:
        """Lets actors have the newest parameters: one reference is swapped, nothing is copied."""
        self.published = Published(self.version, self.acting)

    def _new_pool(self, num_parts: int, max_policy_lag: float) -> ActorPool:
        self._publish()
        config, algorithm = self.config, self.algorithm
        actors = []
        for i in range(config.num_actors):
            first = self.sampler.next_table + i
            sampler = Sampler(
                algorithm, config.num_steps, config.seed, self.device, first, config.num_actors
            )
            envs = self.envs if i == 0 else self._actor_envs(i)
            actors.append(Actor(i, envs, algorithm, sampler, self.in_programs))
        return ActorPool(
            actors,
            self._actor_envs,
            lambda: self.published,
            num_parts,
            max_policy_lag,
            config.actor_restarts,
            config.serial,
        )

    def _learning_state(self) -> dict[str, Any]:
        if self._pool is not None:  # whoever resumes takes noise that no actor has used yet
            tables = [actor.sampler.next_table for actor in self._pool.actors]
            self.sampler.next_table = max(tables)
        return super()._learning_state()

    def close(self) -> None:
        """Ends the actors and all environments; idempotent."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        super().close()
