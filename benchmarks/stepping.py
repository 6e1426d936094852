"""Stepping CartPole-v1: worker processes beside Gymnasium's, and beside one thread.

Random actions are drawn beforehand. The limit is what the cores can do at best: as many processes
as there are cores, each stepping one environment in a bare loop, all at the same time.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time

import gymnasium
import numpy as np
from measuring import Row, arguments, in_turn, median, report, shown, spread

import starling
from starling.envs.sharded import usable_cores

ENV = "CartPole-v1"
BARE_LOOP = """
import sys, time
import gymnasium
env = gymnasium.make(sys.argv[1], disable_env_checker=True)
env.reset(seed=0)
print("ready", flush=True)
sys.stdin.readline()
steps, end = 0, time.perf_counter() + float(sys.argv[2])
while time.perf_counter() < end:
    for action in (0, 1) * 500:
        terminated, truncated = env.step(action)[2:4]
        if terminated or truncated:
            env.reset()
    steps += 1000
print(steps)
"""


def stepping_rate(envs: gymnasium.vector.VectorEnv, seconds: float) -> float:
    """Environment steps per second, over `seconds` after a short warm-up."""
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 2, (64, envs.num_envs))
    try:
        envs.reset(seed=0)
        for action in actions:
            envs.step(action)
        steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            for action in actions:
                envs.step(action)
            steps += actions.size
        return steps / elapsed
    finally:
        envs.close()


def starling_rate(backend: str, num_envs: int, seconds: float) -> float:
    """Steps per second of a backend, with a worker for each core."""
    return stepping_rate(starling.make_vec(ENV, num_envs, backend=backend), seconds)


def gymnasium_rate(num_envs: int, seconds: float) -> float:
    """Steps per second of Gymnasium's AsyncVectorEnv."""
    envs = gymnasium.make_vec(ENV, num_envs, vectorization_mode="async")
    return stepping_rate(envs, seconds)


def limit(seconds: float) -> float:
    """Steps per second of as many bare loops as there are cores."""
    loops = [
        subprocess.Popen(
            [sys.executable, "-c", BARE_LOOP, ENV, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(usable_cores())
    ]
    for loop in loops:
        assert loop.stdout is not None
        loop.stdout.readline()
    return sum(int(loop.communicate("go\n")[0]) for loop in loops) / seconds


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats, seconds = (1, 0.3) if options.quick else (options.repeats, 2.0)
    cores = usable_cores()
    rates = in_turn(
        repeats,
        {
            "process": functools.partial(starling_rate, "process", 256, seconds),
            "serial": functools.partial(starling_rate, "serial", 256, seconds),
            "AsyncVectorEnv": functools.partial(gymnasium_rate, 32, seconds),
            "limit": functools.partial(limit, seconds),
        },
    )
    figures = {name: median(values) for name, values in rates.items()}
    ours, most = figures["process"], figures["limit"]
    note = f"{spread(rates['process'])}; {cores} cores, whose limit is {shown(most)} steps/s"
    floors = {
        "AsyncVectorEnv": ("Gymnasium's AsyncVectorEnv, 32 environments", 12.0),
        "serial": ("Starling's serial backend, 256 environments", 3.0),
    }
    report(
        [
            Row(
                what=f"Stepping {ENV} in worker processes, 256 environments, beside {peer}",
                value=ours,
                unit="steps/s",
                peer=peer,
                peer_value=figures[name],
                ratio=ours / figures[name],
                floor=f">= {floor:g}x",
                met=ours / figures[name] >= floor,
                note=f"{note}; beside it: {spread(rates[name])}",
            )
            for name, (peer, floor) in floors.items()
        ]
    )


if __name__ == "__main__":
    main()
