"""What a search does: its ranges, and the settings that its trials begin with."""

from __future__ import annotations

import dataclasses
import json
import random
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starling.config import find_config_class, resolve
from starling.envs.make import env_factory
from starling.errors import CheckpointError, UserError
from starling.options import Option, did_you_mean, options, unknown_option
from starling.ranges import Range, Space, declared_space, read_space
from starling.run_parameters import EnvironmentParameters, RunConfig, check_limit
from starling.training.schedulers import SCHEDULERS

PLAN_FILE = "tuning.json"
_DRAWS = 1000  # of settings, until some go together
_OF_TRIALS = ("run_name", "log_interval", "save_interval")  # settings that they have of their own


def make_plan(
    env: Any, trials: Any, algo: str, scheduler: str, space: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """Checks what was given, and draws the settings of all trials.

    Returns:
        The content of `tuning.json`.

    Raises:
        UserError: Something cannot be used, or nothing goes together.
    """
    if not isinstance(env, str):
        raise UserError(
            "env is missing: give a Gymnasium id such as CartPole-v1, or module:callable, from "
            "which the processes of the trials can make it"
        )
    if trials is None:
        raise UserError("trials is missing: say how many settings to try, such as 16")
    least = 2 if scheduler == "pbt" else 1
    if not isinstance(trials, int) or trials < least:
        raise UserError(f"trials must be at least {least} with {scheduler}, not {trials}")
    if scheduler not in SCHEDULERS:
        raise UserError(f"unknown scheduler {scheduler!r}: {did_you_mean(scheduler, SCHEDULERS)}")
    config_class, given = searched_class(algo), {"seed": 0, **settings, "env": env}
    known = options(config_class)
    for name in given:
        if name not in known:
            raise unknown_option(name, known, command="starling tune")
        if name in _OF_TRIALS:
            raise UserError(f"{name} does not go with tune, whose trials have their own: omit it")
    ranges = find_space(config_class, space, given)
    if scheduler == "pbt" and not any(domain.in_run for domain in ranges.values()):
        may = [name for name, domain in declared_space(config_class).items() if domain.in_run]
        raise UserError(f"pbt changes settings in mid-run: search one of {', '.join(may)} at least")
    if (preset := str(given.get("preset", ""))).endswith((".toml", ".json")):
        given["preset"] = str(Path(preset).absolute())  # who resumes may be elsewhere
    samples = _draw(algo, given, ranges, trials)
    env_factory(env, given.get("env_kwargs", {}))  # refuses unknown ones
    return {
        "algo": algo,
        "scheduler": scheduler,
        "given": given,
        "space": {name: dataclasses.asdict(domain) for name, domain in ranges.items()},
        "trials": samples,
    }


def searched_class(algo: str) -> type[RunConfig]:
    """Return the configuration of an algorithm whose settings can be searched.

    Raises:
        UserError: There is no such algorithm, or its runs want cores beside those of a trial.
    """
    config_class = find_config_class(algo)
    if "address" in options(config_class):
        other = algo.removeprefix("distributed_")
        raise UserError(f"tune does not go with {algo}, which has workers of its own: use {other}")
    return config_class


def find_space(config_class: type, space: Any, given: Mapping[str, Any]) -> Space:
    """What is searched: declared ranges and those of a mapping or file, but for what is given."""
    content = _read_file(Path(space)) if isinstance(space, str | Path) else dict(space or {})
    both = [name for name in content if name in given and content[name] is not False]
    if both:
        raise UserError(f"{both[0]} is given, and to be searched as well: leave one of them out")
    ranges = read_space(content, config_class, learning_options(config_class))
    for name in given:
        ranges.pop(name, None)
    if not ranges:
        raise UserError("all settings are fixed: leave one of them out, so that it is searched")
    for name, domain in ranges.items():
        ends = (domain.low, domain.high) if isinstance(domain, Range) else domain.values
        for value in ends:
            if not isinstance(value, tuple):
                check_limit(name, value)
    return ranges


def learning_options(config_class: type) -> dict[str, Option]:
    """The settings that say how is learnt, and not on what, for how long or where to."""
    return {
        name: option
        for name, option in options(config_class).items()
        if option.group not in (RunConfig, EnvironmentParameters) or name == "num_envs"
    }


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"space {path} cannot be read: {error}") from None


def _draw(algo: str, given: dict[str, Any], space: Space, trials: int) -> list[dict[str, Any]]:
    """Settings for each trial that go together; the first are those without a search."""
    source = random.Random(given["seed"])
    samples: list[dict[str, Any]] = []
    sample: dict[str, Any] = {}
    failures, wrong = 0, UserError()
    while len(samples) < trials:
        try:
            config, _ = resolve(algo, {**given, **sample})
            samples.append({name: getattr(config, name) for name in space})
            failures = 0
        except UserError as error:
            failures += 1
            wrong = error if failures == 1 else wrong  # the first is that of what was given
            if failures == _DRAWS:
                raise wrong from None
        sample = {name: domain.draw(source) for name, domain in space.items()}
    return samples


def read_plan(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the whole path of a search's folder, and the plan of the search.

    Raises:
        CheckpointError: It is no such folder.
    """
    try:
        plan = json.loads((folder / PLAN_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no search to go on with ({error}): give the folder that `starling tune` "
            "printed"
        ) from None
    return folder.absolute(), plan
