"""Five minutes of AsyncPPO: every rollout once, none too old, and no memory lost."""

from __future__ import annotations

import time

import numpy as np
import pytest

from starling.memory import resident_memory
from starling.training.async_ppo import AsyncPPO
from starling.training.trainer import Iteration

MINUTES = 5
ACTORS, LAG = 3, 2


@pytest.mark.slow
@pytest.mark.timeout(60 * (MINUTES + 3))
def test_nothing_is_lost_in_minutes_of_training(tmp_path, no_leaks):
    expected = [0] * ACTORS
    oldest, memory = [], []
    start = time.monotonic()

    with AsyncPPO(
        "CartPole-v1",
        num_envs=12,
        num_actors=ACTORS,
        num_steps=64,
        mini_batch_size=256,
        max_policy_lag=LAG,
        max_time=60 * MINUTES,
        timesteps=10**9,
        backend="serial",
        preset="none",
        log_dir=str(tmp_path),
    ) as agent:

        def check(iteration: Iteration) -> None:
            assert agent._pool is not None
            for rollout in agent._pool.taken:
                worker = rollout.origin.worker
                assert rollout.origin.sequence == expected[worker]
                expected[worker] += 1
            oldest.append(max(agent._pool.lags))
            memory.append((time.monotonic() - start, resident_memory() / 2**20))

        result = agent.train(quiet=True, callbacks=check)
    assert result.status == "max_time"
    assert 1 <= max(oldest) <= LAG
    seconds, megabytes = np.array(memory).T
    settled = seconds > 60
    slope = np.polyfit(seconds[settled] / 60, megabytes[settled], 1)[0]
    print(f"{len(memory)} iterations, {result.steps:,} steps, memory {slope:+.2f} MB a minute")
    assert slope < 1.0
