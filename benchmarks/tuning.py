"""What `starling tune` finds for CartPole-v1, killed half-way and resumed, beside the preset.

8 trials of 50,000 steps with ASHA, as many at once as there are cores, from the preset, which is
the first trial then, and from the defaults, as if there were no preset. Once half of the trials
have begun the search is killed (SIGKILL), and gone on with. What it finds and the preset are then
trained with as many steps from other seeds, and play 100 greedy episodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import (
    ONE_THREAD,
    STARLING,
    Row,
    arguments,
    in_turn,
    median,
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


def score(preset: str, seed: int, timesteps: int, logs: Path) -> float:
    """Mean return of 100 greedy episodes after a training."""
    options = ["--preset", preset, "--timesteps", timesteps, "--seed", seed, "--log_dir", logs]
    run = run_json([STARLING, "train", *TASK, *options, "--quiet", "--json"])["run"]
    return run_json([STARLING, "evaluate", run, "--episodes", 100, "--json"])["mean_return"]


def main() -> None:
    options = arguments(__doc__).parse_args()
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
    rows = []
    for name, begun in FROM.items():
        best = found[name]["best"]
        first = next(trial for trial in found[name]["trials"] if trial["name"] == "trial_0")
        early = sum(trial["status"] == "stopped early" for trial in found[name]["trials"])
        rows.append(
            Row(
                what=f"CartPole-v1, settings found from {begun} by ASHA in {trials} trials of "
                f"{timesteps:,} steps, killed and resumed half-way: mean return greedily",
                value=median(scores[name]),
                peer="the preset, with as many steps",
                peer_value=median(scores["preset"]),
                floor=">= the preset's" if begun == "the preset" else "",
                met=median(scores[name]) >= median(scores["preset"])
                if begun == "the preset"
                else None,
                note=f"{spread(scores[name])} of other seeds, preset {spread(scores['preset'])}; "
                f"the best, {best['name']}, had {best['episode_return_mean']:.1f} in training, "
                f"{begun} (trial_0) {first['episode_return_mean']:.1f}; {early} trials were "
                f"stopped early; {found[name]['seconds']:.0f} s in all",
            )
        )
    report(rows)


if __name__ == "__main__":
    main()
