"""Small environments that do one particular thing each, importable by worker processes too."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

NESTED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (3, 2), np.uint8),
        "inner": spaces.Tuple(
            (spaces.Discrete(5), spaces.Dict({"bits": spaces.MultiBinary([2, 2])}))
        ),
        "joints": spaces.Box(-2, 2, (4,), np.float32),
        "scalar": spaces.Box(-1, 1, (), np.float64),
        "which": spaces.MultiDiscrete([3, 4]),
    }
)


class SampleEnv(gym.Env):
    """Any spaces: observations and rewards are drawn from the seed and the actions so far.

    An episode ends at random, terminated or truncated, about every eighth step.
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space | None = None):
        # copies: the random streams of spaces are drawn from, and threads must not share them
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space or observation_space)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps, self.action_sum = 0, 0.0
        return self._observation(), {"fresh": True, "options": str(options)}

    def step(self, action: Any):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        leaves = [action]
        while leaves:
            leaf = leaves.pop()
            if isinstance(leaf, dict):
                leaves.extend(leaf.values())
            elif isinstance(leaf, tuple):
                leaves.extend(leaf)
            else:
                self.action_sum += float(np.sum(leaf))
        self.steps += 1
        chance = self.np_random.random()
        reward = self.np_random.normal() + self.action_sum
        info = {"steps": self.steps, "noise": self.np_random.normal(size=2)}
        return self._observation(), reward, chance < 0.06, 0.06 <= chance < 0.12, info

    def _observation(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()


class CountingEnv(gym.Env):
    """Observes how many episodes and steps there have been; ends every `length` steps."""

    observation_space = spaces.Box(0, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, length: int = 5, terminate: bool = False, render_mode: str | None = None):
        self.length, self.terminate, self.render_mode = length, terminate, render_mode
        self.episodes = self.steps = 0
        self.seed_used: int | None = None
        self.weight = 1.0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.seed_used = seed
        self.episodes += 1
        self.steps = 0
        return self._observation(), {}

    def step(self, action: int):
        self.steps += 1
        end = self.steps == self.length
        terminated, truncated = end and self.terminate, end and not self.terminate
        return self._observation(), self.weight * float(action), terminated, truncated, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.episodes, self.steps], np.float32)

    def render(self):
        return np.full((2, 2, 3), self.steps, np.uint8)


class MutatingEnv(CountingEnv):
    """Returns the same array every time, and writes into it and into its action afterwards."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self):
        super().__init__(length=3)
        self.array = np.zeros(2, np.float32)

    def _observation(self) -> np.ndarray:
        self.array[:] = super()._observation()
        return self.array

    def step(self, action: np.ndarray):
        reward = float(action.sum())
        result = super().step(0)
        action[:] = 99.0
        return result[0], reward, *result[2:]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.array[:] = -1.0
        return super().reset(seed=seed, options=options)


class MaskedEnv(CountingEnv):
    """Says which actions are allowed: all but the one that the step count points at."""

    action_space = spaces.Discrete(3)

    def reset(self, **kwargs: Any):
        observation, _ = super().reset(**kwargs)
        return observation, {"action_mask": self._mask()}

    def step(self, action: int):
        result = super().step(action)
        return *result[:4], {"action_mask": self._mask()}

    def _mask(self) -> np.ndarray:
        mask = np.ones(3, np.int8)
        mask[self.steps % 3] = 0
        return mask


class GatedEnv(CountingEnv):
    """Steps only when somebody writes a byte into the named pipe at `gate`."""

    def __init__(self, gate: str | None = None):
        super().__init__(length=100)
        self.gate = gate

    def step(self, action: int):
        if self.gate is not None:
            with open(self.gate, "rb") as pipe:
                pipe.read(1)
        return super().step(action)


def open_gate(gate: str, times: int = 1) -> None:
    """Lets environments that wait at a gate make so many steps."""
    with open(gate, "wb") as pipe:
        pipe.write(b"!" * times)


class SlowEnv(CountingEnv):
    """Computes for a millisecond at each step."""

    def step(self, action: int):
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        return super().step(action)


class FaultyEnv(CountingEnv):
    """Calls `fault` in the constructor, in `reset`, or in the given step."""

    def __init__(self, fault: Callable[[], Any], where: str = "step", step: int = 3):
        super().__init__(length=100)
        self.fault, self.where, self.fault_step = fault, where, step
        self.total = 0
        if where == "constructor":
            fault()

    def reset(self, **kwargs: Any):
        if self.where == "reset":
            self.fault()
        return super().reset(**kwargs)

    def step(self, action: int):
        self.total += 1
        if self.where == "step" and self.total == self.fault_step:
            self.fault()
        return super().step(action)

    def close(self):
        if self.where == "close":
            self.fault()


class BrokenEnv(CountingEnv):
    """Has its fault in its third step, if it was reset with one of some seeds."""

    def __init__(self, fault: Callable[[], Any], seeds: Sequence[int]):
        super().__init__(length=100)
        self.fault, self.seeds = fault, seeds

    def step(self, action: int):
        observation, reward, *rest = super().step(action)
        faulty = self.seed_used in self.seeds and self.steps == 3
        given = self.fault() if faulty else None
        return observation, reward if given is None else given, *rest


class HalvesEnv(CountingEnv):
    """Observes in two halves; `fault` is called once the first is written, in the given step."""

    observation_space = spaces.Dict({"a": CountingEnv.observation_space, "b": spaces.Discrete(2)})

    def __init__(self, fault: Callable[[], Any] | None = None, step: int = 1):
        super().__init__()
        self.fault, self.fault_step = fault, step

    def _observation(self) -> Any:
        faulty = self.fault is not None and (self.episodes, self.steps) == (1, self.fault_step)
        return {"a": super()._observation(), "b": _Second(self.fault) if faulty else 0}


class _Second:
    """A 0 that is asked for when its turn to be written has come."""

    def __init__(self, fault: Callable[[], Any]):
        self.fault = fault

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.fault()
        return np.zeros((), np.int64)


class ObservingEnv(CountingEnv):
    """Observes `value` from the second step on, and something of its space before."""

    def __init__(self, value: Any, space: spaces.Space | None = None):
        super().__init__(length=100)
        self.value = value
        if space is not None:
            self.observation_space = space

    def _observation(self) -> Any:
        return self.value if self.steps > 1 else self.observation_space.sample()


def fails_when_armed(fault: Callable[[], Any], armed: Path, trainer: int) -> gym.Env:
    """A new one fails in its third step, once, when the file is there; but never in the trainer."""

    def fail_once() -> None:
        try:
            armed.unlink()
        except FileNotFoundError:  # not yet, or another worker was first
            return
        assert os.getpid() != trainer
        fault()

    return FaultyEnv(fail_once)


def boom() -> None:
    raise ValueError("boom")


def paid_nan() -> float:
    return float("nan")


def cancelled() -> None:
    raise asyncio.CancelledError  # a BaseException, and not an Exception


def interrupted() -> None:
    raise KeyboardInterrupt


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_and_wait(pid: int) -> None:
    """Kills a process, and waits until its parent has taken note."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            time.sleep(0.001)


def hang() -> None:
    while True:
        signal.pause()


def die_and_leave(path: str) -> None:
    """Dies, but leaves a program behind that holds its pipes open; writes its id to `path`."""
    leave_program(path)
    kill_self()


def leave_program(path: str) -> None:
    """Starts a program of a group of its own that holds files open; writes its id to `path`."""
    left = subprocess.Popen(["sleep", "1000"], close_fds=False, process_group=0)
    Path(path).write_text(str(left.pid))


class LeavingEnv(CountingEnv):
    """Leaves a program behind that holds its worker's pipes open; writes its id to `path`."""

    def __init__(self, path: str):
        super().__init__()
        leave_program(path)


class ForkingEnv(CountingEnv):
    """Forks in its first step and comes back in both processes; writes the copy's id to `path`."""

    def __init__(self, path: str):
        super().__init__()
        self.path, self.copied = path, False

    def step(self, action: int):
        if not os.path.exists(self.path):
            if pid := os.fork():
                Path(self.path).write_text(str(pid))
            self.copied = not pid
        return super().step(action)


class EchoEnv(CountingEnv):
    """Gives an info of a certain size with every step."""

    def __init__(self, size: int):
        super().__init__(length=100)
        self.size = size

    def step(self, action: int):
        return *super().step(action)[:4], {"text": "x" * self.size}


class Refusal(Exception):
    """Its pickle can be written, but not read."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}: {why}")


class LockedInfoEnv(CountingEnv):
    """Gives infos of which one can travel between processes and two cannot."""

    def reset(self, **kwargs: Any):
        return super().reset(**kwargs)[0], self._info()

    def step(self, action: int):
        return *super().step(action)[:4], self._info()

    def _info(self) -> dict[str, Any]:
        return {"lock": threading.Lock(), "why": Refusal("move", "blocked"), "fine": 1}


class UnreliableEnv(SampleEnv):
    """Fails in its step or reset, or gives what no policy can learn from, at random moments.

    The moments follow from the seed, so that they are the same wherever it is stepped. At the rate
    of `deaths` it is `doomed`: its next step ends its process.
    """

    def __init__(self, observation_space: spaces.Space, rate: float = 0.05, deaths: float = 0.0):
        super().__init__(observation_space, spaces.Discrete(3))
        self.rate, self.deaths, self.doomed = rate, deaths, False

    def reset(self, **kwargs: Any):
        result = super().reset(**kwargs)
        if self.np_random.random() < self.rate:
            raise ValueError("no luck at reset")
        self._draw_lot()
        return result

    def _draw_lot(self) -> None:
        if self.deaths:
            self.doomed = self.np_random.random() < self.deaths

    def step(self, action: Any):
        if self.doomed:
            os._exit(7) if self.steps % 2 else kill_self()
        fate = self.np_random.random() / self.rate
        if fate < 1:
            raise ValueError("no luck")
        observation, reward, *rest = super().step(action)
        self._draw_lot()
        if fate < 2:
            reward = float("nan")
        elif fate < 3:
            observation = spoilt(observation)
        return observation, reward, *rest


def spoilt(observation: Any) -> Any:
    """The observation with infinite numbers wherever there can be some."""
    if isinstance(observation, dict):
        return {key: spoilt(value) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(map(spoilt, observation))
    if isinstance(observation, np.ndarray) and observation.dtype.kind == "f":
        return np.full_like(observation, np.inf)
    return observation


class LeakyEnv(CountingEnv):
    """Keeps a megabyte more of memory at every step."""

    def __init__(self, length: int = 10_000):
        super().__init__(length)
        self.kept: list[bytes] = []

    def step(self, action: int):
        self.kept.append(b"x" * (1 << 20))
        return super().step(action)


class GreedyEnv(CountingEnv):
    """Does to its process what an environment should not."""

    def step(self, action: int):
        print("\n".join(["x" * 1000] * 10))
        os.chdir("/")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=hang_in_thread, daemon=False).start()
        return super().step(action)


def hang_in_thread() -> None:
    threading.Event().wait()
