"""`tune`: a search over settings on Ray Tune, whose trials are runs like any other.

```
<log_dir>/<name>/
  tuning.json         what is searched, and the settings that each trial begins with
  trial_0/ ...        the trials' runs: trial_0 has the settings of the preset, or the defaults
  best.toml           the settings of the best trial, for `starling train --preset`
  result.json         every trial, best first
  ray/                what Ray Tune keeps
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from starling.config import resolve
from starling.errors import CheckpointError, MissingExtraError, StarlingError, UserError
from starling.training.ray_cluster import Cluster, unheard
from starling.training.ray_connection import VARIABLES, environment
from starling.training.run_folder import create_run_folder, lock_run, versions, write_json
from starling.training.schedulers import SCHEDULERS
from starling.training.search_plan import PLAN_FILE, learning_options, make_plan, read_plan
from starling.training.search_watch import Watch
from starling.training.trials import RETURN, SETTINGS_FILE, STEP, train_trial

# Read where Ray is imported, or while it searches; what it starts inherits them.
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old one can be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would stay for good
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of one trial."""

    name: str
    run: str
    """Its run's folder."""
    status: str
    """That of its run ("completed" ...), or: stopped early, failed, not completed."""
    steps: int
    episode_return_mean: float | None
    """Over the last 100 episodes of training; None without any."""
    settings: dict[str, Any]
    """What was searched, as it was in the end."""
    error: str | None


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """What came of a search: the content of its `result.json`."""

    folder: str
    status: str
    """completed or stopped."""
    best: Trial | None
    """None if the search was stopped."""
    preset: str | None
    """The file with the settings of the best trial."""
    trials: list[Trial]
    """Best first."""


def tune(
    env_name: str | None = None,
    *,
    trials: int | None = None,
    algo: str = "ppo",
    scheduler: str = "asha",
    space: str | Path | Mapping[str, Any] | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    address: str | None = None,
    cpus_per_trial: int = 1,
    gpus_per_trial: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
    **settings: Any,
) -> TuningResult:
    """Searches for settings; to be called on the main thread.

    Args:
        env_name: Gymnasium id, "module:callable", gymnax:Id or brax:name.
        trials: How many settings to try; the first are those of the preset, or the defaults.
        algo: A name in `ALGORITHMS`.
        scheduler: "asha" stops trials early that are worse than most at the same step; "pbt" trains
            all, and lets bad ones go on from copies of good ones with other settings.
        space: What to search in place of the declared ranges: by setting a list of values, a
            table `{low, high, scale}`, or False; or a TOML file of these.
        name: Of the search's folder in `log_dir`.
        resume: Folder of a search to go on with; of the others only `address`, `stop` and `quiet`
            may be given.
        address: HOST:PORT of a Ray cluster, whose nodes all have `log_dir`; None: this machine.
        cpus_per_trial: Cores, which say how many trials run at once.
        gpus_per_trial: Accelerators, or a share of one.
        stop: Asked all the time; True saves the search and ends it.
        quiet: Show no progress.
        **settings: Fixed settings of all trials.

    Raises:
        UserError: Something that was given cannot be used.
        StarlingError: All trials failed.
        KeyboardInterrupt: After Ctrl-C, once the search is saved.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("tune stops by signals: call it on the main thread")
    if resume is not None:
        new = {"env_name": env_name, "trials": trials, "space": space, "name": name, **settings}
        if first := next((name for name, value in new.items() if value is not None), None):
            raise UserError(f"{first} does not go with resume: the search has its settings")
        folder, plan = read_plan(Path(resume))
    else:
        plan = make_plan(env_name, trials, algo, scheduler, space, settings)
        plan |= {"cpus_per_trial": cpus_per_trial, "gpus_per_trial": gpus_per_trial}
        folder = None
    with _cluster(address) as cluster:
        _check_resources(cluster, plan, new=folder is None)
        if folder is None:
            given = plan["given"]
            log_dir, seed = given.get("log_dir", "./logs"), given["seed"]
            kind = f"tune_{plan['algo']}"
            folder = create_run_folder(log_dir, given["env"], kind, seed, name).absolute()
        if not quiet:
            print(_what_is_searched(plan, folder), file=sys.stderr)
        with lock_run(folder), _quiet_logs():
            tuner = _tuner(folder, plan, new=resume is None)
            with Watch(folder, len(plan["trials"]), stop, cluster.is_lost, quiet) as watch:
                # Who is asked while Ray starts has no trials to wait for.
                asked_already = stop()
                grid = [] if asked_already else tuner.fit()
            result = _conclude(folder, plan, grid, watch.stopped or asked_already)
            if watch.interrupted:
                raise KeyboardInterrupt
            return result


def _what_is_searched(plan: Mapping[str, Any], folder: Path) -> str:
    """In a line, with where it is: who is killed says nothing of that at the end."""
    trials, algo, env = len(plan["trials"]), plan["algo"], plan["given"]["env"]
    names = ", ".join(plan["space"])
    return f"{env}: {trials} trials of {algo} with {plan['scheduler']}, over {names}, in {folder}"


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Cluster]:
    """A connection to Ray, with Ray Tune as it shall behave."""
    with _ray_tune():
        cluster = Cluster(address)
        try:
            yield cluster
        finally:
            cluster.close()


@contextlib.contextmanager
def _ray_tune() -> Iterator[None]:
    """Looks whether Ray Tune is there, and says for a while how it shall behave."""
    with environment(_VARIABLES):
        try:
            with environment(VARIABLES):
                import ray.tune  # noqa: F401
        except ImportError:
            raise MissingExtraError(
                "tune needs Ray Tune, which is not installed: pip install 'starling-rl[ray]'"
            ) from None
        yield


def _check_resources(cluster: Cluster, plan: Mapping[str, Any], new: bool) -> None:
    """Refuses what Ray would wait for without end."""
    for resource, name, least in (("CPU", "cpus_per_trial", 1), ("GPU", "gpus_per_trial", 0)):
        wanted, most = plan[name], max(cluster.on_nodes(resource))  # a trial is on one node
        if wanted > most and not new:
            raise UserError(
                f"the search has {name} {wanted}, and no node here has more than {most:g}: go on "
                "with it on a machine or a cluster (--address) that has"
            )
        if not least <= wanted <= most:
            raise UserError(f"{name} must be at least {least} and at most {most:g}, not {wanted}")
        if wanted > 1 and wanted % 1:
            raise UserError(f"{name} must be a whole number or a share of one, not {wanted}")


def _tuner(folder: Path, plan: Mapping[str, Any], new: bool) -> Any:
    """What Ray Tune runs: a new search, or the rest of one."""
    from ray import tune

    def starling_trial(config: dict[str, Any]) -> None:
        train_trial(folder, plan, config["settings"])

    resources = {"cpu": plan["cpus_per_trial"], "gpu": plan["gpus_per_trial"]}
    trainable = tune.with_resources(starling_trial, resources)
    state, searched = folder / "ray", {"settings": tune.grid_search(plan["trials"])}
    if not new:
        # What failed may have failed for want of disk or memory: it is tried again. Ray Tune only
        # knows what is searched once it has saved a state.
        try:
            return tune.Tuner.restore(
                str(state), trainable=trainable, param_space=searched, resume_errored=True
            )
        except Exception as error:  # whatever reading pickles may raise
            raise CheckpointError(
                f"{folder} is no search to go on with: what Ray Tune kept in {state} cannot be "
                f"read ({error}); begin another"
            ) from error
    config, _ = resolve(plan["algo"], {**plan["given"], **plan["trials"][0]})
    tuner = tune.Tuner(
        trainable,
        param_space=searched,
        tune_config=tune.TuneConfig(
            metric=RETURN,
            mode="max",
            scheduler=SCHEDULERS[plan["scheduler"]](config.timesteps, plan),
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=str(folder),
            stop={STEP: config.timesteps},
            checkpoint_config=tune.CheckpointConfig(num_to_keep=3),
            verbose=0,
        ),
    )
    # Only now, so that there is something to go on with where this file is.
    write_json(folder / PLAN_FILE, {**plan, "versions": versions()})
    return tuner


def _trial_name(trial: Any) -> str:
    return f"trial_{_number(trial.trial_id)}"


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keeps Ray Tune's own messages, which name Ray's commands, from the terminal."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # asha's look at trials of which none has ended an episode yet
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            yield
    finally:
        logger.setLevel(level)


def _conclude(folder: Path, plan: Mapping[str, Any], grid: Any, stopped: bool) -> TuningResult:
    """Puts the trials in order, and writes what came out."""
    left = "not completed" if stopped else "stopped early"
    trials = [_outcome(folder, plan, result, left) for result in grid]
    # Of one that was stopped early nobody knows what it would have come to. Of those that are alike
    # the first counts, which may be the preset.
    trials.sort(
        key=lambda trial: (
            *(not trial.error, trial.status != left, _score(trial)),
            -_number(trial.name),
        ),
        reverse=True,
    )
    best = preset = None
    if not stopped:
        if all(trial.error for trial in trials):
            raise StarlingError(f"all trials failed, one of them so: {trials[0].error}")
        best, preset = trials[0], folder / "best.toml"
        preset.write_text(_preset(plan, best), "utf-8")
    result = TuningResult(
        folder=str(folder),
        status="stopped" if stopped else "completed",
        best=best,
        preset=None if preset is None else str(preset),
        trials=trials,
    )
    write_json(folder / "result.json", dataclasses.asdict(result))
    return result


def _outcome(folder: Path, plan: Mapping[str, Any], result: Any, left: str) -> Trial:
    metrics, name = result.metrics or {}, Path(result.path).name
    first = plan["trials"][_number(name)]  # all that is known until it reports
    error = None if result.error is None else _reason(str(result.error))
    score = metrics.get(RETURN, math.nan)
    return Trial(
        name=name,
        run=str(folder / name),
        status="failed" if error else metrics.get("status", left),
        steps=metrics.get(STEP, 0),
        episode_return_mean=score if math.isfinite(score) else None,
        settings=metrics.get("config", {}).get("settings", first),
        error=error,
    )


def _reason(error: str) -> str:
    """What Ray Tune says of a failure, in a line."""
    return unheard(error) or error.strip().splitlines()[-1].strip()


def _number(trial: str) -> int:
    return int(trial.rpartition("_")[2])


def _score(trial: Trial) -> float:
    return -math.inf if trial.episode_return_mean is None else trial.episode_return_mean


def _preset(plan: Mapping[str, Any], best: Trial) -> str:
    """The settings that say how the best trial learnt, as `find_preset` reads them."""
    config, _ = resolve(plan["algo"], {**plan["given"], **best.settings})
    score = best.episode_return_mean
    mean = "no episode of its training has ended"
    if score is not None:
        mean = f"mean return of its last 100 episodes of training: {score:.1f}"
    lines = [
        f"# Found by `starling tune` on {datetime.date.today()} with {plan['scheduler']}: "
        f"{best.name} of {len(plan['trials'])} trials",
        f"# of {config.algo} on {config.env}, seed {config.seed}, at step {best.steps:,};",
        f"# {mean}. Its run: {best.run}",
    ]
    if plan["scheduler"] == "pbt":
        lines.append(
            f"# Its settings changed in mid-run, see {SETTINGS_FILE} there: these are the last."
        )
    lines.append(f"timesteps = {config.timesteps}")
    for name, option in learning_options(type(config)).items():
        value = getattr(config, name)
        if name in best.settings or value != option.default:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    return json.dumps(list(value) if isinstance(value, tuple) else value)
