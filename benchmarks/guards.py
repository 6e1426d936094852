"""What it costs to look for NaN and infinity in observations and rewards: on beside off.

`on_invalid_data="raise"`, the default, beside `"off"`, in training and in bare stepping. Both sides
live in one process and take short turns, since the difference is smaller than what separates two
minutes on most machines.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from typing import Any, Literal

from measuring import Row, arguments, in_turn, median, report, shown
from stepping import ENV, steps_per_second

import starling

SIDES: dict[str, Literal["raise", "off"]] = {"on": "raise", "off": "off"}
NUM_ENVS, NUM_STEPS = 64, 128
MOST = 3.0  # per cent


def training_rates(repeats: int, iterations: int) -> dict[str, list[float]]:
    """Steps per second of two agents that train in turn, of which one checks its data."""
    settings: dict[str, Any] = {
        "preset": "none",
        "backend": "process",
        "num_envs": NUM_ENVS,
        "num_steps": NUM_STEPS,
        "epochs": 4,
        "mini_batch_size": 1024,
        "tensorboard": False,
        "save_interval": 0,
    }

    def rate(agent: starling.ParallelPPO) -> float:
        until = agent.step + iterations * NUM_ENVS * NUM_STEPS
        return agent.train(until, quiet=True).steady_steps_per_second

    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        sides = {}
        for side, chosen in SIDES.items():
            agent = starling.ParallelPPO(ENV, log_dir=logs, on_invalid_data=chosen, **settings)
            sides[side] = functools.partial(rate, stack.enter_context(agent))
            sides[side]()  # compiles
        return in_turn(repeats, sides)


def stepping_rates(repeats: int, seconds: float) -> dict[str, list[float]]:
    """Steps per second of the environments alone."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for side, chosen in SIDES.items():
            envs = starling.make_vec(ENV, NUM_ENVS, backend="process", on_invalid_data=chosen)
            stack.callback(envs.close)
            envs.reset(seed=0)
            sides[side] = functools.partial(steps_per_second, envs, seconds)
            sides[side]()
        return in_turn(repeats, sides)


def cost(what: str, rates: dict[str, list[float]], floor: float | None = None) -> Row:
    """The row of a comparison: by how many per cent the checks slow it down."""
    pairs = zip(rates["on"], rates["off"], strict=True)
    costs = [100.0 * (1.0 - on / off) for on, off in pairs]
    on, off = (shown(median(rates[side]), "steps/s") for side in SIDES)
    half = sorted(costs)[len(costs) // 4 : -(-3 * len(costs) // 4)]
    return Row(
        what=f"{what}, {ENV}, {NUM_ENVS} environments in worker processes: cost of checking data",
        value=median(costs),
        unit="%",
        floor="" if floor is None else f"<= {floor:g} %",
        met=None if floor is None else median(costs) <= floor,
        note=f"median of {len(costs)} pairs, half of them from {shown(half[0])} to "
        f"{shown(half[-1], '%')}; {on} with the checks, {off} without",
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=40)
    args = parser.parse_args()
    repeats, iterations, seconds = (2, 2, 0.1) if args.quick else (args.repeats, 8, 1.0)
    report(
        [
            cost("Training (ParallelPPO)", training_rates(repeats, iterations), MOST),
            cost("Stepping", stepping_rates(repeats, seconds)),
        ]
    )


if __name__ == "__main__":
    main()
