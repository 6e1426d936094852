"""Compiled programs that agents of one process share: to trace them takes a second each time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from starling.algorithms.async_parameters import LagParameters
from starling.algorithms.dqn_parameters import DQNParameters
from starling.algorithms.ppo_parameters import PPOParameters
from starling.networks.network_parameters import NetworkParameters

_TOLD = {
    field.name
    for told in (PPOParameters, LagParameters, DQNParameters, NetworkParameters)
    for field in dataclasses.fields(told)
}
_made: dict[Any, Any] = {}


def shared(kind: type) -> Callable[..., Any]:
    """What `kind(...)` gives, made once for all who tell it the same: an algorithm has no state."""
    return functools.partial(_share, kind)


def _share(kind: type, observations: Any, actions: Any, options: Any, network: Any, n: int) -> Any:
    told = [getattr(of, name, None) for of in (options, network) for name in sorted(_TOLD)]
    key = (kind, str(observations), str(actions), n, *told)
    if key not in _made:
        _made[key] = kind(observations, actions, options, network, n)
    return _made[key]
