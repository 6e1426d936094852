"""`starling check`: what is wrong with an environment."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

from starling.cli.parsing import Parser, print_json
from starling.configs import PPOConfig
from starling.errors import UserError
from starling.options import options, parse
from starling.training.signals import exit_code

_EXAMPLES = """examples:
  starling check CartPole-v1
  starling check mypackage.envs:make --env_kwargs '{"level": 2}' --steps 10000
  starling check MyEnv-v0 --seconds 60      for a slow simulator

levels:
  error    training would fail, or learn from wrong data; the exit code is 1
  warning  hardly meant so, or something cannot be done with it
  note     good to know"""


def check(arguments: list[str]) -> int:
    """Check an environment; return 1 if there are errors in it."""
    parser = Parser(
        "check",
        "Make an environment, step it with random actions in a process of its own, and print what "
        "is wrong with it, one line for each kind of fault: spaces, observations, rewards, ends, "
        "infos and masks, seeds, what it does to its process, hanging and crashing.",
        _EXAMPLES,
        usage="ENV [--OPTION VALUE ...]",
    )
    parser.add_argument("env", metavar="ENV", nargs="?", help="Gymnasium id, or module:callable")
    parser.add_argument("--env", dest="named_env", metavar="ENV", help="the same")
    parser.add_argument("--env_kwargs", metavar="JSON", help="arguments for making it")
    parser.add_argument("--steps", type=int, default=1000, help="to look at (default: 1000)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for each phase, and each call (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    args = parser.read(arguments)
    env = args.env or args.named_env
    if not env:
        raise UserError("env is missing: give a Gymnasium id such as CartPole-v1")
    kwargs = args.env_kwargs and parse(options(PPOConfig)["env_kwargs"], args.env_kwargs)
    from starling.envs.check_process import check_in_process

    with _ended_by_sigterm():
        report = check_in_process(env, kwargs, args.steps, args.seconds, args.seed)
    for finding in report.findings:
        print(finding)
    print(_summary(report))
    if args.json:
        print_json(
            {
                "env": env,
                "errors": report.count("error"),
                "warnings": report.count("warning"),
                "notes": report.count("note"),
                "findings": [dataclasses.asdict(finding) for finding in report.findings],
                "steps": report.steps,
                "episodes": report.episodes,
                "seconds": report.seconds,
                "steps_per_second": report.steps_per_second,
            }
        )
    return 1 if report.count("error") else 0


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Has SIGTERM raise, as Ctrl-C does: then what was started is ended first."""

    def end(signum: int, frame: object) -> NoReturn:
        raise SystemExit(exit_code(signum))

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary(report: Any) -> str:
    errors, warnings = report.count("error"), report.count("warning")
    found = f"{_counted(errors, 'error')} and {_counted(warnings, 'warning')}"
    if not errors and not warnings:
        found = "nothing wrong found"
    walked = ""
    if report.steps:
        walked = f" in {_counted(report.steps, 'step')}"
        walked += f" of {_counted(report.episodes, 'episode')}" if report.episodes else ""
    return f"{found}{walked} ({report.seconds:.1f} s)"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
