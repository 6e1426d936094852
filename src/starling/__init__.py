"""Starling: reinforcement learning on many environments in parallel.

What is exported is imported on first use: importing this package starts nothing, sets no signal
handler and does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.configs import (
        A2CConfig,
        AsyncDQNConfig,
        AsyncPPOConfig,
        DistributedDQNConfig,
        DistributedPPOConfig,
        DQNConfig,
        PPOConfig,
    )
    from starling.envs.checks import check_env
    from starling.envs.make import make_env, make_vec
    from starling.errors import StarlingError, UserError, WorkerError
    from starling.storage.rollout import Rollout, RolloutBuffer
    from starling.training.async_dqn import AsyncDQN
    from starling.training.async_ppo import AsyncPPO
    from starling.training.distributed_dqn import DistributedDQN
    from starling.training.distributed_ppo import DistributedPPO
    from starling.training.dqn import DQN
    from starling.training.parallel_ppo import ParallelPPO
    from starling.training.several_seeds import train_seeds
    from starling.training.training_agent import TrainingAgent
    from starling.training.tuning import tune

    load = TrainingAgent.load

__version__ = "0.1.0"

__all__ = [
    "DQN",
    "A2CConfig",
    "AsyncDQN",
    "AsyncDQNConfig",
    "AsyncPPO",
    "AsyncPPOConfig",
    "DQNConfig",
    "DistributedDQN",
    "DistributedDQNConfig",
    "DistributedPPO",
    "DistributedPPOConfig",
    "PPOConfig",
    "ParallelPPO",
    "Rollout",
    "RolloutBuffer",
    "StarlingError",
    "TrainingAgent",
    "UserError",
    "WorkerError",
    "__version__",
    "check_env",
    "load",
    "make_env",
    "make_vec",
    "train_seeds",
    "tune",
]

_HOMES = {
    "A2CConfig": "starling.configs",
    "AsyncDQN": "starling.training.async_dqn",
    "AsyncDQNConfig": "starling.configs",
    "AsyncPPO": "starling.training.async_ppo",
    "AsyncPPOConfig": "starling.configs",
    "DQN": "starling.training.dqn",
    "DQNConfig": "starling.configs",
    "DistributedDQN": "starling.training.distributed_dqn",
    "DistributedDQNConfig": "starling.configs",
    "DistributedPPO": "starling.training.distributed_ppo",
    "DistributedPPOConfig": "starling.configs",
    "PPOConfig": "starling.configs",
    "ParallelPPO": "starling.training.parallel_ppo",
    "Rollout": "starling.storage.rollout",
    "RolloutBuffer": "starling.storage.rollout",
    "StarlingError": "starling.errors",
    "TrainingAgent": "starling.training.training_agent",
    "UserError": "starling.errors",
    "WorkerError": "starling.errors",
    "check_env": "starling.envs.checks",
    "make_env": "starling.envs.make",
    "make_vec": "starling.envs.make",
    "train_seeds": "starling.training.several_seeds",
    "tune": "starling.training.tuning",
}


def __getattr__(name: str) -> Any:
    if name == "load":  # a policy from a run's folder
        value = __getattr__("TrainingAgent").load
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'starling' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
