"""Whether a policy fits environments that it was not trained on."""

from __future__ import annotations

from typing import Any

import gymnasium

from starling.errors import CheckpointError
from starling.storage.space_format import space_to_json

# Bounds may differ between implementations of one environment, and the policy keeps its own.
_MAY_DIFFER = {"low", "high", "dtype"}


def check_fit(
    name: str,
    policy_spaces: tuple[gymnasium.Space, gymnasium.Space],
    env_spaces: tuple[gymnasium.Space, gymnasium.Space],
) -> None:
    """Checks that a policy can act in an environment.

    Args:
        name: The environment's name, for the message.
        policy_spaces: Observation and action space that the policy was made for.
        env_spaces: Those of the environment.

    Raises:
        CheckpointError: A space is nested otherwise, or has another shape or number of choices.
    """
    kinds = ("observations", "actions")
    for kind, own, given in zip(kinds, policy_spaces, env_spaces, strict=True):
        if own != given and _shape(space_to_json(own)) != _shape(space_to_json(given)):
            raise CheckpointError(
                f"the policy does not fit {name}: its {kind} are {own}, those of the environment "
                f"{given}; use the environment that it was trained on"
            )


def _shape(description: Any) -> Any:
    """A description of a space without what may differ."""
    if isinstance(description, dict):
        kept = {key: value for key, value in description.items() if key not in _MAY_DIFFER}
        return {key: _shape(value) for key, value in kept.items()}
    if isinstance(description, list):
        return [_shape(item) for item in description]
    return description
