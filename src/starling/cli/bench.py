"""`starling bench env` and `starling bench train`: steps per second, here."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from typing import Any

from starling.cli.parsing import Parser, given_options, print_json, table
from starling.cli.train import peek, require_env
from starling.config import ALGORITHMS, DQNConfig, find_config_class, find_trainer_class, resolve
from starling.errors import UserError
from starling.options import did_you_mean

_USAGE = """usage: starling bench env|train ...

  env    steps per second of the environments alone, with random actions, on each backend
  train  steps per second of training, compilation left out

starling bench env --help and starling bench train --help say more."""


def bench(arguments: list[str]) -> int:
    """Run one of the benchmarks; return the exit code."""
    benchmarks = {"env": _bench_env, "train": _bench_train}
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    if not arguments:
        raise UserError("say what to measure: starling bench env or bench train")
    if arguments[0] not in benchmarks:
        hint = did_you_mean(arguments[0], benchmarks)
        raise UserError(f"unknown benchmark {arguments[0]!r}: {hint}")
    return benchmarks[arguments[0]](arguments[1:])


def _bench_env(arguments: list[str]) -> int:
    parser = Parser(
        "bench env",
        "Step environments with random actions and print steps per second: a table of all "
        "backends and which to take, or one backend.",
        "examples:\n"
        "  starling bench env --env CartPole-v1 --num_envs 256\n"
        "  starling bench env --env CartPole-v1 --num_envs 256 --backend process --json",
    )
    parser.add_argument("--env", help="Gymnasium id, or module:callable (required)")
    parser.add_argument("--num_envs", type=int, default=8, help="environments (default: 8)")
    parser.add_argument("--backend", help="only this one; auto chooses (default: all)")
    parser.add_argument("--num_workers", type=int, help="threads or processes")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.read(arguments)
    if not args.env:
        raise UserError("env is missing: give a Gymnasium id such as CartPole-v1")
    if not args.seconds > 0:
        raise UserError(f"seconds must be above 0, not {args.seconds}")
    require_env(args.env)
    from starling.envs.stepping_rate import compare, rate_of

    seconds, workers, seed = args.seconds, args.num_workers, args.seed
    if args.backend:
        rate = rate_of(args.env, args.num_envs, args.backend, workers, seconds, seed)
        print(f"{args.env}, {args.num_envs} environments, backend {rate.backend}: ", end="")
        print(f"{rate.steps_per_second:,.0f} steps/s")
        content = asdict(rate)
    else:
        rates, advice = compare(args.env, args.num_envs, seconds, workers, seed)
        rows = [
            [rate.backend, str(rate.num_workers), f"{rate.steps_per_second:,.0f}", rate.problem]
            for rate in rates
        ]
        print(f"{args.env}, {args.num_envs} environments, {seconds:g} s each")
        print(table(["backend", "workers", "steps/s", ""], rows))
        print(advice)
        best = max(rates, key=lambda rate: rate.steps_per_second)
        content = {**asdict(best), "backends": [asdict(rate) for rate in rates]}
    if args.json:
        print_json(content)
    return 0


def _bench_train(arguments: list[str]) -> int:
    algo, _ = peek(arguments)
    config_class = find_config_class(algo or "ppo")
    parser = Parser(
        "bench train",
        "Train for a few rollouts, leave nothing behind, and print environment steps per second "
        "of the whole loop after the first iteration, which compiles. Options as for train.",
        "example:\n"
        "  starling bench train --env Pendulum-v1 --preset none --num_envs 8 --num_steps 2048",
        usage="--env ID [--OPTION VALUE ...]",
    )
    parser.add_argument("--algo", metavar="|".join(ALGORITHMS), help="(default: ppo)")
    parser.add_argument(
        "--iterations", type=int, default=10, help="rollouts, at least 2 (default: 10)"
    )
    parser.add_options(config_class)
    args = parser.read(arguments)
    if args.iterations < 2:
        raise UserError(f"iterations must be at least 2, not {args.iterations}: the first compiles")
    config, _ = resolve(algo or "ppo", given_options(args, config_class))
    require_env(config.env, config.env_kwargs)
    result = _train_briefly(config, args.iterations)
    print(f"{config.env}, {config.num_envs} environments, backend {result.backend}: ", end="")
    print(f"{result.steady_steps_per_second:,.0f} steps/s")
    if args.json:
        content = asdict(result)
        del content["run"]
        print_json({**content, "steps_per_second": result.steady_steps_per_second})
    return 0


def _train_briefly(config: Any, iterations: int) -> Any:
    trainer_class = find_trainer_class(config.algo)
    with tempfile.TemporaryDirectory(prefix="starling-bench-") as folder:
        changes = {"timesteps": iterations * config.batch_size, "wandb_project": None}
        if isinstance(config, DQNConfig):  # what is measured is learning, too
            changes["learning_starts"] = min(config.learning_starts, config.batch_size)
        config = replace(config, **changes, log_dir=folder)
        with trainer_class(config=config) as trainer:
            return trainer.train(quiet=True)
