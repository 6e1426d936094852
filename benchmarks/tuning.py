"""What `starling tune` finds for CartPole-v1, killed half-way and resumed, beside the preset.

8 trials of 50,000 steps with ASHA, as many at once as there are cores; the first is the preset.
Once half of the trials have begun the search is killed (SIGKILL), and gone on with. What it finds
and the preset are then trained with as many steps from other seeds, and play 100 greedy episodes.
"""

from __future__ import annotations

import json
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


def search(trials: int, timesteps: int, logs: Path) -> dict:
    """Result of a search that is killed half-way, with the seconds of both halves."""
    start, folder = time.perf_counter(), logs / "search"
    size = ["--trials", trials, "--timesteps", timesteps]
    command = [STARLING, "tune", *TASK, *size, "--log_dir", logs, "--name", folder.name, "--quiet"]
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
        found = search(trials, timesteps, logs)
        print(json.dumps(found["trials"]), file=sys.stderr)
        tries = {"found": found["preset"], "preset": "CartPole-v1"}
        seeds = {name: iter(range(1, repeats + 1)) for name in tries}
        scores = in_turn(
            repeats,
            {
                name: lambda name=name: score(tries[name], next(seeds[name]), timesteps, logs)
                for name in tries
            },
        )
    best, first = found["best"], next(t for t in found["trials"] if t["name"] == "trial_0")
    early = sum(trial["status"] == "stopped early" for trial in found["trials"])
    report(
        [
            Row(
                what=f"CartPole-v1, best settings of {trials} trials of {timesteps:,} steps with "
                "ASHA, killed and resumed half-way: mean return of 100 greedy episodes",
                value=median(scores["found"]),
                peer="the preset, with as many steps",
                peer_value=median(scores["preset"]),
                floor=">= the preset's",
                met=median(scores["found"]) >= median(scores["preset"]),
                note=f"{spread(scores['found'])}, preset {spread(scores['preset'])}; best was "
                f"{best['name']} with {best['episode_return_mean']:.1f} in training, the preset's "
                f"trial_0 had {first['episode_return_mean']:.1f}; {early} were stopped early; "
                f"{found['seconds']:.0f} s in all",
            )
        ]
    )


if __name__ == "__main__":
    main()
