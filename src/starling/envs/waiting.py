"""Whether an environment computes or waits: many threads help it in the second case only."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

from starling.envs.factories import EnvPoolFactory, env_factory

_BUDGET = 0.1  # seconds to measure for
_MOST_STEPS = 50


def waits(env: Any, env_kwargs: dict[str, Any] | None = None) -> bool:
    """Measures whether a step mostly waits: for another program, a device, a clock.

    Args:
        env: As for `make_env`.
        env_kwargs: Arguments for making it.

    Returns:
        True if this process is at work for less than half of the time of a random step. The median
        of some steps decides: a busy machine interrupts a few of them. False if it fails: whoever
        steps it next reports that properly.
    """
    try:
        factory = env_factory(env, env_kwargs)
        if isinstance(factory, EnvPoolFactory):  # its own threads compute while this one waits
            return False
        made = factory()
    except Exception:
        return False
    try:
        made.action_space.seed(0)
        made.reset(seed=0)
        made.step(made.action_space.sample())  # the first step may compile or load things
        made.reset()
        busy = []
        start = time.perf_counter()
        while len(busy) < _MOST_STEPS and time.perf_counter() - start < _BUDGET:
            action = made.action_space.sample()
            before, working = time.perf_counter(), time.process_time()
            _, _, terminated, truncated, *_ = made.step(action)
            worked = time.process_time() - working
            busy.append(worked / (time.perf_counter() - before))
            if terminated or truncated:
                made.reset()
        return statistics.median(busy) < 0.5
    except Exception:
        return False
    finally:
        with contextlib.suppress(Exception):
            made.close()
