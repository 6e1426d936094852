"""What a vector environment tells its shards, and what they answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym


class ShardOptions(NamedTuple):
    """What every shard of a vector environment is told.

    Attributes:
        all_infos: Deliver every step's info, and not only those of resets and ended episodes.
        episode_seeds: Seed every episode from (child seed, episode) and record actions.
        next_step: Reset an ended environment on the step after, as `AutoresetMode.NEXT_STEP`.
    """

    all_infos: bool = False
    episode_seeds: bool = False
    next_step: bool = False


class Infos(NamedTuple):
    """Infos worth sending, each with the environment's index in the shard.

    Attributes:
        current: Infos that belong to the observations.
        final: Infos of the last step of an episode, where `SAME_STEP` hides it.
        masked: Whether an environment has ever given an action mask.
    """

    current: list[tuple[int, dict]]
    final: list[tuple[int, dict]]
    masked: bool = False


class Description(NamedTuple):
    """What a vector environment takes over from its environments."""

    observation_space: gym.Space
    action_space: gym.Space
    metadata: dict[str, Any]
    spec: Any
    render_mode: str | None
