"""`starling evaluate` and `starling plot`: what to do with a trained run."""

from __future__ import annotations

from typing import Any

from starling.cli.parsing import Parser, add_grace_seconds, print_json, stop_signals
from starling.config import config_from_dict, find_trainer_class
from starling.errors import UserError
from starling.training.run_folder import read_settings


def evaluate(arguments: list[str]) -> int:
    """Score a policy over fresh episodes."""
    parser = Parser("evaluate", "Score a trained policy over fresh episodes, and print the mean.")
    add_policy(parser)
    parser.add_argument("--episodes", type=int, default=100, help="how many (default: 100)")
    args = parser.read(arguments)
    at_least_one("episodes", args.episodes)
    with stop_signals(args) as stop, load_policy(args) as agent:
        result = agent.evaluate(args.episodes, args.seed, not args.stochastic, stop.is_set)
    if result is None:
        return stop.exit_code
    print(
        f"mean return {result.mean_return:.2f} +- {result.std_return:.2f}, "
        f"median {result.median_return:.2f}, mean length {result.mean_length:.1f}, "
        f"{result.episodes} episodes"
    )
    if args.json:
        print_json(result.summary())
    return 0


def plot(arguments: list[str]) -> int:
    """Draw learning curves."""
    parser = Parser(
        "plot",
        "Draw the learning curves of runs. Runs that differ in the seed alone become one mean "
        "with a 95 % bootstrap band.",
        "examples:\n"
        "  starling plot logs/CartPole-v1__ppo__s0\n"
        "  starling plot logs/CartPole-v1__ppo__s* --save_fig cartpole.png",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--save_fig", metavar="FILE", help="image to write (default: in the run)")
    parser.add_argument("--show", action="store_true", help="open a window, too")
    parser.add_argument(
        "--window", type=int, metavar="N", help="episodes that the moving average reaches back"
    )
    parser.add_argument(
        "--statistic",
        choices=("mean", "iqm"),
        default="mean",
        help="of several seeds: mean or interquartile mean (default: mean)",
    )
    args = parser.read(arguments)
    from starling.reporting.plots import plot_runs

    figure = plot_runs(args.runs, args.save_fig, args.show, args.window, args.statistic)
    print(figure)
    if args.json:
        print_json({"figure": str(figure)})
    return 0


def add_policy(parser: Parser) -> None:
    """Add the options that say which policy, and how it acts."""
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--seed", type=int, default=1, help="of the environments (default: 1)")
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="which one; the best is kept by runs with --eval_interval (default: latest)",
    )
    parser.add_argument("--stochastic", action="store_true", help="sample actions, as in training")
    add_grace_seconds(parser)


def at_least_one(name: str, value: int) -> None:
    """Raise a `UserError` for a count below 1."""
    if value < 1:
        raise UserError(f"{name} must be at least 1, not {value}")


def load_policy(args: Any) -> Any:
    """Return the policy of a run, after the run itself has been looked at without JAX."""
    config = config_from_dict(read_settings(args.run))
    if args.seed < 0:
        raise UserError(f"seed must be at least 0, not {args.seed}")
    return find_trainer_class(config.algo).load(args.run, which=args.checkpoint)
