"""What it costs to look for NaN and infinity in the environments' data, and for stale answers.

`on_invalid_data="raise"`, the default, beside `"off"`, in training and in bare stepping. Both sides
live in one process and take hundreds of short turns, since the difference is smaller than what
separates two seconds on most machines. The numbers of requests and results, by which no late answer
is taken for a later one's, cannot be switched off: their lines are timed by themselves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import tempfile
import time
import timeit
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
from measuring import Row, arguments, in_turn, median, report, shown
from stepping import ENV, steps_per_second

import starling
from starling.envs import worker
from starling.envs.buffers import SEQUENCE
from starling.envs.process import ProcessWorkers
from starling.envs.requests import Answer, Workers
from starling.envs.worker_count import usable_cores
from starling.training.trainer import Trainer

SIDES: dict[str, Literal["raise", "off"]] = {"on": "raise", "off": "off"}
NUM_ENVS, NUM_STEPS = 64, 128
MOST = 3.0  # per cent
RESAMPLES = 2000
# What a step does for each worker to number requests and results, and to compare the numbers.
SEQUENCE_LINES = {
    worker._serve: ["progress[SEQUENCE] = -request", "progress[SEQUENCE] = request"],
    ProcessWorkers._receive: [
        "torn = self._sequences is not None and self._sequences[w] != request",
        "torn and self.awaited.get(w) == request",
    ],
    Workers.request: ["self._requests += 1", "self.awaited[w] = self._requests"],
    Workers._take: [
        "self.awaited.get(answer.worker) != answer.request",
        "del self.awaited[answer.worker]",
    ],
}


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
        "timesteps": 10**9,
    }

    def rate(trainer: Trainer) -> float:
        start = time.perf_counter()
        for _ in range(iterations):
            trainer.conclude(trainer.learn())
        jax.block_until_ready(trainer.agent.state.params)
        return iterations * NUM_ENVS * NUM_STEPS / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        sides = {}
        for side, chosen in SIDES.items():
            agent = starling.ParallelPPO(ENV, log_dir=logs, on_invalid_data=chosen, **settings)
            stack.enter_context(agent)
            trainer = agent.trainer(agent.make_collector(), quiet=True)
            stack.callback(trainer.close)
            trainer.begin()
            sides[side] = functools.partial(rate, trainer)
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


def sequence_seconds(times: int) -> float:
    """Seconds that the numbers of requests and results take in a step, for one worker."""
    progress = np.zeros((usable_cores(), 8), np.int64)
    answer = Answer(0, 1, None, False)
    own = SimpleNamespace(_sequences=progress[:, SEQUENCE], awaited={}, _requests=0)
    names = {"self": own, "progress": progress[0], "SEQUENCE": SEQUENCE, "answer": answer}
    names |= {"w": 0, "request": 1}
    lines = []
    for function, own_lines in SEQUENCE_LINES.items():
        source = inspect.getsource(function)
        assert all(line in source for line in own_lines), f"{function} is not what was timed"
        lines += own_lines
    return timeit.timeit("\n".join(lines), number=times, globals=names) / times


def costs(rates: dict[str, list[float]]) -> list[float]:
    """By how many per cent the checks slow it down, for each pair of turns."""
    pairs = zip(rates["on"], rates["off"], strict=True)
    return [100.0 * (1.0 - on / off) for on, off in pairs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence, by a bootstrap."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, 1), [0.025, 0.975])
    return float(low), float(high)


def named(what: str, checks: str) -> str:
    return f"{what}, {ENV}, {NUM_ENVS} environments in worker processes: cost of {checks}"


def checking_row(what: str, rates: dict[str, list[float]]) -> Row:
    """What looking at the data costs."""
    found = costs(rates)
    low, high = interval(found)
    on, off = (shown(median(rates[side]), "steps/s") for side in SIDES)
    return Row(
        what=named(what, "checking data"),
        value=median(found),
        unit="%",
        note=f"median of {len(found)} pairs of turns, with 95 % confidence between {shown(low)} "
        f"and {shown(high, '%')}; {on} with the checks, {off} without",
    )


def sequence_rows(what: str, rates: dict[str, list[float]], seconds: float) -> list[Row]:
    """What the numbers of requests and results cost, and both together."""
    workers = min(usable_cores(), NUM_ENVS)
    share = 100.0 * workers * seconds * median(rates["on"]) / NUM_ENVS
    low, high = (share + end for end in interval(costs(rates)))
    both = share + median(costs(rates))
    return [
        Row(
            what=named(what, "sequence numbers"),
            value=share,
            unit="%",
            note=f"{seconds * 1e6:.2f} us for each step of {workers} workers, as if one after the "
            "other; timed by themselves, since they cannot be switched off",
        ),
        Row(
            what=named(what, "checking data and sequence numbers"),
            value=both,
            unit="%",
            floor=f"<= {MOST:g} %",
            met=both <= MOST,
            note=f"with 95 % confidence between {shown(low)} and {shown(high, '%')}",
        ),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=400)
    args = parser.parse_args()
    repeats, iterations, seconds = (4, 1, 0.02) if args.quick else (args.repeats, 2, 0.1)
    training = training_rates(repeats, iterations)
    numbering = sequence_seconds(10_000 if args.quick else 1_000_000)
    report(
        [
            checking_row("Training (ParallelPPO)", training),
            *sequence_rows("Training (ParallelPPO)", training, numbering),
            checking_row("Stepping", stepping_rates(repeats, seconds)),
        ]
    )


if __name__ == "__main__":
    main()
