"""`check_env`: what is wrong with an environment, before hours are trained on it.

The checks run in phases, each for a limited time: environments are made, one is stepped with
random actions while everything that comes back is looked at, seeds are compared, environments are
made and closed to see what stays behind. What an environment raises is a finding and ends its
phase; the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np

from starling.envs.auto import choose_backend
from starling.envs.check_calls import CheckedCalls
from starling.envs.check_effects import (
    check_holdings,
    check_memory,
    holdings,
    watched,
)
from starling.envs.check_seeds import check_seeds
from starling.envs.check_values import (
    check_ends,
    check_info,
    check_mask,
    check_observation,
    check_reset_result,
    check_reward,
    check_spaces,
)
from starling.envs.factories import EnvFactory, env_factory
from starling.envs.findings import Finding, Findings, Report
from starling.envs.legacy import LegacyEnv, converted_methods
from starling.envs.spaces import flatten
from starling.envs.waiting import waits
from starling.errors import UserError
from starling.memory import resident_memory

_CYCLES = 3  # environments made and closed to see what stays behind
_PATIENCE = 1.0  # seconds for threads and processes to end after close()
_LOADING = 30.0  # seconds more for what imports or measures
_MEMORY_SAMPLES = 40
_SHORT_EPISODES = 10  # so many episodes of one step, and no other, are no accident
_NUM_ENVS = 8  # for which a backend is named: what `make_vec` makes unless it is told


def check_env(
    env: Any,
    env_kwargs: dict[str, Any] | None = None,
    *,
    steps: int = 1000,
    seconds: float = 10.0,
    seed: int = 0,
) -> list[Finding]:
    """Looks for what is wrong with an environment.

    It runs in this process; `starling check` also finds environments that hang or crash.

    Args:
        env: As for `make_env`.
        env_kwargs: Arguments for making it.
        steps: Steps to look at.
        seconds: How long each phase of the check may take; a call is not interrupted.
        seed: First seed of the environments, and seed of the actions.

    Returns:
        A finding for each kind of fault, the gravest first; `str(finding)` is a line to print.

    Raises:
        UserError: There is no such environment, or it does not take the arguments.
    """
    return run_checks(env, env_kwargs, steps, seconds, seed).findings


def run_checks(
    env: Any,
    env_kwargs: dict[str, Any] | None = None,
    steps: int = 1000,
    seconds: float = 10.0,
    seed: int = 0,
    calling: Callable[[str, float], None] = lambda what, extra: None,
    tell: Callable[[Finding], None] = lambda finding: None,
    interruptible: bool = True,
) -> Report:
    """`check_env` for those who watch over it.

    Args:
        env: This and the following as for `check_env`.
        env_kwargs: See there.
        steps: See there.
        seconds: See there.
        seed: See there.
        calling: Told in a few words which call comes next, and how many seconds more than
            `seconds` it may take.
        tell: Told of every new finding at once.
        interruptible: Whether Ctrl-C reaches this process: then it is the user's, and no finding.
    """
    _check_arguments(steps, seconds, seed)
    start = time.monotonic()
    findings, walk = Findings(tell), _Walk()
    calls = CheckedCalls(findings, seconds, calling, interruptible)
    calling("importing it", _LOADING)
    factory = _factory(env, env_kwargs, calls)
    with watched(findings):
        if factory is not None and _make_two(calls, factory):
            with calls.phase("stepping it"):
                _step_through(calls, factory, steps, seed, walk)
            with calls.phase("comparing seeds"):
                check_seeds(calls, factory, seed, steps)
            with calls.phase("making and closing it"):
                _make_and_close(calls, factory, seed)
        if walk.steps:
            calling("measuring", _LOADING)
            with calls.phase("measuring its speed"):
                findings.add(_speed(env, env_kwargs, walk.rate))
    elapsed = time.monotonic() - start
    return Report(findings.sorted(), walk.steps, walk.episodes, elapsed, walk.rate)


def _check_arguments(steps: int, seconds: float, seed: int) -> None:
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if not seconds > 0:
        raise UserError(f"seconds must be above 0, not {seconds}")
    if seed < 0:
        raise UserError(f"seed must be at least 0, not {seed}")


def _factory(env: Any, env_kwargs: Any, calls: CheckedCalls) -> EnvFactory | None:
    with calls.phase("importing it"):
        try:
            return env_factory(env, env_kwargs)
        except UserError:
            raise
        except BaseException as error:
            calls.raised("import-raises", "importing it", error)
    return None


# ---- making


def _make_two(calls: CheckedCalls, factory: EnvFactory) -> bool:
    """Makes two environments; returns whether there is any use in stepping one."""
    usable = False
    with calls.phase("making it"), calls.made(factory) as env:
        about_spaces = list(check_spaces(env))
        calls.findings.add(*about_spaces)
        usable = not any(finding.level == "error" for finding in about_spaces)
        if not usable:
            return False
        calls.findings.add(*_check_travels(factory, env))
        second = calls.make(factory, "making a second one beside the first")
        if second is env:
            message = "making it twice gives the same object; make a new one each time"
            calls.findings.add(Finding("error", "same-object", message))
            return usable
        for kind in ("observation_space", "action_space"):
            mine, other = getattr(env, kind), getattr(second, kind)
            if mine != other:
                message = (
                    f"two of them have a different {kind}, {mine} and {other}; environments that "
                    "are trained on together need the same"
                )
                calls.findings.add(Finding("error", "spaces-differ", message, kind))
        calls.close(second)
    return usable


def _check_travels(factory: EnvFactory, env: gym.Env) -> Iterator[Finding]:
    """Looks whether worker processes can make it, and send its spaces back."""
    what = "what makes it"
    try:
        cloudpickle.dumps(factory)
        what = "a space of it"
        pickle.dumps((env.observation_space, env.action_space))
    except Exception as error:
        reason = " ".join(str(error).split())
        message = (
            f"{what} cannot be sent to worker processes ({type(error).__name__}: {reason}), so "
            "backend process cannot be used; make what it needs inside the environment"
        )
        yield Finding("warning", "not-picklable", message)


def _make_and_close(calls: CheckedCalls, factory: EnvFactory, seed: int) -> None:
    """Finds what stays behind when environments are closed."""
    deadline = time.monotonic() + calls.seconds
    gc.collect()
    before = holdings()
    for n in range(_CYCLES):
        if n and time.monotonic() > deadline:
            return
        with calls.made(factory) as env:
            calls.reset(env, seed, "reset")
            calls.step(env, calls.choose(env.action_space, {}, "step 1"), "step 1")
        del env
    gc.collect()
    patience = time.monotonic() + _PATIENCE
    while list(check_holdings(before, after := holdings(), _CYCLES)):
        if time.monotonic() > patience:
            break
        calls.calling("waiting for what it left", _PATIENCE)
        time.sleep(0.01)
    calls.findings.add(*check_holdings(before, after, _CYCLES))


# ---- stepping


@dataclass
class _Walk:
    """How far stepping got, and what can be said of all steps together."""

    steps: int = 0
    episodes: int = 0
    elapsed: float = 0.0  # seconds in the environment
    changes: bool = False  # whether an observation differed from the one before
    memory: list[tuple[int, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.steps / self.elapsed if self.elapsed else 0.0


def _step_through(
    calls: CheckedCalls, factory: EnvFactory, limit: int, seed: int, walk: _Walk
) -> None:
    """Steps an environment at random and looks at everything that comes back."""
    add = calls.findings.add
    with calls.made(factory) as env:
        space, actions = env.observation_space, copy.deepcopy(env.action_space)
        actions.seed(seed)
        deadline = time.monotonic() + calls.seconds
        info, last = _reset(calls, env, seed, walk)
        while walk.steps < limit and time.monotonic() < deadline:
            where = f"step {walk.steps + 1}"
            action = calls.choose(actions, info, where)
            given = copy.deepcopy(action)
            start = time.perf_counter()
            observation, reward, terminated, truncated, info = calls.step(env, given, where)
            walk.elapsed += time.perf_counter() - start
            walk.steps += 1
            add(
                *check_observation(space, observation, where),
                *check_reward(reward, where),
                *check_ends(terminated, truncated, where),
                *_check_arrays(actions, action, given, last, where),
            )
            ended = bool(np.any(terminated) or np.any(truncated))
            info = _usable_info(calls.findings, actions, info, where, ended)
            now = _arrays(space, observation)
            walk.changes |= not now or _contents(now) != _contents(last)
            last = now
            if walk.steps % max(1, limit // _MEMORY_SAMPLES) == 0:
                walk.memory.append((walk.steps, resident_memory() / 2**20))
            if ended:
                walk.episodes += 1
                info, last = _reset(calls, env, None, walk)
        add(*check_memory(walk.memory), *_look_back(env, walk, walk.steps >= limit))


def _reset(
    calls: CheckedCalls, env: gym.Env, seed: int | None, walk: _Walk
) -> tuple[dict[str, Any], list[tuple[np.ndarray, bytes]]]:
    """Starts an episode; returns an info to choose an action by, and the observation's arrays."""
    where = f"reset {walk.episodes + 1}"
    start = time.perf_counter()
    observation, info = calls.reset(env, seed, where)
    walk.elapsed += time.perf_counter() - start
    found = list(check_reset_result(env.observation_space, observation))
    calls.findings.add(*found or check_observation(env.observation_space, observation, where))
    usable = _usable_info(calls.findings, env.action_space, info, where, ended=False)
    return usable, _arrays(env.observation_space, observation)


def _usable_info(
    findings: Findings, space: gym.Space, info: Any, where: str, ended: bool
) -> dict[str, Any]:
    """Looks at an info; returns it if an action can be chosen by its mask, else an empty one."""
    about_mask = list(check_mask(space, info, where, ended))
    findings.add(*check_info(info, where), *about_mask)
    return info if isinstance(info, dict) and not about_mask else {}


def _arrays(space: gym.Space, observation: Any) -> list[tuple[np.ndarray, bytes]]:
    """The arrays of an observation, and what they hold now."""
    try:
        arrays = [np.asarray(value) for value in flatten(space, observation)]
    except Exception:  # it is not what its space says, which has been found elsewhere
        return []
    return [(array, array.tobytes()) for array in arrays]


def _contents(arrays: list[tuple[np.ndarray, bytes]]) -> list[bytes]:
    return [content for _, content in arrays]


def _check_arrays(
    space: gym.Space,
    action: Any,
    given: Any,
    last: list[tuple[np.ndarray, bytes]],
    where: str,
) -> Iterator[Finding]:
    """Looks whether a step wrote into its action, or into the observation before."""
    if _contents(_arrays(space, action)) != _contents(_arrays(space, given)):
        message = (
            f"{where}: the action was written into, which belongs to the caller and may be what "
            "is learnt from; copy it first"
        )
        yield Finding("warning", "action-written", message)
    if any(array.tobytes() != content for array, content in last):
        message = (
            f"{where}: the observation before was written into; Starling copies observations, "
            "other libraries may not: return a new array each time"
        )
        yield Finding("note", "observation-reused", message)


def _look_back(env: gym.Env, walk: _Walk, complete: bool) -> Iterator[Finding]:
    """What only many steps tell."""
    steps = f"{walk.steps:,} steps"
    if not walk.episodes and not _has_limit(env):
        message = (
            f"no episode ended in {steps}, and there is no time limit; end episodes, or give "
            "max_episode_steps (for ids) or gymnasium.wrappers.TimeLimit"
        )
        yield Finding("warning" if complete else "note", "no-episode-end", message)
    if walk.episodes == walk.steps >= _SHORT_EPISODES:
        message = f"all {walk.episodes:,} episodes ended after one step; are the ends right?"
        yield Finding("warning", "one-step-episodes", message)
    elif not walk.changes and walk.steps > 1:
        message = f"the observation was the same in all {steps}; does step() bring it up to date?"
        yield Finding("warning", "observation-constant", message)
    old = converted_methods(env)
    if isinstance(env.unwrapped, LegacyEnv):
        name = type(env.unwrapped.env).__name__
        message = (
            f"{name} does not derive from gymnasium.Env; Starling converts what it takes and "
            "returns, other libraries may not"
        )
        yield Finding("note", "old-interface", message)
    elif old:
        message = (
            f"{' and '.join(f'{name}()' for name in old)} of an older Gym's interface, which "
            "Starling converts and other libraries may not; today's are reset(self, *, seed=None, "
            "options=None), which returns (observation, info), and step(self, action), which "
            "returns (observation, reward, terminated, truncated, info)"
        )
        yield Finding("note", "old-interface", message)


def _has_limit(env: gym.Env) -> bool:
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, gym.wrappers.TimeLimit):
            return True
        layer = layer.env
    return getattr(layer.spec, "max_episode_steps", None) is not None


# ---- speed


def _speed(env: Any, env_kwargs: dict[str, Any] | None, rate: float) -> Finding:
    does = "waits, so threads help" if waits(env, env_kwargs) else "computes"
    message = f"{rate:,.0f} steps/s on one core, resets included; a step mostly {does}"
    with contextlib.suppress(Exception):  # whatever it is, it has been found
        choice = choose_backend(env, _NUM_ENVS, env_kwargs=env_kwargs)
        message += (
            f"; for {_NUM_ENVS} environments make_vec takes backend {choice.backend}: "
            f"{choice.reason}"
        )
        if choice.backend == "compiled":
            message += "; inside a program, as in training, steps are many times faster"
    return Finding("note", "speed", message)
