"""What `starling tune` finds for CartPole-v1, killed half-way and resumed, beside the preset.

8 trials of 50,000 steps with ASHA, as many at once as there are cores, from the preset, which is
the first trial then, and from the defaults, as if there were no preset. Once half of the trials
have begun the search is killed (SIGKILL), and gone on with. Its best trial is compared with what
the preset has in the median of other seeds, with as many steps: by what the search looks for, the
mean return of the last 100 training episodes. The best of several is partly luck: its settings are
trained with those other seeds as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from measuring import (
    ONE_THREAD,
    STARLING,
    Row,
    arguments,
    in_turn,
    median,
    other_work,
    report,
    run_json,
    spread,
)

TRIALS, TIMESTEPS = 8, 50_000
TASK = ["--env", "CartPole-v1"]
FROM = {"CartPole-v1": "the preset", "none": "the defaults"}


def search(preset: str, trials: int, timesteps: int, logs: Path) -> dict:
    """Result of a search that is killed half-way, with the seconds of both halves."""
    start, folder = time.perf_counter(), logs / f"from_{preset}"
    options = ["--preset", preset, "--trials", trials, "--timesteps", timesteps, "--quiet"]
    command = [STARLING, "tune", *TASK, *options, "--log_dir", logs, "--name", folder.name]
    environment = {**os.environ, **ONE_THREAD}
    with subprocess.Popen([str(word) for word in command], env=environment) as process:
        while len(list(folder.glob("trial_*/checkpoints"))) <= trials // 2:
            if process.poll() is not None:
                sys.exit("the search ended before it could be killed")
            time.sleep(0.1)
        process.kill()
    result = run_json([STARLING, "tune", "--resume", folder, "--quiet", "--json"])
    return {**result, "seconds": time.perf_counter() - start}


class Score(NamedTuple):
    """Mean returns of 100 episodes: the last ones of a training, and greedy ones after it."""

    training: float
    greedy: float


def score(preset: str, seed: int, timesteps: int, logs: Path) -> Score:
    """Trains, and plays."""
    options = ["--preset", preset, "--timesteps", timesteps, "--seed", seed, "--log_dir", logs]
    result = run_json([STARLING, "train", *TASK, *options, "--quiet", "--json"])
    played = run_json([STARLING, "evaluate", result["run"], "--episodes", 100, "--json"])
    return Score(result["episode_return_mean"], played["mean_return"])


def against_preset(what: str, found: float, preset: list[float], note: str, floor: str = "") -> Row:
    """A score of what was found beside the preset's of other seeds."""
    beside = median(preset)
    return Row(
        what=what,
        value=found,
        unit="return",
        peer="the preset, with as many steps",
        peer_value=beside,
        floor=floor,
        met=found >= beside if floor else None,
        note=f"{note}; preset {spread(preset)}",
    )


def told(found: dict) -> str:
    """What happened in a search."""
    first = next(trial for trial in found["trials"] if trial["name"] == "trial_0")
    early = sum(trial["status"] == "stopped early" for trial in found["trials"])
    return (
        f"{found['best']['name']}, and trial_0 {first['episode_return_mean']:.1f}; {early} trials "
        f"were stopped early; {found['seconds']:.0f} s in all"
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    beside = other_work(os.getloadavg()[0])
    repeats = 1 if options.quick else options.repeats
    trials, timesteps = (3, 5_000) if options.quick else (TRIALS, TIMESTEPS)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        found = {preset: search(preset, trials, timesteps, logs) for preset in FROM}
        tries = {"preset": "CartPole-v1"} | {name: found[name]["preset"] for name in FROM}
        seeds = {name: iter(range(1, repeats + 1)) for name in tries}
        scores = in_turn(
            repeats,
            {
                name: lambda name=name: score(tries[name], next(seeds[name]), timesteps, logs)
                for name in tries
            },
        )
    training, greedy = (
        {name: [getattr(one, which) for one in found_by] for name, found_by in scores.items()}
        for which in Score._fields
    )
    rows = []
    for name, begun in FROM.items():
        what = (
            f"CartPole-v1, {trials} trials of {timesteps:,} steps from {begun}, ASHA, killed and "
            "resumed half-way: "
        )
        best, note = found[name]["best"]["episode_return_mean"], told(found[name]) + beside
        floor = ">= the preset's" if begun == "the preset" else ""
        rows.append(against_preset(what + "best trial", best, training["preset"], note, floor))
        for how, all_returns in (("in training", training), ("greedily", greedy)):
            returns, preset = all_returns[name], all_returns["preset"]
            what_else = f"{what}its settings with other seeds, {how}"
            rows.append(against_preset(what_else, median(returns), preset, spread(returns)))
    report(rows)


if __name__ == "__main__":
    main()
