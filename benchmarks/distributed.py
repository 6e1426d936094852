"""Workers on a Ray cluster, here all on this machine: speed, scaling, and what moving data costs.

- Pendulum-v1 end to end with 16 environments, against RLlib's PPO with the same batch, epochs and
  minibatch, each with 2 workers of 8 environments.
- An environment that sleeps a millisecond at each step: the rate of 4 workers against 1.
- Pendulum-v1 with 3 workers: the share of the time that is neither collecting nor updating.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from pathlib import Path

import peers
from measuring import (
    BENCHMARKS,
    STARLING,
    Row,
    arguments,
    in_turn,
    median,
    report,
    run_json,
    spread,
    train,
)

FLOOR, SCALING_FLOOR, MOST_OUTSIDE = 10.0, 3.5, 0.15
DISTRIBUTED = ("--distributed", "--preset", "none", "--save_interval", 0, "--no_tensorboard")
BATCH = 16 * 1024


def pendulum(iterations: int) -> float:
    """Steady steps per second of Starling."""
    result = train(
        *(*DISTRIBUTED, "--env", "Pendulum-v1", "--num_workers", 2, "--num_envs", 8),
        *("--steps_per_worker", BATCH // 2, "--timesteps", BATCH * iterations),
        *("--epochs", 10, "--mini_batch_size", 64, "--backend", "serial"),
    )
    return result["steady_steps_per_second"]


def rllib(iterations: int) -> float:
    """The same of RLlib."""
    result = run_json(
        [
            *(peers.python("rllib"), BENCHMARKS / "rllib_train.py", "--env", "Pendulum-v1"),
            *("--iterations", iterations, "--batch_size", BATCH, "--num_env_runners", 2),
            *("--num_envs_per_env_runner", 8),
        ]
    )
    return result["steady_steps_per_second"]


def sleeping(num_workers: int, iterations: int) -> float:
    """Steady steps per second of workers with one environment that sleeps."""
    places = [str(BENCHMARKS), os.environ.get("PYTHONPATH")]
    result = train(
        *(*DISTRIBUTED, "--env", "sleeping:Sleeping", "--backend", "serial", "--num_envs", 1),
        *("--num_workers", num_workers, "--cpus_per_worker", 0.25, "--steps_per_worker", 256),
        *("--sync_mode", "non_blocking", "--epochs", 2, "--mini_batch_size", 256),
        *("--timesteps", 256 * num_workers * iterations),
        environment={"PYTHONPATH": os.pathsep.join(filter(None, places))},
    )
    return result["steady_steps_per_second"]


def outside(iterations: int) -> float:
    """Share of the time that goes neither into collecting nor into updates."""
    with tempfile.TemporaryDirectory() as logs:
        command = [
            *(STARLING, "train", *DISTRIBUTED, "--env", "Pendulum-v1", "--num_workers", 3),
            *("--num_envs", 4, "--cpus_per_worker", 0.5, "--steps_per_worker", 2048),
            *("--epochs", 10, "--mini_batch_size", 64, "--backend", "serial", "--quiet"),
            *("--timesteps", 3 * 2048 * iterations, "--log_interval", 1, "--log_dir", logs),
        ]
        result = run_json([*command, "--json"])
        lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
    total = useful = 0.0
    for before, now in itertools.pairwise(map(json.loads, lines)):
        took = now["time/time_elapsed"] - before["time/time_elapsed"]
        total += took
        useful += took * now["perf/update_share"] + now["distributed/collect_seconds"]
    return 1.0 - useful / total


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 1 if options.quick else options.repeats
    few = 2 if options.quick else 8
    rates = in_turn(repeats, {"ours": lambda: pendulum(few), "RLlib": lambda: rllib(few // 2)})
    ratio = median(rates["ours"]) / median(rates["RLlib"])
    sides = {str(n): lambda n=n: sleeping(n, 3 * few) for n in (1, 4)}
    naps = in_turn(repeats, sides)
    scaling = median(naps["4"]) / median(naps["1"])
    shares = [outside(few + 2) for _ in range(repeats)]
    report(
        [
            Row(
                what="DistributedPPO, Pendulum-v1, 2 workers of 8 environments, batch 16384, "
                "10 epochs, minibatch 64",
                value=median(rates["ours"]),
                unit="steps/s",
                peer=f"RLlib {peers.RAY} PPO, 2 runners of 8",
                peer_value=median(rates["RLlib"]),
                ratio=ratio,
                floor=f">= {FLOOR:g}x",
                met=ratio >= FLOOR,
                note=f"{spread(rates['ours'])}, RLlib {spread(rates['RLlib'])}",
            ),
            Row(
                what="DistributedPPO, an environment that sleeps 1 ms, 4 workers",
                value=median(naps["4"]),
                unit="steps/s",
                peer="1 worker",
                peer_value=median(naps["1"]),
                ratio=scaling,
                floor=f">= {SCALING_FLOOR:g}x",
                met=scaling >= SCALING_FLOOR,
                note=f"{spread(naps['4'])}, 1 worker {spread(naps['1'])}",
            ),
            Row(
                what="DistributedPPO, Pendulum-v1, 3 workers: time neither collecting nor updating",
                value=100 * median(shares),
                unit="%",
                floor=f"<= {100 * MOST_OUTSIDE:g} %",
                met=median(shares) <= MOST_OUTSIDE,
                note=spread([100 * share for share in shares], "%"),
            ),
        ]
    )


if __name__ == "__main__":
    main()
