"""A sound environment, and what makes classes like it that have one fault each."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

import starling
from starling.envs.findings import Finding

F32 = np.float32
NAN = np.array([0, np.nan], F32)


class Walk(gym.Env):
    """Sound: moves by its actions from a random place; an episode has seven steps."""

    observation_space: spaces.Space = spaces.Box(-100, 100, (2,), np.float32)
    action_space: spaces.Space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        self.place = self.start()
        return self.observe(), self.info()

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.place = self.place + self.moved(action)
        return self.observe(), self.reward(), *self.ends(), self.info()

    def start(self) -> np.ndarray:
        return self.np_random.normal(size=2)

    def moved(self, action: Any) -> Any:
        return np.sum(action)

    def observe(self) -> Any:
        return self.place.astype(np.float32)

    def reward(self) -> Any:
        return float(self.place.sum())

    def ends(self) -> tuple[Any, Any]:
        return self.steps == 7, False

    def info(self) -> Any:
        return {"steps": self.steps}


def walk(**changes: Any) -> type[Walk]:
    """A class like `Walk` with other methods or spaces."""
    return type("Changed", (Walk,), changes)


def check(env: Any, steps: int = 30, **settings: Any) -> list[Finding]:
    return starling.check_env(env, steps=steps, **settings)


def faults(env: Any, **settings: Any) -> list[Finding]:
    """What is found but for the speed, which is no fault."""
    return [finding for finding in check(env, **settings) if finding.name != "speed"]


# ---- spaces

SMALL = spaces.Box(0, 1, (2,), np.float32)


def box(position: int, low: float, high: float) -> spaces.Box:
    """A box that was changed after it was made, as Gymnasium would refuse it."""
    space = spaces.Box(-100, 100, (2,), np.float32)
    space.low[position], space.high[position] = low, high
    return space


NESTED = spaces.Dict({"camera": spaces.Box(0, 255, (2, 3), np.uint8), "speed": SMALL})
CAMERA = np.arange(6, dtype=np.uint8).reshape(2, 3)


def nested(camera: Any = CAMERA, **more: Any) -> type[Walk]:
    def observe(self: Walk) -> Any:
        return {"camera": camera, "speed": self.place.astype(np.float32) % 1, **more}

    return walk(observation_space=NESTED, observe=observe)


def low() -> type[Walk]:
    """Observes less than its space allows."""
    space = spaces.Box(0, 1, (2,), np.float32)
    return walk(observation_space=space, observe=lambda self: np.array([0, -7 - self.steps], F32))


def masked(mask: Any, space: spaces.Space | None = None) -> type[Walk]:
    return walk(action_space=space or spaces.Discrete(3), info=lambda self: {"action_mask": mask})


PAIRS = spaces.MultiDiscrete([2, 3])


def counted(first: int) -> type[Walk]:
    """Observes the number of steps."""
    return walk(observation_space=spaces.Discrete(8), observe=lambda self: first + self.steps)


def ending(ends: Callable[[bool], Any]) -> type[Walk]:
    """What `ends` makes of whether it is the last step."""
    return walk(ends=lambda self: ends(self.steps == 7))


# ---- reset and step


def reset_alone(self: Walk, seed: int | None = None, options: dict | None = None) -> Any:
    return Walk.reset(self, seed=seed)[0]


def reset_without_info(self: Walk, *, seed: int | None = None, options: Any = None) -> Any:
    return Walk.reset(self, seed=seed)[0], None


def step_of_four(self: Walk, action: Any) -> Any:
    observation, reward, terminated, _, info = Walk.step(self, action)
    return observation, reward, terminated, info


def step_of_three(self: Walk, action: Any) -> Any:
    return Walk.step(self, action)[:3]


def step_of_three_later(self: Walk, action: Any) -> Any:
    result = Walk.step(self, action)
    return result if self.steps < 3 else result[:3]


class Plain:
    """Not a Gymnasium environment, but it has all that is needed."""

    def __init__(self) -> None:
        self.env = Walk()
        self.observation_space, self.action_space = Walk.observation_space, Walk.action_space

    def reset(self, **kwargs: Any) -> Any:
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        return self.env.step(action)


class WithoutSpaces:
    """An environment that does not say what it takes and gives."""

    def reset(self, seed: int | None = None, options: dict | None = None) -> Any:
        return 0, {}

    def step(self, action: Any) -> Any:
        return 0, 0.0, True, False, {}


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no licence")


def leaves(*_: Any) -> Any:
    raise SystemExit(3)


def raising(error: type[BaseException]) -> Callable[..., Any]:
    """Raises what `except Exception` does not catch."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def stubborn() -> type[Walk]:
    """What it gives along with an observation raises when it is pickled."""
    cancelled = raising(asyncio.CancelledError)
    return walk(info=lambda self: {"task": type("Task", (), {"__reduce__": cancelled})()})


def at(step: int, change: Callable[[Walk], Any], method: str) -> type[Walk]:
    """`method` gives what `change` returns in one step of each episode."""
    sound = getattr(Walk, method)
    return walk(**{method: lambda self: change(self) if self.steps == step else sound(self)})


def scaled(bound: float) -> type[Walk]:
    space = spaces.Box(-bound, bound, (2,), np.float32)
    return walk(action_space=space, moved=lambda self, action: action / bound)


def reused() -> type[Walk]:
    def reset(self: Walk, **kwargs: Any) -> Any:
        self.array = np.zeros(2, np.float32)
        return Walk.reset(self, **kwargs)

    def observe(self: Walk) -> Any:
        self.array[:] = self.place
        return self.array

    return walk(reset=reset, observe=observe)


def empty() -> type[Walk]:
    return walk(observation_space=NESTED, observe=lambda self: {})


def surviving() -> type[Walk]:
    def start(self: Walk) -> Any:
        self.episodes = getattr(self, "episodes", 0) + 1
        return self.np_random.normal(size=2) + self.episodes

    return walk(start=start)


def written(self: Walk, action: Any) -> Any:
    moved = action.sum()
    action[:] = 0
    return moved


def seeded(seed: Any) -> Callable[[Walk], np.ndarray]:
    return lambda self: np.random.default_rng(seed).normal(size=2)


def drawn(self: Walk) -> Any:
    return np.random.normal(size=2)  # noqa: NPY002


def noisy(self: Walk) -> float:
    return random.SystemRandom().random()


def global_seed(self: Walk) -> Any:
    np.random.seed(self.np_random.integers(1000))  # noqa: NPY002
    return np.random.normal(size=2)  # noqa: NPY002


def with_lock() -> Any:
    lock = threading.Lock()
    return lambda: (lock, Walk())[1]


def only_one() -> type[Walk]:
    """A class whose environments need something that there is one of."""
    taken: list[Walk] = []

    def init(self: Walk) -> None:
        if taken:
            raise OSError("the port is taken")
        taken.append(self)

    return walk(__init__=init, close=lambda self: taken.clear())


def differing() -> Any:
    sizes = iter(range(1, 100))

    def make() -> Walk:
        n = next(sizes)
        space = spaces.Box(-100, 100, (n,), np.float32)
        return walk(observation_space=space, start=lambda self: self.np_random.normal(size=n))()

    return make


def the_same() -> Any:
    one = Walk()
    return lambda: one
