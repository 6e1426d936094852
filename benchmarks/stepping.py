"""Stepping CartPole-v1: worker processes beside Gymnasium's, and beside one thread.

Random actions are drawn beforehand. Two limits say what the cores allow: as many processes as there
are cores, each with its share of the environments and nothing to wait for; and the same if each
step took as long as that of the slowest, as in lock-step it must. Where the second is far below the
first, the cores' speeds vary from step to step, as those of virtual machines do.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time

import gymnasium
import numpy as np
from measuring import Row, arguments, in_turn, median, report, shown, spread

import starling
from starling.envs.worker_count import usable_cores

ENV = "CartPole-v1"
SHARE = """
import json, sys, time
import numpy as np
import starling
envs = starling.make_vec(sys.argv[1], int(sys.argv[2]), backend="serial")
actions = np.random.default_rng(0).integers(0, 2, (64, envs.num_envs))
envs.reset(seed=0)
print("ready", flush=True)
sys.stdin.readline()
durations, end = [], time.perf_counter() + float(sys.argv[3])
while time.perf_counter() < end:
    for action in actions:
        start = time.perf_counter()
        envs.step(action)
        durations.append(time.perf_counter() - start)
print(json.dumps(durations))
"""


def steps_per_second(envs: gymnasium.vector.VectorEnv, seconds: float) -> float:
    """Environment steps per second, over at least `seconds`, of environments that were reset."""
    actions = np.random.default_rng(0).integers(0, 2, (64, envs.num_envs))
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for action in actions:
            envs.step(action)
        steps += actions.size
    return steps / elapsed


def stepping_rate(envs: gymnasium.vector.VectorEnv, seconds: float) -> float:
    """Environment steps per second, over `seconds` after a short warm-up; closes them."""
    try:
        envs.reset(seed=0)
        steps_per_second(envs, 0.01)
        return steps_per_second(envs, seconds)
    finally:
        envs.close()


def starling_rate(backend: str, num_envs: int, seconds: float) -> float:
    """Steps per second of a backend, with a worker for each core."""
    return stepping_rate(starling.make_vec(ENV, num_envs, backend=backend), seconds)


def gymnasium_rate(num_envs: int, seconds: float) -> float:
    """Steps per second of Gymnasium's AsyncVectorEnv."""
    envs = gymnasium.make_vec(ENV, num_envs, vectorization_mode="async")
    return stepping_rate(envs, seconds)


def limits(num_envs: int, seconds: float) -> tuple[float, float]:
    """Steps per second of a process for each core, which do not wait for each other, or do."""
    cores = usable_cores()
    shares = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, ENV, str(num_envs // cores), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(cores)
    ]
    for share in shares:
        assert share.stdout is not None
        share.stdout.readline()
    for share in shares:
        assert share.stdin is not None
        share.stdin.write("go\n")
        share.stdin.flush()
    durations = [json.loads(share.communicate()[0]) for share in shares]
    steps = min(map(len, durations))
    step = np.array([share[:steps] for share in durations])
    num_envs = num_envs // cores * cores
    return num_envs / step.mean(), num_envs / step.max(axis=0).mean()


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats, seconds = (1, 0.3) if options.quick else (options.repeats, 2.0)
    cores = usable_cores()
    bounds: list[tuple[float, float]] = []

    def measure_limits() -> float:
        bounds.append(limits(256, seconds))
        return bounds[-1][1]

    rates = in_turn(
        repeats,
        {
            "process": functools.partial(starling_rate, "process", 256, seconds),
            "serial": functools.partial(starling_rate, "serial", 256, seconds),
            "AsyncVectorEnv": functools.partial(gymnasium_rate, 32, seconds),
            "limit": measure_limits,
        },
    )
    figures = {name: median(values) for name, values in rates.items()}
    ours = figures["process"]
    free, lock_step = (shown(median(values)) for values in zip(*bounds, strict=True))
    note = (
        f"{spread(rates['process'])}; {cores} cores allow {lock_step} steps/s in lock-step, "
        f"{free} where none waits for another"
    )
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
