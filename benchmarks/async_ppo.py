"""AsyncPPO beside Sample Factory's APPO, beside ParallelPPO, and beside bare stepping.

- CartPole-v1 with the settings of both: 64 environments x 32 steps, 2 epochs, minibatches of 1024,
  two 64-64 tanh networks.
- An environment that sleeps for a millisecond at each step: seconds for as many steps as
  ParallelPPO makes, with what it chooses by itself and with a thread for each environment.
- HalfCheetah-v5 in EnvPool with the update of its preset, as a share of the rate at which EnvPool
  steps as many environments when it is given random actions and nothing else is done.
"""

from __future__ import annotations

import os
import time

import envpool
import numpy as np
import peers
from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, run_json, spread, train

from starling.envs.sharded import usable_cores

CARTPOLE_FLOOR, SLEEPING_FLOOR, STEPPING_FLOOR = 4.0, 0.7, 0.5
NUM_ENVS = 64
ASYNC = ("--algo", "async_ppo")


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


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 1 if options.quick else options.repeats
    part = 10 if options.quick else 1
    peers.python("sample_factory")
    measured = in_turn(
        repeats,
        {
            "CartPole": lambda: cartpole(4_000_000 // part),
            "Sample Factory": lambda: sample_factory(600_000 // part),
            "sleeping": lambda: sleeping(40_960 // part, *ASYNC),
            "its own choice": lambda: sleeping(40_960 // part),
            "a thread for each": lambda: sleeping(
                40_960 // part, "--backend", "thread", "--num_workers", 16
            ),
            "HalfCheetah": lambda: half_cheetah(600_000 // part),
            "stepping": lambda: stepping(5.0 / part),
        },
    )
    figures = {side: median(values) for side, values in measured.items()}
    spreads = {side: spread(values) for side, values in measured.items()}
    ratio = figures["CartPole"] / figures["Sample Factory"]
    rows = [
        Row(
            what="AsyncPPO, compiled, CartPole-v1, 64 x 32, 2 epochs, minibatch 1024",
            value=figures["CartPole"],
            unit="steps/s",
            peer=f"Sample Factory {peers.SAMPLE_FACTORY} APPO, a worker for each core",
            peer_value=figures["Sample Factory"],
            ratio=ratio,
            floor=f">= {CARTPOLE_FLOOR:g}x",
            met=ratio >= CARTPOLE_FLOOR,
            note=f"{spreads['CartPole']}, Sample Factory {spreads['Sample Factory']}",
        )
    ]
    for side, asked in (("its own choice", True), ("a thread for each", False)):
        share = figures["sleeping"] / figures[side]
        rows.append(
            Row(
                what="AsyncPPO, 16 environments that sleep 1 ms at each step, 40,960 steps, beside "
                f"ParallelPPO, {side}",
                value=figures["sleeping"],
                unit="s",
                peer=f"ParallelPPO, {side}",
                peer_value=figures[side],
                ratio=1 / share,
                floor=f"<= {SLEEPING_FLOOR:g} of its time" if asked else "",
                met=share <= SLEEPING_FLOOR if asked else None,
                note=f"{share:.2f} of its time; {spreads['sleeping']}, beside it {spreads[side]}",
            )
        )
    share = figures["HalfCheetah"] / figures["stepping"]
    rows.append(
        Row(
            what="AsyncPPO, HalfCheetah-v5, 64 environments in EnvPool, update of the preset",
            value=figures["HalfCheetah"],
            unit="steps/s",
            peer="EnvPool alone, asynchronous",
            peer_value=figures["stepping"],
            ratio=share,
            floor=f">= {STEPPING_FLOOR:.0%} of its rate",
            met=share >= STEPPING_FLOOR,
            note=f"{share:.0%} of its rate; {spreads['HalfCheetah']}, EnvPool "
            f"{spreads['stepping']}",
        )
    )
    report(rows)


if __name__ == "__main__":
    main()
