"""How many environment steps per second a backend makes, policies left out."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete, MultiDiscrete

from starling.envs.make import BACKENDS, env_name, make_vec
from starling.envs.spaces import allowed_actions
from starling.errors import StarlingError, UserError

_BATCHES = 64  # of random actions, sampled beforehand
_WARM_UP = 10  # steps before the clock starts


@dataclass(frozen=True)
class Rate:
    """What one backend did.

    Attributes:
        backend: Its name.
        num_workers: Threads or processes that it used; 0 if it did not run.
        steps_per_second: Environment steps per second; 0.0 if it did not run.
        problem: Why it did not run, else "".
    """

    backend: str
    num_workers: int
    steps_per_second: float
    problem: str = ""


def rate_of(
    env: Any,
    num_envs: int = 8,
    backend: str = "auto",
    num_workers: int | None = None,
    seconds: float = 3.0,
    seed: int = 0,
) -> Rate:
    """Measures a backend with random actions, of those that masks allow.

    Compiled environments are stepped by a program, as trainers have it done.

    Args:
        env: As for `make_vec`; a vector environment is not closed.
        num_envs: Number of environments.
        backend: One backend, or `auto`.
        num_workers: As for `make_vec`.
        seconds: How long to step, resets of ended episodes included.
        seed: Of environments and actions.

    Raises:
        UserError: An unknown environment or backend, or arguments that do not go together.
    """
    if not seconds > 0:
        raise UserError(f"seconds is {seconds}; it must be above 0")
    envs = make_vec(env, num_envs, backend, num_workers, seed, copy=False)
    with contextlib.closing(envs):
        if envs.compiled is not None:
            from starling.envs.compiled_rate import steps_per_second

            rate = steps_per_second(envs.compiled, seconds, seed)
            return Rate(envs.backend, envs.num_workers, rate)
        _, infos = envs.reset()
        envs.action_space.seed(seed)
        actions = [envs.action_space.sample() for _ in range(_BATCHES)]
        space, generator = envs.single_action_space, np.random.default_rng(seed)
        steps, elapsed = -_WARM_UP, 0.0
        while elapsed < seconds:
            batch = actions[steps % _BATCHES]
            if "action_mask" in infos and isinstance(space, Discrete | MultiDiscrete):
                batch = allowed_actions(space, infos["action_mask"], generator)
            before = time.perf_counter()
            *_, infos = envs.step(batch)
            steps += 1
            if steps > 0:
                elapsed += time.perf_counter() - before
        return Rate(envs.backend, envs.num_workers, steps * envs.num_envs / elapsed)


def compare(
    env: Any,
    num_envs: int = 8,
    seconds: float = 3.0,
    num_workers: int | None = None,
    seed: int = 0,
) -> tuple[list[Rate], str]:
    """Measures every backend, one after the other.

    Args:
        env: As for `make_vec`, but not a vector environment.
        num_envs: Number of environments.
        seconds: How long to step each backend.
        num_workers: As for `make_vec`.
        seed: Of environments and actions.

    Returns:
        A row per backend, and one line that recommends the fastest.

    Raises:
        UserError: No backend can step it; the message is that of the first.
    """
    rates, problems = [], []
    for backend in BACKENDS:
        try:
            rates.append(rate_of(env, num_envs, backend, num_workers, seconds, seed))
        except (StarlingError, OSError) as error:
            problems.append(error)
            rates.append(Rate(backend, 0, 0.0, (str(error).splitlines() or [repr(error)])[0]))
    if len(problems) == len(rates):
        raise problems[0]
    return rates, _recommendation(env_name(env), num_envs, rates)


def _recommendation(name: str, num_envs: int, rates: list[Rate]) -> str:
    *_, second, best = [
        Rate("", 0, 0.0),
        *sorted(rates, key=lambda rate: rate.steps_per_second),
    ]
    line = f"{name} with {num_envs} environments: take backend {best.backend}"
    if best.num_workers > 1:
        line += f" with {best.num_workers} workers"
    if best.backend == "compiled":
        line += " inside a program"
    if second.steps_per_second:
        ratio = best.steps_per_second / second.steps_per_second
        line += f", {ratio:.2f} times as fast as {second.backend}"
    return line
