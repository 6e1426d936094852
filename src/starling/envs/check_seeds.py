"""Whether a seed and the actions decide what an environment does: the same trajectory, again."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from starling.envs.check_calls import CheckedCalls
from starling.envs.check_effects import generator_states, seed_generators
from starling.envs.check_values import check_mask
from starling.envs.factories import EnvFactory
from starling.envs.findings import Finding
from starling.envs.spaces import flatten, leaves

_MOST_STEPS = 200
_TRAJECTORIES = 6  # that share the time of the phase


class _Trajectory(NamedTuple):
    """What an environment did.

    Attributes:
        frames: For each reset and step its name, and a hash of each thing that it returned.
        steps: How many steps are among them.
        drawn_from: Which of the process's random generators were used.
        states: How these were left.
    """

    frames: list[tuple[str, dict[str, int]]]
    steps: int
    drawn_from: list[str]
    states: dict[str, Any]


def check_seeds(calls: CheckedCalls, factory: EnvFactory, seed: int, steps: int) -> None:
    """Compares trajectories of the same seed and of others.

    Args:
        calls: How to call environments, and where findings go.
        factory: Makes them.
        seed: The first seed.
        steps: Steps to compare at most.
    """
    limit = min(steps, _MOST_STEPS)
    with calls.made(factory) as env:
        first = _trajectory(calls, env, seed, limit)
        limit = first.steps
        used = _trajectory(calls, env, seed, limit)

    def anew(seed: int, global_seed: int = 0) -> _Trajectory:
        with calls.made(factory) as env:
            return _trajectory(calls, env, seed, limit, global_seed)

    again = anew(seed)
    if difference := _difference(first, again):
        message = (
            f"two new environments with seed {seed} and the same actions differ {difference}; "
            "without that, exact_resume and repeated runs are impossible: draw all that is random "
            "from self.np_random"
        )
        calls.findings.add(Finding("warning", "not-deterministic", message))
    elif difference := _difference(first, used):
        message = (
            f"reset(seed={seed}) of a used environment differs from that of a new one "
            f"{difference}; something survives the reset, so exact_resume is impossible"
        )
        calls.findings.add(Finding("warning", "reset-incomplete", message))
    if first.drawn_from:
        calls.findings.add(*_about_generators(first, anew(seed, global_seed=1)))
        return
    others = [anew(seed + 1), anew(seed + 2)]
    if not any(_difference(first, other) for other in (again, *others)):
        message = (
            f"seeds {seed}, {seed + 1} and {seed + 2} give the same observations and rewards; "
            "draw what is random from self.np_random, which super().reset(seed=seed) seeds (fine "
            "if nothing is random)"
        )
        calls.findings.add(Finding("warning", "seed-ignored", message))


def _about_generators(first: _Trajectory, other: _Trajectory) -> Iterator[Finding]:
    for name in first.drawn_from:
        if first.states[name] == other.states[name]:
            message = (
                f"it seeds the generator of the whole process, {name}: environments beside it, "
                "and your own code, repeat themselves; draw from self.np_random instead"
            )
            yield Finding("warning", "seeds-global-random", message, name)
        else:
            message = (
                f"it draws from the generator of the whole process, {name}, which its seed does "
                "not reach; draw from self.np_random instead"
            )
            yield Finding("warning", "global-random", message, name)


def _trajectory(
    calls: CheckedCalls, env: gym.Env, seed: int, limit: int, global_seed: int = 0
) -> _Trajectory:
    actions = copy.deepcopy(env.action_space)
    actions.seed(0)
    seed_generators(global_seed)
    before = generator_states()
    deadline = time.monotonic() + calls.seconds / _TRAJECTORIES
    observation, info = calls.reset(env, seed, "reset")
    frames = [("in the first observation", _hashes(env, observation))]
    n = 0
    while n < limit and time.monotonic() < deadline:
        n += 1
        masked = isinstance(info, dict) and not list(check_mask(actions, info, "", False))
        where = f"step {n}, seed {seed}"
        action = calls.choose(actions, info if masked else {}, where)
        observation, reward, terminated, truncated, info = calls.step(env, action, where)
        returned = {"reward": reward, "terminated": terminated, "truncated": truncated}
        hashes = {what: hash(repr(value)) for what, value in returned.items()}
        frames.append((f"in step {n}", {**_hashes(env, observation), **hashes}))
        if _true(terminated) or _true(truncated):
            observation, info = calls.reset(env, None, "reset")
            frames.append((f"in the reset after step {n}", _hashes(env, observation)))
    states = generator_states()
    used = [name for name, state in states.items() if state != before[name]]
    return _Trajectory(frames, n, used, states)


def _hashes(env: gym.Env, observation: Any) -> dict[str, int]:
    try:
        values = flatten(env.observation_space, observation)
        names = [leaf.name for leaf in leaves(env.observation_space)]
        return {
            f"observation {name!r}" if name else "observation": _hash(value)
            for name, value in zip(names, values, strict=True)
        }
    except Exception:  # it is not what its space says, which has been found elsewhere
        return {"observation": hash(repr(observation))}


def _hash(value: Any) -> int:
    array = np.asarray(value)
    return hash(repr(value)) if array.dtype.hasobject else hash(array.tobytes())


def _true(flag: Any) -> bool:
    return bool(np.any(flag))


def _difference(one: _Trajectory, other: _Trajectory) -> str:
    """Where two trajectories differ first, or ""."""
    for (where, mine), (_, theirs) in zip(one.frames, other.frames, strict=False):
        differing = [what for what in mine if mine[what] != theirs.get(what)]
        if differing:
            return f"{where} ({', '.join(differing)})"
    return ""
