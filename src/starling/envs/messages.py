"""What a vector environment tells its shards, and what they answer."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym

from starling.errors import WorkerError


class ShardOptions(NamedTuple):
    """What every shard of a vector environment is told.

    Attributes:
        all_infos: Deliver every step's info, and not only those of resets and ended episodes.
        episode_seeds: Seed every episode from (child seed, episode) and record actions.
        next_step: Reset an ended environment on the step after, as `AutoresetMode.NEXT_STEP`.
        isolate: An environment that fails is reported, and the others go on.
        saturate: Let what a type cannot hold become infinite; the caller looks for it.
    """

    all_infos: bool = False
    episode_seeds: bool = False
    next_step: bool = False
    isolate: bool = False
    saturate: bool = False


class Infos(NamedTuple):
    """Infos worth sending, each with the environment's index in the shard.

    Attributes:
        current: Infos that belong to the observations.
        final: Infos of the last step of an episode, where `SAME_STEP` hides it.
        failed: What environments raised, where each is on its own.
        masked: Whether an environment has ever given an action mask.
        converted: What is new about types of observations that were converted.
    """

    current: list[tuple[int, dict]]
    final: list[tuple[int, dict]]
    failed: list[tuple[int, WorkerError]]
    masked: bool = False
    converted: Sequence[str] = ()


def both_of(first: Infos | None, then: Infos | None) -> Infos | None:
    """The infos of a step and of the reset that was made after it."""
    if first is None or then is None:
        return first or then
    masked, converted = first.masked or then.masked, [*first.converted, *then.converted]
    return Infos([*first.current, *then.current], first.final, [], masked, converted)


class Description(NamedTuple):
    """What a vector environment takes over from its environments."""

    observation_space: gym.Space
    action_space: gym.Space
    metadata: dict[str, Any]
    spec: Any
    render_mode: str | None


def pickled(value: Any) -> bytes:
    """The pickle of a value that can be read again, which not all that can be written can.

    Among what cannot be are exceptions whose `__init__` takes more than their message.
    """
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    pickle.loads(data)
    return data
