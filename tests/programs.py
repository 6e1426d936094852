"""Compiled programs that agents of one test file share: to trace them takes a second each time."""

from __future__ import annotations

import dataclasses
from typing import Any

from starling.algorithms.ppo import PPO
from starling.algorithms.ppo_parameters import PPOParameters
from starling.networks.network_parameters import NetworkParameters

_made: dict[Any, PPO] = {}


def shared_ppo(
    observations: Any,
    actions: Any,
    options: Any,
    network: Any,
    num_envs: int,
    kind: type[PPO] = PPO,
) -> PPO:
    """What `PPO(...)` gives, made once for all who are told the same; PPO itself has no state."""
    told = [
        *(getattr(options, field.name) for field in dataclasses.fields(PPOParameters)),
        *(getattr(network, field.name) for field in dataclasses.fields(NetworkParameters)),
    ]
    key = (kind, str(observations), str(actions), num_envs, *told)
    if key not in _made:
        _made[key] = kind(observations, actions, options, network, num_envs)
    return _made[key]
