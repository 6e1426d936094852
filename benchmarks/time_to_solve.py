"""Seconds from the start of a process to a CartPole-v1 policy, against Stable-Baselines3.

Both sides train for 100,000 steps with RL Baselines3 Zoo's settings, which are Starling's preset.
Whether the policy is one (a mean of at least 475 over 100 greedy episodes) is asked afterwards,
with the clock stopped. Starling is measured as a user first meets it, with nothing compiled yet,
and again with the programs that an earlier run has kept.
"""

from __future__ import annotations

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
    seconds,
    spread,
)

SOLVED = 475.0
FLOOR, FORMER_FLOOR = 5.0, 3.0  # the latter was asked for at first


def starling(seed: int, cache: str) -> tuple[float, float]:
    """Seconds of `starling train`, and the score of its policy."""
    kept = {"XDG_CACHE_HOME": cache}
    with tempfile.TemporaryDirectory() as logs:
        command = [STARLING, "train", "--env", "CartPole-v1", "--seed", seed, "--log_dir", logs]
        duration, result = seconds([*command, "--quiet", "--json"], until="", environment=kept)
        evaluate = [STARLING, "evaluate", Path(logs, result["run"]), "--episodes", 100, "--json"]
        return duration, run_json(evaluate, kept)["mean_return"]


def sb3(seed: int, timesteps: int) -> tuple[float, float]:
    """Seconds that Stable-Baselines3 takes for the same, and the score of its policy."""
    duration, result = seconds(
        [
            *(peers.python("sb3"), BENCHMARKS / "sb3_train.py", "--env", "CartPole-v1"),
            *("--timesteps", timesteps, "--n_envs", 8, "--n_steps", 32, "--batch_size", 256),
            *("--n_epochs", 20, "--gamma", 0.98, "--gae_lambda", 0.8, "--ent_coef", 0.0),
            *("--learning_rate", "lin_0.001", "--clip_range", "lin_0.2"),
            *("--seed", seed, "--episodes", 100),
        ],
        until="trained",
    )
    return duration, result["mean_return"]


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 1 if options.quick else options.repeats
    peers.python("sb3")  # installed before the clock starts
    seeds = iter(range(3 * repeats))

    def cold() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as cache:
            return starling(next(seeds), cache)

    with tempfile.TemporaryDirectory() as cache:
        starling(0, cache)
        measured = in_turn(
            repeats,
            {
                "cold": cold,
                "warm": lambda: starling(next(seeds), cache),
                "SB3": lambda: sb3(next(seeds), 100_000),
            },
        )
    times = {side: [duration for duration, _ in runs] for side, runs in measured.items()}
    scores = {side: [score for _, score in runs] for side, runs in measured.items()}
    theirs = median(times["SB3"])
    rows = []
    for side, name in {"cold": "nothing compiled before", "warm": "programs kept"}.items():
        ours = median(times[side])
        solved = min(scores[side]) >= SOLVED
        rows.append(
            Row(
                what=f"CartPole-v1 solved, from process start to end of training, {name}",
                value=ours,
                unit="s",
                peer=f"SB3 {peers.SB3} PPO, RL-Zoo settings, 1 thread",
                peer_value=theirs,
                ratio=theirs / ours,
                floor=f"<= 1/{FLOOR:g} of its time",
                met=solved and theirs / ours >= FLOOR,
                note=f"{spread(times[side])}, SB3 {spread(times['SB3'])}; lowest score "
                f"{min(scores[side]):.0f}, SB3 {min(scores['SB3']):.0f}; the former floor, 1/"
                f"{FORMER_FLOOR:g}, is {'met' if theirs / ours >= FORMER_FLOOR else 'not met'}",
            )
        )
    report(rows)


if __name__ == "__main__":
    main()
