"""Twenty minutes of AsyncPPO whose workers are killed every few seconds: it learns all the same.

`STARLING_SOAK_MINUTES` makes it shorter, to see that it works.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from leaks import children, descriptors
from measured import record

from starling.memory import resident_memory
from starling.training.async_ppo import AsyncPPO
from starling.training.trainer import Iteration

MINUTES = float(os.environ.get("STARLING_SOAK_MINUTES", "20"))
SECONDS_BETWEEN_KILLS = (1.0, 5.0)


def kill_now_and_then(over: threading.Event, killed: list[int]) -> None:
    moments = random.Random(0)
    while not over.wait(moments.uniform(*SECONDS_BETWEEN_KILLS)):
        with contextlib.suppress(ProcessLookupError, IndexError):
            pid = moments.choice(sorted(children()))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)


@pytest.mark.slow
@pytest.mark.timeout(60 * (MINUTES + 5))
def test_it_learns_while_its_workers_are_killed(tmp_path, no_leaks):
    over, killed = threading.Event(), []
    memory, files, steps = [], [], []
    start = time.monotonic()
    with AsyncPPO(
        "CartPole-v1",
        num_envs=8,
        num_workers=2,
        backend="process",
        on_env_error="restart",
        max_restarts=10_000,
        max_time=60 * MINUTES,
        timesteps=10**9,
        keep_checkpoints=2,
        log_dir=str(tmp_path),
    ) as agent:

        def note(iteration: Iteration) -> None:
            memory.append((time.monotonic() - start, resident_memory() / 2**20))
            files.append(len(descriptors()))
            steps.append(iteration.step)

        killer = threading.Thread(target=kill_now_and_then, args=(over, killed))
        killer.start()
        try:
            result = agent.train(quiet=True, callbacks=note)
        finally:
            over.set()
            killer.join()
        score = agent.evaluate(episodes=100).mean_return
        deaths = agent.envs.faults["worker_deaths"]
    seconds, megabytes = np.array(memory).T
    settled = seconds > seconds[-1] / 4
    slope = np.polyfit(seconds[settled] / 60, megabytes[settled], 1)[0]
    record(
        "soak",
        minutes=round(seconds[-1] / 60, 1),
        kills=len(killed),
        deaths=deaths,
        steps=result.steps,
        score=round(score),
        slope=round(slope, 2),
        handles_before=files[0],
        handles_after=files[-1],
    )
    assert result.status == "max_time"
    assert deaths >= 0.8 * len(killed) > 0  # one may be killed twice before it is noticed
    assert (np.diff(steps) > 0).all()
    assert score >= 475
    assert slope < 1.0
    later = files[len(files) // 4 :]
    assert max(later) - min(later) <= 8, "descriptors are lost"
