"""One trial of a search, in a process of Ray's: a run that reports to Ray Tune how it goes."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starling.config import find_trainer_class, resolve
from starling.errors import UserError
from starling.storage.checkpoint_format import read_manifest
from starling.training.run_folder import lock_run

STEP, RETURN = "step", "mean_return"  # what trials are compared at, and by
SETTINGS_FILE = "settings.jsonl"
# In a whole trial. asha compares at a ninth at first; pbt whenever a trial reports.
REPORTS = {"asha": 27, "pbt": 10}
_PATIENCE = 30.0  # seconds


def train_trial(folder: Path, plan: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Trains one trial to its end, from where it was stopped or from another trial's checkpoint.

    Args:
        folder: That of the search, in which the trial's run has the trial's name.
        plan: The content of the search's `tuning.json`.
        settings: What is searched, as it is for this trial now.
    """
    from ray import tune

    name = tune.get_context().get_trial_name()
    run, checkpoint = folder / name, tune.get_checkpoint()
    given = {"num_workers": plan["cpus_per_trial"], **plan["given"], **settings}
    config, _ = resolve(plan["algo"], {**given, "log_dir": str(folder), "run_name": name})
    every = max(1, round(config.num_iterations / REPORTS[plan["scheduler"]]))
    # Whenever it reports there is a checkpoint, for others to go on from.
    intervals = {"log_interval": every, "save_interval": every}
    config = dataclasses.replace(config, **intervals)
    if run.exists():
        _wait_until_free(run)
        if checkpoint:
            with checkpoint.as_directory() as source:
                take_over(run, Path(source), settings)
        elif not any(run.glob("checkpoints/step_*")):
            shutil.rmtree(run)  # it ended before there was anything to go on from
    stopped = False

    def report(iteration: Any) -> bool:
        nonlocal stopped
        if iteration.iteration % every or iteration.step >= config.timesteps:
            return True
        score = _number(iteration.metrics["rollout/ep_rew_mean"])
        saved = run / "checkpoints" / f"step_{iteration.step:012d}"
        shared = plan["scheduler"] == "pbt" and saved.is_dir()
        try:
            tune.report(
                {STEP: iteration.step, RETURN: score},
                checkpoint=tune.Checkpoint.from_directory(saved) if shared else None,
            )
        except SystemExit:  # how Ray Tune stops a trial
            stopped = True
        return not stopped

    trainer_class = find_trainer_class(plan["algo"])
    with trainer_class(config=config, resume=run if run.exists() else None) as agent:
        result = agent.train(callbacks=report, quiet=True)
    if stopped:
        sys.exit(0)
    last = {STEP: result.steps, RETURN: _number(result.episode_return_mean)}
    tune.report({**last, "status": result.status})


def take_over(run: Path, source: Path, settings: Mapping[str, Any]) -> None:
    """Puts a checkpoint, of this trial or another, in the place of all that a run has.

    Args:
        run: The run's folder.
        source: The checkpoint.
        settings: With which the run goes on from another's; `settings.jsonl` takes note of them.
    """
    step = read_manifest(source)["step"]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    shutil.copytree(source, run / "checkpoints" / f"step_{step:012d}")
    of = json.loads((source / "config.json").read_text("utf-8"))["run_name"]
    if of == run.name:
        return
    with (run / SETTINGS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({STEP: step, "from": of, **settings}) + "\n")


def reports(metrics: Path) -> list[tuple[int, float]]:
    """Steps and mean returns (NaN where no episode has ended) in a run's metrics.jsonl."""
    try:
        lines = metrics.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
    return [(row["time/total_timesteps"], _number(row.get("rollout/ep_rew_mean"))) for row in rows]


def _number(score: float | None) -> float:
    """A mean return; NaN where no episode has ended."""
    return math.nan if score is None else score


def _wait_until_free(run: Path) -> None:
    """Waits for the process that had the run before, which Ray Tune may just be ending."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return lock_run(run).close()
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
