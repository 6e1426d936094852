"""Environment steps per second of the whole training loop, against other libraries' PPO.

Pendulum-v1, 8 environments x 2048 steps, 10 epochs, minibatches of 64, two 64-64 tanh networks: the
same on all sides, each with the settings besides that make it fastest here. The first iteration,
which compiles and starts processes, counts on none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import peers
from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, run_json, spread, train

from starling.envs.worker_count import usable_cores

ROLLOUT = 8 * 2048
TASK = "Pendulum-v1, 8 x 2048, 10 epochs, minibatch 64"
# What is asked of each of Starling's sides beside others.
FLOORS = {
    "ParallelPPO": {"SB3": 6.0},
    "ParallelPPO, compiled": {"SB3": 11.0, "SBX": 7.0, "RLlib": 30.0},
    "AsyncPPO, compiled": {"SB3": 16.0},
}


def starling(iterations: int, *options: object) -> dict:
    """Trains with Starling in a process of its own."""
    return train(
        *("--env", "Pendulum-v1", "--preset", "none", "--timesteps", iterations * ROLLOUT),
        *("--num_envs", 8, "--num_steps", 2048, "--epochs", 10, "--mini_batch_size", 64),
        *options,
    )


def sb3(iterations: int, peer: str = "sb3") -> float:
    """Trains with Stable-Baselines3, or with what has its interface."""
    program = BENCHMARKS / f"{peer}_train.py"
    command = [peers.python(peer), program, "--env", "Pendulum-v1", "--ent_coef", 0.01]
    return run_json([*command, "--timesteps", iterations * ROLLOUT])["steady_steps_per_second"]


def rllib(iterations: int) -> float:
    """Trains with RLlib, whose learner works on one core while the runners on all of them wait."""
    runners = min(8, usable_cores())
    command = [
        *(peers.python("rllib"), BENCHMARKS / "rllib_train.py", "--env", "Pendulum-v1"),
        *("--num_env_runners", runners, "--num_envs_per_env_runner", -(-8 // runners)),
    ]
    return run_json([*command, "--iterations", iterations])["steady_steps_per_second"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--backend", default="auto", help="what steps ParallelPPO's environments")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    ours, theirs = (3, 2) if options.quick else (24, 4)
    given = {
        "ParallelPPO": ["--backend", options.backend],
        "ParallelPPO, compiled": ["--backend", "compiled"],
        "AsyncPPO, compiled": ["--algo", "async_ppo", "--backend", "compiled"],
    }
    backends: dict[str, str] = {}

    def measure(side: str) -> float:
        result = starling(ours, *given[side])
        backends[side] = result["backend"]
        return result["steady_steps_per_second"]

    sides: dict[str, Callable[[], float]] = {
        **{side: functools.partial(measure, side) for side in given},
        "SB3": lambda: sb3(theirs),
        "SBX": lambda: sb3(theirs, "sbx"),
        "RLlib": lambda: rllib(theirs // 2),
    }
    names = {
        "SB3": f"SB3 {peers.SB3} PPO, in-process environments, 1 thread",
        "SBX": f"SBX {peers.SBX} PPO, in-process environments",
        "RLlib": f"RLlib {peers.RAY} PPO, a runner for each core",
    }
    rates = in_turn(repeats, sides)
    report(
        [
            Row(
                what=f"Training end to end, {TASK}: {side} beside {peer}",
                value=median(rates[side]),
                unit="steps/s",
                peer=names[peer],
                peer_value=median(rates[peer]),
                ratio=median(rates[side]) / median(rates[peer]),
                floor=f">= {floor:g}x",
                met=median(rates[side]) / median(rates[peer]) >= floor,
                note=f"backend {backends[side]}; {spread(rates[side])}, {peer} "
                f"{spread(rates[peer])}",
            )
            for side in given
            for peer, floor in FLOORS[side].items()
        ]
    )


if __name__ == "__main__":
    main()
