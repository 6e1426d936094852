"""Transitions per second of the whole training loop of DQN, against Stable-Baselines3's.

CartPole-v1, 4 environments stepped in process, one update with 64 transitions for every 4 that are
made, a 128-128 network, a uniform replay of 100,000, no double DQN, which the peer has not: the
same on both sides. Starling makes the 32 updates of a rollout of 32 steps in one program, where the
peer makes one after each step. Compiling counts on none.
"""

from __future__ import annotations

import peers
from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, run_json, spread, train

FLOOR = 5.0
TASK = "CartPole-v1, 4 environments, an update of 64 for every 4 transitions, 128-128"
NUM_STEPS = 32


def starling(timesteps: int) -> float:
    """Trains with Starling in a process of its own."""
    result = train(
        *("--algo", "dqn", "--env", "CartPole-v1", "--preset", "none", "--backend", "serial"),
        *("--timesteps", timesteps, "--num_envs", 4, "--num_steps", NUM_STEPS),
        *("--updates_per_transition", 0.25, "--mini_batch_size", 64, "--learning_starts", 128),
        *("--hidden_sizes", 128, 128, "--save_interval", 0, "--no_double"),
    )
    return result["steady_steps_per_second"]


def sb3(timesteps: int) -> float:
    """Trains with Stable-Baselines3."""
    program = BENCHMARKS / "sb3_dqn_train.py"
    command = [peers.python("sb3"), program, "--env", "CartPole-v1", "--timesteps", timesteps]
    return run_json(command)["steady_steps_per_second"]


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 1 if options.quick else options.repeats
    ours, theirs = (20_000, 4_000) if options.quick else (100_000, 20_000)
    rates = in_turn(repeats, {"DQN": lambda: starling(ours), "SB3": lambda: sb3(theirs)})
    ratio = median(rates["DQN"]) / median(rates["SB3"])
    report(
        [
            Row(
                what=f"Training end to end, {TASK}, rollouts of {NUM_STEPS} steps",
                value=median(rates["DQN"]),
                unit="transitions/s",
                peer=f"SB3 {peers.SB3} DQN, in-process environments, 1 thread",
                peer_value=median(rates["SB3"]),
                ratio=ratio,
                floor=f">= {FLOOR:g}x",
                met=ratio >= FLOOR,
                note=f"{spread(rates['DQN'])}, SB3 {spread(rates['SB3'])}",
            )
        ]
    )


if __name__ == "__main__":
    main()
