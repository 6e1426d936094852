"""`starling train`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from starling.cli.parsing import (
    Parser,
    add_grace_seconds,
    given_options,
    print_json,
    stop_signals,
)
from starling.config import (
    ALGORITHMS,
    config_from_dict,
    find_config_class,
    find_trainer_class,
    resolve,
    resume,
)
from starling.envs.findings import cause
from starling.envs.make import env_factory
from starling.errors import StarlingError, StoppedError, UserError
from starling.options import options
from starling.reporting.writers import require_wandb
from starling.training.run_folder import read_settings

_EXAMPLES = """examples:
  starling train --env CartPole-v1
  starling train --env Pendulum-v1 --num_envs 16 --num_steps 512 --seed 3
  starling train --env mypackage.envs:make --env_kwargs '{"size": 5}' --timesteps 200_000
  starling train --env CartPole-v1 --num_seeds 16
  starling train --resume logs/CartPole-v1__ppo__s0 --timesteps 200_000

Options may be written with - or _. A switch is --x, --no_x or --x True|False. Where the
environment has a preset (starling presets), it takes the place of the defaults shown here.
"""


def train(arguments: list[str]) -> int:
    """Train a policy, or go on with a run; return the exit code."""
    algo, run = peek(arguments)
    before = config_from_dict(read_settings(run)) if run else None
    if before and algo not in (None, before.algo):
        raise UserError(f"the run to resume was made with algo {before.algo}, not {algo}")
    algo = before.algo if before else algo or "ppo"
    config_class = find_config_class(algo)
    parser = _parser(algo)
    parser.add_options(config_class)
    args = parser.read(arguments, _of_clusters(algo, resumed=run is not None))
    if args.distributed and not algo.startswith("distributed_"):  # of a run to resume
        raise UserError(f"--distributed does not go with a run that was made with algo {algo}")
    given = given_options(args, config_class)
    config = resume(before, given) if before else resolve(algo, given)[0]
    require_env(config.env, config.env_kwargs)
    if config.wandb_project:
        require_wandb()

    if args.num_seeds is not None:
        if run:
            raise UserError("num_seeds does not go with resume: resume each of the runs alone")
        return _train_seeds(config, args)
    with stop_signals(args) as stop:
        trainer = find_trainer_class(algo)(config=config, resume=run)
        try:
            if trainer.step >= config.timesteps:
                raise UserError(
                    f"{run} is done with its {config.timesteps} timesteps: ask for more with "
                    "--timesteps"
                )
            if not args.quiet:
                print(_beginning(config, trainer, run), file=sys.stderr)
            result = trainer.train(stop=stop.is_set, quiet=args.quiet)
        except StoppedError:  # nothing had begun
            return stop.exit_code
        finally:
            trainer.close()
    if not args.quiet:
        print(_end(result))
    if args.json:
        print_json(dataclasses.asdict(result))
    return stop.exit_code


def _train_seeds(config: Any, args: argparse.Namespace) -> int:
    from starling.training.several_seeds import train_seeds  # imports JAX

    with stop_signals(args) as stop:
        if not args.quiet:
            words = f"{config.algo}, {args.num_seeds} seeds at once from {config.seed}"
            print(f"{config.env}: {words}", file=sys.stderr)
        results = train_seeds(
            num_seeds=args.num_seeds, config=config, stop=stop.is_set, quiet=args.quiet
        )
    if not args.quiet:
        for result in results:
            print(_end(result))
    if args.json:
        print_json({"runs": [dataclasses.asdict(result) for result in results]})
    return stop.exit_code


def _beginning(config: Any, trainer: Any, run: str | None) -> str:
    if run:
        return f"{config.env}: {config.algo}, from step {trainer.step:,} of {run}"
    preset = "no preset" if config.preset == "none" else f"preset {config.preset}"
    envs = f"{config.num_envs} environments ({trainer.envs.backend})"
    if config.algo.startswith("distributed_"):
        workers = trainer.config.num_workers
        envs = f"{workers} worker{'s' * (workers != 1)}, each with {envs}"
    return f"{config.env}: {config.algo}, {preset}, {envs}"


def _end(result: Any) -> str:
    score = result.episode_return_mean
    mean = "no episode has ended" if score is None else f"mean of the last episodes {score:.1f}"
    return (
        f"{result.status} after {result.steps:,} steps and {result.episodes:,} episodes: {mean}, "
        f"{result.wall_time_s:.1f} s, {result.steps_per_second:,.0f} steps/s\nrun: {result.run}"
    )


def _parser(algo: str) -> Parser:
    parser = Parser(
        "train",
        f"Train a policy with {algo} and write everything about the run to one folder.",
        _EXAMPLES,
        usage="--env ID [--OPTION VALUE ...]",
    )
    parser.add_argument(
        "--algo",
        default="ppo",
        metavar="|".join(ALGORITHMS),
        help='algorithm, or "module:Class" of a trainer of your own (default: ppo)',
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on exactly where the run in this folder stopped, with its settings",
    )
    parser.add_argument(
        "--num_seeds",
        type=int,
        metavar="K",
        help="train K seeds at once, from --seed on, each in a run folder of its own; for "
        "environments that are written in JAX (backend compiled)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="collect with workers on a Ray cluster, or on all cores through Ray: --algo ppo "
        "or dqn stands for distributed_ppo or distributed_dqn then",
    )
    add_grace_seconds(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress and no summary")
    return parser


def peek(arguments: list[str]) -> tuple[str | None, str | None]:
    """Return the algorithm and the run that the command line names: its options depend on them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", nargs="?")
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--distributed", action="store_true")
    found, _ = parser.parse_known_args(arguments)
    algo = found.algo
    resumed = found.resume and algo is None  # its algorithm is known
    if found.distributed and not resumed and not (algo or "ppo").startswith("distributed_"):
        algo = f"distributed_{algo or 'ppo'}"
        if algo not in ALGORITHMS:
            raise UserError(
                f"algo {found.algo} has no distributed form: use --distributed with --algo "
                f"{' or '.join(_with_workers())}"
            )
    return algo, found.resume


def require_env(env: str, env_kwargs: dict[str, Any] | None = None) -> None:
    """Raise a `UserError` for an environment that is unknown, or whose module cannot be imported.

    It is asked before anything heavy is imported.
    """
    try:
        env_factory(env, env_kwargs)
    except StarlingError:
        raise
    except (Exception, SystemExit) as error:  # a script ends Python, if it is no module as well
        raise UserError(f"env {env!r}: importing it failed: {cause(error)}") from error


def _with_workers() -> list[str]:
    """Return the algorithms that have a form with workers on a cluster."""
    prefix = "distributed_"
    return [name.removeprefix(prefix) for name in ALGORITHMS if name.startswith(prefix)]


def _of_clusters(algo: str, resumed: bool) -> dict[str, str]:
    """Return what to say of options that only algorithms with workers on a cluster have."""
    if algo.startswith("distributed_"):
        return {}
    how = f"use --distributed (with --algo {' or '.join(_with_workers())})"
    if resumed:
        how = f"the run to resume was made with {algo}, so leave it out"
    known = {name: set(options(algorithm.config)) for name, algorithm in ALGORITHMS.items()}
    with_workers = {f"distributed_{name}" for name in _with_workers()}
    theirs = set().union(*(known[name] for name in with_workers))
    others = set().union(*(known[name] for name in known.keys() - with_workers))
    return dict.fromkeys(theirs - others, f"is for workers on a Ray cluster: {how}")
