"""`ParallelPPO`: PPO and A2C on many environments of one machine, in lock step."""

from __future__ import annotations

import dataclasses
from typing import Self

from starling.configs import PPOConfig
from starling.training.actor_pool import ActorPool
from starling.training.agent import Agent
from starling.training.collector import HostCollector
from starling.training.compiled_collector import CompiledCollector
from starling.training.fused import FusedLearner
from starling.training.training_agent import TrainingAgent


class ParallelPPO(TrainingAgent):
    """Trains a policy by PPO: all environments step together, then the policy learns.

    Takes what `TrainingAgent` takes; algo is "ppo" or "a2c".

    Example:
        >>> agent = starling.ParallelPPO(env_name="CartPole-v1", num_envs=8, seed=0)
        >>> result = agent.train(total_timesteps=100_000)
        >>> agent.evaluate(episodes=100).mean_return
    """

    config_class = PPOConfig
    in_programs = True

    def with_seed(self, seed: int) -> Self:
        """An untrained agent of another seed that shares environments and compiled programs."""
        agent = type(self).__new__(type(self))
        agent._source, agent._envs = self._source, self.envs
        config = dataclasses.replace(self.config, seed=seed)
        spaces = (self.observation_space, self.action_space)
        Agent.__init__(agent, config, *spaces, algorithm=self.algorithm)
        return agent

    def make_collector(self) -> HostCollector | CompiledCollector | ActorPool:
        """What fills the rollouts of a call of `train`."""
        config, compiled = self.config, self.envs.compiled
        if compiled is None:
            return HostCollector(self.envs, config.num_steps)
        settings = (self.envs, config.num_steps, self.algorithm, self.device)
        if compiled.pure and self.mesh is None:
            return FusedLearner(*settings, most=config.log_interval)
        return CompiledCollector(*settings)
