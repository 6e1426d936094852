"""AsyncPPO beside Sample Factory's APPO, beside ParallelPPO, and beside bare stepping.

- CartPole-v1 with the settings of both: 64 environments x 32 steps, 2 epochs, minibatches of 1024,
  two 64-64 tanh networks.
- An environment that sleeps for a millisecond at each step: seconds for as many steps as
  ParallelPPO makes, both with what they choose by themselves, and with a thread for each of the
  environments, which leaves nothing to hide but the update.
- HalfCheetah-v5 in EnvPool with the update of its preset, as a share of the rate at which EnvPool
  steps as many environments when it is given random actions and nothing else is done.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import envpool
import numpy as np
import peers
from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, run_json, spread, train

from starling.envs.worker_count import usable_cores

CARTPOLE_FLOOR, SLEEPING_FLOOR, STEPPING_FLOOR = 4.0, 0.7, 0.5
NUM_ENVS = 64
ASYNC = ("--algo", "async_ppo")
SLEEPING = {
    "by their own choice": (),
    "a thread for each": ("--backend", "thread", "--num_workers", 16),
}


def cartpole(timesteps: int) -> float:
    """Steps per second of AsyncPPO."""
    return train(
        *(*ASYNC, "--env", "CartPole-v1", "--preset", "none", "--timesteps", timesteps),
        *("--num_envs", NUM_ENVS, "--num_steps", 32, "--epochs", 2, "--mini_batch_size", 1024),
        *("--backend", "compiled"),
    )["steady_steps_per_second"]


def sample_factory(timesteps: int) -> float:
    """Steps per second of Sample Factory, with the workers that are fastest: one for each core."""
    workers = min(NUM_ENVS // 2, usable_cores())
    program = BENCHMARKS / "sample_factory_train.py"
    return run_json(
        [
            *(peers.python("sample_factory"), program, "--timesteps", timesteps),
            *("--num_workers", workers, "--num_envs_per_worker", NUM_ENVS // workers // 2 * 2),
        ]
    )["steady_steps_per_second"]


def sleeping(timesteps: int, *options: object) -> float:
    """Seconds of training on what sleeps, from the first step on."""
    places = [str(BENCHMARKS), os.environ.get("PYTHONPATH")]
    return train(
        *("--env", "sleeping:Sleeping", "--preset", "none", "--num_envs", 16),
        *("--num_steps", 128, "--timesteps", timesteps, *options),
        environment={"PYTHONPATH": os.pathsep.join(filter(None, places))},
    )["wall_time_s"]


def half_cheetah(timesteps: int) -> float:
    """Steps per second of AsyncPPO, with rollouts as large as the preset's."""
    return train(
        *(*ASYNC, "--env", "HalfCheetah-v5", "--backend", "envpool", "--timesteps", timesteps),
        *("--num_envs", NUM_ENVS, "--num_steps", 32),
    )["steady_steps_per_second"]


def stepping(seconds: float) -> float:
    """Steps per second of EnvPool alone, which gives back whichever half is first."""
    half = NUM_ENVS // 2
    envs = envpool.make_gymnasium(
        "HalfCheetah-v5", num_envs=NUM_ENVS, batch_size=half, num_threads=usable_cores()
    )
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, (half, 6))
    envs.async_reset()
    steps, start, end = -1, 0.0, np.inf
    while (now := time.perf_counter()) < end:
        *_, info = envs.recv()
        envs.send(actions, info["env_id"])
        steps += 1
        if steps == 100:  # warm
            start, end = now, now + seconds
    return (steps - 100) * half / (time.perf_counter() - start)


def rows(measured: dict[str, list[float]], naps: int) -> list[Row]:
    """What is reported of the measurements."""
    figures = {side: median(values) for side, values in measured.items()}
    spreads = {side: spread(values) for side, values in measured.items()}

    def row(what: str, ours: str, theirs: str, peer: str, **settings: Any) -> Row:
        return Row(
            what=f"AsyncPPO, {what}",
            value=figures[ours],
            peer=peer,
            peer_value=figures[theirs],
            note=f"{spreads[ours]}, beside it {spreads[theirs]}",
            **settings,
        )

    cartpole = figures["CartPole"] / figures["Sample Factory"]
    share = figures["HalfCheetah"] / figures["stepping"]
    found = [
        row(
            "compiled, CartPole-v1, 64 x 32, 2 epochs, minibatch 1024",
            *("CartPole", "Sample Factory"),
            f"Sample Factory {peers.SAMPLE_FACTORY} APPO, a worker for each core",
            unit="steps/s",
            ratio=cartpole,
            floor=f">= {CARTPOLE_FLOOR:g}x",
            met=cartpole >= CARTPOLE_FLOOR,
        ),
        row(
            "HalfCheetah-v5, 64 environments in EnvPool, update of the preset",
            *("HalfCheetah", "stepping"),
            "EnvPool alone, asynchronous",
            unit="steps/s",
            ratio=share,
            floor=f">= {STEPPING_FLOOR:.0%} of its rate",
            met=share >= STEPPING_FLOOR,
        ),
    ]
    for how in SLEEPING:
        ours, theirs = f"AsyncPPO, {how}", f"ParallelPPO, {how}"
        share = figures[ours] / figures[theirs]
        found.append(
            row(
                f"16 environments that sleep 1 ms at each step, {naps:,} steps, {how}",
                *(ours, theirs, theirs),
                unit="s",
                ratio=1 / share,
                floor=f"<= {SLEEPING_FLOOR:g} of its time",
                met=share <= SLEEPING_FLOOR,
            )
        )
    return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 1 if options.quick else options.repeats
    part = 10 if options.quick else 1
    naps = 40_960 // part
    peers.python("sample_factory")
    sides: dict[str, Callable[[], float]] = {
        "CartPole": lambda: cartpole(4_000_000 // part),
        "Sample Factory": lambda: sample_factory(600_000 // part),
        "HalfCheetah": lambda: half_cheetah(600_000 // part),
        "stepping": lambda: stepping(5.0 / part),
    }
    for how, settings in SLEEPING.items():
        sides[f"AsyncPPO, {how}"] = functools.partial(sleeping, naps, *ASYNC, *settings)
        sides[f"ParallelPPO, {how}"] = functools.partial(sleeping, naps, *settings)
    report(rows(in_turn(repeats, sides), naps))


if __name__ == "__main__":
    main()
