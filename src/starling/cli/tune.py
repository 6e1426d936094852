"""`starling tune`."""

from __future__ import annotations

import dataclasses
from typing import Any

from starling.cli.lists import in_words
from starling.cli.parsing import (
    Parser,
    add_grace_seconds,
    given_options,
    print_json,
    stop_signals,
)
from starling.cli.train import peek, require_env
from starling.config import ALGORITHMS
from starling.errors import UserError
from starling.training.search_plan import searched_class
from starling.training.tuning import tune as search

_EXAMPLES = """examples:
  starling tune --env CartPole-v1 --trials 16 --timesteps 50_000
  starling tune --env Pendulum-v1 --trials 8 --scheduler pbt --space space.toml --num_envs 16
  starling tune --resume logs/CartPole-v1__tune_ppo__s0
  starling train --env CartPole-v1 --preset logs/CartPole-v1__tune_ppo__s0/best.toml

Every option of starling train is a fixed setting of all trials, and is not searched then. A space
is a TOML file: lr = {low = 1e-4, high = 1e-2, scale = "log"} or epochs = [4, 10] or gamma = false.
"""
# Of a new search; one that is gone on with has them already.
_NEW = ("algo", "trials", "scheduler", "space", "name", "cpus_per_trial", "gpus_per_trial")


def tune(arguments: list[str]) -> int:
    """Search for settings, or go on with a search; return the exit code."""
    algo = peek(arguments)[0] or "ppo"
    config_class = searched_class(algo)
    parser = _parser()
    parser.add_options(config_class)
    args = parser.read(arguments)
    given: dict[str, Any] = given_options(args, config_class)
    new = {name: getattr(args, name) for name in _NEW if getattr(args, name) is not None}
    if args.resume:
        if first := next(iter({**new, **given}), None):
            raise UserError(f"{first} does not go with resume: the search has its settings")
    else:
        if "env" in given:
            require_env(given["env"], given.get("env_kwargs"))
        new |= {"env_name": given.pop("env", None), "algo": algo, **given}
    with stop_signals(args) as stop:
        result = search(
            resume=args.resume, address=args.address, stop=stop.is_set, quiet=args.quiet, **new
        )
    if not args.quiet:
        _show(result)
    if args.json:
        print_json(dataclasses.asdict(result))
    return stop.exit_code


def _show(result: Any) -> None:
    """Prints the trials as a table, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    table = Table("trial", "status", "steps", "mean return", "settings")
    for trial in result.trials:
        score = trial.episode_return_mean
        words = [
            trial.name,
            trial.status,
            f"{trial.steps:,}",
            "" if score is None else f"{score:.1f}",
        ]
        table.add_row(*words, trial.error or in_words(trial.settings))
    if result.trials:
        Console().print(table)
    if result.status == "stopped":
        print(f"stopped; go on with: starling tune --resume {result.folder}")
    if result.preset:
        print(f"settings of {result.best.name}: {result.preset}")


def _parser() -> Parser:
    parser = Parser(
        "tune",
        "Search for settings: train with several, stop what is worse than the rest, and write the "
        "best to a file for starling train --preset.",
        _EXAMPLES,
        usage="--env ID --trials N [--OPTION VALUE ...]",
    )
    add = parser.add_argument
    add("--algo", metavar="|".join(ALGORITHMS), help="algorithm (default: ppo)")
    add("--trials", type=int, metavar="N", help="settings to try, the preset's first (required)")
    add(
        "--scheduler",
        metavar="asha|pbt",
        help="asha stops early what is worse than most; pbt lets bad trials go on from copies of "
        "good ones, with other settings (default: asha)",
    )
    add("--space", metavar="FILE", help="what to search, where that is not as declared")
    add("--name", help="name of the folder in log_dir (default: from env, algo and seed)")
    add("--resume", metavar="FOLDER", help="go on with the search in this folder")
    add("--address", metavar="HOST:PORT", help="Ray cluster to run on (default: this machine)")
    add("--cpus_per_trial", type=int, metavar="N", help="cores of each trial (default: 1)")
    add("--gpus_per_trial", type=float, metavar="X", help="or a share of one (default: 0)")
    add_grace_seconds(parser)
    add("--quiet", action="store_true", help="show no progress and no table")
    return parser
