"""Environment steps per second of the whole training loop, against Stable-Baselines3's PPO.

Pendulum-v1, 8 environments x 2048 steps, 10 epochs, minibatches of 64, two 64-64 tanh networks, the
same on both sides. The first iteration, which compiles, counts on neither.
"""

from __future__ import annotations

import tempfile

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
)

ROLLOUT = 8 * 2048
FLOOR = 6.0


def starling(iterations: int, backend: str) -> dict:
    """Trains with Starling in a process of its own."""
    with tempfile.TemporaryDirectory() as logs:
        return run_json(
            [
                *(STARLING, "train", "--env", "Pendulum-v1", "--preset", "none"),
                *("--num_envs", 8, "--num_steps", 2048, "--epochs", 10, "--mini_batch_size", 64),
                *("--timesteps", iterations * ROLLOUT, "--backend", backend, "--log_dir", logs),
                *("--quiet", "--json"),
            ]
        )


def sb3(iterations: int) -> float:
    """Trains with Stable-Baselines3 in a process of its own."""
    program = BENCHMARKS / "sb3_train.py"
    command = [peers.python("sb3"), program, "--env", "Pendulum-v1", "--ent_coef", 0.01]
    return run_json([*command, "--timesteps", iterations * ROLLOUT])["steady_steps_per_second"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--backend", default="auto", help="what steps Starling's environments")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    ours, theirs = (3, 2) if options.quick else (16, 4)  # about as many seconds on each side
    backends: set[str] = set()

    def measure_starling() -> float:
        result = starling(ours, options.backend)
        backends.add(result["backend"])
        return result["steady_steps_per_second"]

    rates = in_turn(repeats, {"Starling": measure_starling, "SB3": lambda: sb3(theirs)})
    ratio = median(rates["Starling"]) / median(rates["SB3"])
    report(
        [
            Row(
                what="Training end to end, Pendulum-v1, 8 x 2048, 10 epochs, minibatch 64",
                value=median(rates["Starling"]),
                unit="steps/s",
                peer=f"SB3 {peers.SB3} PPO, in-process environments, 1 thread",
                peer_value=median(rates["SB3"]),
                ratio=ratio,
                floor=f">= {FLOOR:g}x",
                met=ratio >= FLOOR,
                note=f"backend {', '.join(sorted(backends))}; "
                f"{spread(rates['Starling'])}, SB3 {spread(rates['SB3'])}",
            )
        ]
    )


if __name__ == "__main__":
    main()
