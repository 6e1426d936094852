"""What is wrong with one value: a space, an observation, a reward, a flag, an info.

Functions of their arguments alone. `where` says in which call the value was met, such as
`step 12`. What they call an error is what Starling's backends refuse, or would misunderstand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from starling.envs.findings import Finding
from starling.envs.guards import usable
from starling.envs.messages import pickled
from starling.envs.spaces import Leaf, cast, choice_counts, flat_mask, flatten, leaves, wrong_bounds
from starling.errors import UserError, in_a_line

_HUGE_REWARD = 1e6
_LARGEST_REWARD = float(np.finfo(np.float32).max)  # rewards are learnt from in float32
_FAR_FROM_ONE = 10.0  # bounds of actions that are larger, or smaller by as much, get a note
_TOLERANCE = 1e-4  # by which rounding may bring an observation out of its bounds, relative

# ---- spaces


def check_spaces(env: gym.Env) -> Iterator[Finding]:
    """Looks at the spaces of an environment."""
    for kind, what in (("observation_space", "observation"), ("action_space", "action")):
        space = getattr(env, kind)
        try:
            parts = leaves(space)
        except UserError as error:
            yield Finding("error", "space-unsupported", f"{kind}: {error}", what)
            continue
        if sum(int(np.prod(leaf.shape)) for leaf in parts) == 0:
            yield Finding("error", "space-empty", f"{kind} is {space}, which holds no number", what)
        for leaf in parts:
            if isinstance(leaf.space, spaces.Box):
                yield from _check_box(leaf, leaf.space, kind)


def _check_box(leaf: Leaf, space: spaces.Box, kind: str) -> Iterator[Finding]:
    name = f"{kind} {leaf.name!r}" if leaf.path else kind
    about = leaf.name or kind
    wrong = wrong_bounds(name, space)
    if wrong is not None:
        yield Finding("error", "space-bounds", wrong, about)
    elif kind == "observation_space":
        if leaf.dtype == np.float64:
            message = f"{name} is float64; networks compute in float32, which takes half the memory"
            yield Finding("note", "observation-float64", message, about)
    elif leaf.dtype.kind == "f":
        yield from _check_action_bounds(name, about, space.low, space.high)


def _check_action_bounds(
    name: str, about: str, low: np.ndarray, high: np.ndarray
) -> Iterator[Finding]:
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        message = (
            f"{name} is without bounds, so nothing tells which size of actions makes sense: "
            "policies begin with actions of about 1; give finite bounds, such as -1 to 1, and "
            "scale in step()"
        )
        yield Finding("warning", "action-unbounded", message, about)
        return
    size = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    if size.max() > _FAR_FROM_ONE or size.min() < 1 / _FAR_FROM_ONE:
        i = int(size.argmax() if size.max() > _FAR_FROM_ONE else size.argmin())
        message = (
            f"{name} has bounds {low.flat[i]:g} to {high.flat[i]:g}; Starling scales actions "
            "to them, other libraries may expect about -1 to 1"
        )
        yield Finding("note", "action-scale", message, about)


# ---- observations


def check_reset_result(space: spaces.Space, observation: Any) -> Iterator[Finding]:
    """Looks whether what `reset` returned is a pair, once Starling has tried to make it one."""
    if isinstance(observation, tuple) and not isinstance(space, spaces.Tuple):
        got = f"a tuple of {len(observation)} values"
        if len(observation) == 2:
            got = f"a pair whose second value is of type {type(observation[1]).__name__}"
        message = f"reset() returned {got}; return (observation, info), where info is a dict"
        yield Finding("error", "reset-result", message)


def check_observation(space: spaces.Space, observation: Any, where: str) -> Iterator[Finding]:
    """Looks whether an observation is what its space says."""
    if observation is None:
        message = f"{where}: the observation is None; is there a return?"
        yield Finding("error", "observation-missing", message)
        return
    try:
        values = flatten(space, observation)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        message = (
            f"{where}: the observation, a {type(observation).__name__}, is not nested like "
            f"{space}: {type(error).__name__}: {error}"
        )
        yield Finding("error", "observation-nesting", message)
        return
    for leaf, value in zip(leaves(space), values, strict=True):
        yield from _check_leaf(leaf, value, where)


def _check_leaf(leaf: Leaf, value: Any, where: str) -> Iterator[Finding]:
    name = f"{where}: observation {leaf.name!r}" if leaf.path else f"{where}: observation"

    def found(level: str, kind: str, text: str) -> Finding:
        return Finding(level, f"observation-{kind}", f"{name}: {text}", leaf.name)

    try:
        given = np.asarray(value)
    except Exception:
        given = None
    if given is None or given.dtype.kind not in "biuf":
        text = f"a {type(value).__name__} given, of which no array of numbers can be made"
        yield found("error", "value", text)
        return
    if given.shape != leaf.shape:
        text = f"shape {given.shape} given, {leaf.shape} expected"
        yield found("error", "shape", f"{text}; return what observation_space says, or change it")
        return
    try:
        values = cast(given, leaf.dtype, name)
    except UserError as error:
        message = f"{error}; return values that the dtype of the space can hold"
        yield Finding("error", "observation-value", message, leaf.name)
        return
    if given.dtype != leaf.dtype and type(value) is not int:
        text = f"{given.dtype} given, {leaf.dtype} expected"
        yield found("warning", "dtype", f"{text}; it is converted in every step: return that dtype")
    if isinstance(leaf.space, spaces.Box) and not (fine := usable(values)).all():
        i = np.flatnonzero(~fine)[0]
        text = f"{values.flat[i]} at position {i}; nothing can be learnt from it"
        if np.isfinite(values.flat[i]):
            text += ", as networks compute in 32 bits: scale it, or leave out what counts up"
        yield found("error", "not-finite", text)
        return
    yield from (found(*finding) for finding in _out_of_bounds(leaf.space, values))


def _out_of_bounds(space: spaces.Space, values: np.ndarray) -> Iterator[tuple[str, str, str]]:
    if not isinstance(space, spaces.Box):
        if not space.contains(values):
            text = f"{values.tolist()} is not in {space}, so the network would not see it"
            yield "error", "bounds", text
        return
    low, high, values = (x.astype(np.float64) for x in (space.low, space.high, values))
    outside = values < low - _TOLERANCE * np.maximum(1, np.abs(low))
    outside |= values > high + _TOLERANCE * np.maximum(1, np.abs(high))
    if outside.any():
        i = np.flatnonzero(outside)[0]
        text = (
            f"{values.flat[i]:g} at position {i} is outside of {low.flat[i]:g} to "
            f"{high.flat[i]:g}; change the bounds, or the value"
        )
        yield "warning", "bounds", text


# ---- the rest of what a step returns


def check_reward(reward: Any, where: str) -> Iterator[Finding]:
    """Looks whether a reward is one finite number."""
    try:
        array = np.asarray(reward)
        value = float(array.item()) if array.shape == () and array.dtype.kind in "biufO" else None
    except (TypeError, ValueError, OverflowError):
        array, value = np.empty(()), None
    if value is None:
        got = f"an array of shape {array.shape}" if array.shape else f"{reward!r}"
        message = f"{where}: the reward is {got}; return one number, such as float(reward)"
        yield Finding("error", "reward-type", message)
    elif not abs(value) <= _LARGEST_REWARD:
        message = f"{where}: the reward is {value}; nothing can be learnt from it"
        yield Finding("error", "reward-not-finite", message)
    elif abs(value) > _HUGE_REWARD:
        message = (
            f"{where}: the reward is {value:g}; scale it, or train with --normalize_rewards, or "
            "the value network has a hard time"
        )
        yield Finding("note", "reward-huge", message)


def check_ends(terminated: Any, truncated: Any, where: str) -> Iterator[Finding]:
    """Looks at the two flags that end an episode."""
    readable = True
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if isinstance(flag, bool | np.bool_) or (
            isinstance(flag, np.ndarray) and flag.dtype == np.bool_ and flag.shape == ()
        ):
            continue
        fix = f"return bool({name})"
        try:
            shown = f"{flag!r}, read as {bool(flag)}"
            yield Finding("warning", f"{name}-type", f"{where}: {name} is {shown}; {fix}")
        except Exception:
            readable = False
            shown = f"a {type(flag).__name__} of shape {np.shape(flag)}, neither true nor false"
            yield Finding("error", f"{name}-type", f"{where}: {name} is {shown}; {fix}")
    if readable and terminated and truncated:
        message = (
            f"{where}: terminated and truncated are both true; it counts as terminated, so the "
            "value of the last observation is not used"
        )
        yield Finding("note", "both-ends", message)


def check_info(info: Any, where: str) -> Iterator[Finding]:
    """Looks whether an info is a dictionary that can be sent between processes."""
    if not isinstance(info, dict):
        message = f"{where}: info is a {type(info).__name__}; return a dict, {{}} if there is none"
        yield Finding("error", "info-type", message)
        return
    for key, value in info.items():
        try:
            pickled((key, value))
        except Exception as error:
            message = (
                f"{where}: info[{key!r}] cannot be sent between processes ({in_a_line(error)}); "
                "backend process leaves it out"
            )
            yield Finding("warning", "info-not-picklable", message, str(key))


def check_mask(space: spaces.Space, info: Any, where: str, ended: bool) -> Iterator[Finding]:
    """Looks at `info["action_mask"]`, where there is one."""
    if not isinstance(info, dict) or info.get("action_mask") is None:
        return
    counts = choice_counts(space)
    size = sum(counts)
    name = f'{where}: info["action_mask"]'
    if size == 0:
        message = f"{name} is ignored: masks are for Discrete and MultiDiscrete actions"
        yield Finding("note", "mask-ignored", message)
        return
    try:
        mask = flat_mask(space, info["action_mask"], size)
    except Exception as error:
        yield Finding("error", "mask-size", f"{where}: the mask cannot be used: {in_a_line(error)}")
        return
    for part in np.split(mask, np.cumsum(counts)[:-1]):
        if not part.any() and not ended:
            message = f"{name} allows none of {len(part)} choices; allow one, or end the episode"
            yield Finding("error", "mask-empty", message)
            return
