"""An environment with one fault, for any library that steps Gymnasium's environments.

It needs Gymnasium and NumPy only, so that every library's own Python can import it.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

MESSAGE = "the sensor is unplugged"  # what the faulty environment raises
FAULTY_STEP = 3
LATE = 1.0  # seconds that the late answer takes
SLOW_STEP = 0.05  # seconds; long enough that a signal finds the worker in a step


class Faulty(gymnasium.Env[np.ndarray, np.int64]):
    """Observes `[episode, step]`, both from 1 on, and is paid the number of the step.

    Its fault happens once, even if a library makes the environment anew, and leaves the monotonic
    time in the file `happened`.
    """

    observation_space = gymnasium.spaces.Box(0.0, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, fault: str, folder: str):
        """Makes an environment; `fault` is empty for one that has none."""
        self.fault, self.happened = fault, Path(folder, "happened")
        self.episode = self.steps = 0
        self.array = np.zeros(2, np.float32)
        self._raise_in("constructor")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begins an episode."""
        super().reset(seed=seed)
        self._raise_in("reset")
        self.episode += 1
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.int64):
        """Counts."""
        self.steps += 1
        if self.fault == "slow":
            time.sleep(SLOW_STEP)
        elif self.steps == FAULTY_STEP and self.fault and self._is_due():
            return self._faulty_step()
        return self._observation(), float(self.steps), False, False, {}

    def _observation(self) -> np.ndarray:
        if self.fault == "reused array":
            self.array[:] = self.episode, self.steps
            return self.array
        return np.array([self.episode, self.steps], np.float32)

    def _raise_in(self, method: str) -> None:
        if self.fault == f"raise in {method}" and self._is_due():
            raise ValueError(MESSAGE)

    def _is_due(self) -> bool:
        """Whether this is the first time, which is written down."""
        try:
            with open(self.happened, "x") as file:
                file.write(str(time.monotonic()))
        except FileExistsError:
            return False
        return True

    def _faulty_step(self):
        observation, reward, truncated = self._observation(), float(self.steps), False
        match self.fault:
            case "raise in step":
                raise ValueError(MESSAGE)
            case "exit":
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600.0)
            case "late":
                time.sleep(LATE)
            case "NaN observation":
                observation[1] = np.nan
            case "infinite reward":
                reward = np.inf
            case "too large":
                observation = np.array([self.episode, 1e300])
            case "wrong shape":
                observation = np.zeros(3, np.float32)
            case "float64":
                observation = observation.astype(np.float64)
            case "reused array":
                truncated = True
            case _:
                raise NotImplementedError(self.fault)
        return observation, reward, False, truncated, {}
