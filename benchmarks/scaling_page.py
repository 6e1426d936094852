"""The page docs/scaling.md: what was measured, and what follows for many workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from measuring import other_work, shown
from scaling_model import (
    LINK,
    MODES,
    WORKERS_PER_NODE,
    Case,
    Costs,
    enough,
    fit_case,
    fit_costs,
    iteration,
    learning,
    moving,
    rows_in_all,
)

WORKERS = (16, 64, 256)  # of which is told how they would fare
SLOWER_STEP, FASTER_LEARNER = 1e-3, 100  # what is asked of cases beside those measured
TITLES = {"light": "10 epochs", "heavy": "400 epochs"}
Stored = Mapping[str, Any]

INTRODUCTION = """# Scaling on paper

<!-- Written by `make bench ARGS="--only scaling"` from docs/scaling.json. -->

How many workers [`DistributedPPO`](distributed.md) has a use for is a matter of arithmetic. This
page has the formulae, fits their constants to runs of {few} workers on one machine, and
says what follows for {many} of them, which nobody has run.

## An iteration

Each of W workers collects a rollout of S environment steps, and the learner learns from all.

| part | where | takes |
| --- | --- | --- |
| collecting | workers, all at once | S times a step: the environment's, and choosing an action |
| publishing | learner | a fixed time, and one for each byte of the parameters, once a version |
| parameters | learner's link | their bytes, once for each node |
| rollouts | learner's link | W times S times the bytes of a step |
| asking and taking | learner | a fixed time for each worker |
| joining | learner | a copy of all bytes that came |
| update | learner | a time for each step: epochs, times the time of a minibatch by its size |

Two messages go to and fro for each worker and iteration, however many steps a rollout has: one that
asks, and one that answers.

- The learner is busy for *publishing + W x asking and taking + joining + update*.
- `blocking`: an iteration takes *collecting + the way there and back + the bytes over the link +
  what the learner is busy for*, one after the other.
- `non_blocking`: these happen at the same time, and an iteration takes *the longest of them*.
- Steps per second are W x S by the time of an iteration.

Updates grow with the workers, unless `--buffer_size` is given, but not what the learner can learn
from in a second. **It has a use for as many workers as it learns steps from in a second, divided by
the steps that a worker collects in one.** More of them wait. To feed more, make updates cheaper
(fewer `--epochs`, a larger `--mini_batch_size`), make rollouts longer (`--steps_per_worker`) where
the learner is busy asking and taking, or give it an accelerator.
"""

OUTSIDE = """## What the formulae leave out

- Workers are taken to be equally fast. In `blocking` all wait for the slowest.
- The head node has to do with workers that start and are lost, and with no rollout.
- What lag costs in learning: in `non_blocking` rollouts are a few updates old.
- {per_node} workers to a node are assumed, and a link of 10 Gbit/s that Ray fills. On one machine,
  between two nodes that share its cores, it moves what the first table says.
"""


def page(stored: Stored) -> str:
    """The page of what `scaling.py` has stored."""
    light, costs = of(stored, "light", "blocking"), costs_of(stored)
    counts = [str(run["workers"]) for run in light]
    few = f"{', '.join(counts[:-1])} and {counts[-1]}"
    many = f"{', '.join(map(str, WORKERS[:-1]))} and {WORKERS[-1]}"
    cases = cases_of(stored)
    parts = [
        INTRODUCTION.format(few=few, many=many),
        *_messages(stored),
        *_constants(costs, fit_case(light)),
        *_fit(stored, costs),
        *_limits(costs, cases),
        *_predictions(costs, cases),
        *_advantages(stored),
        OUTSIDE.format(per_node=WORKERS_PER_NODE),
        _place(stored),
    ]
    return "\n".join(parts) + "\n"


def of(stored: Stored, what: str, mode: str) -> list[Stored]:
    """The runs of one kind, by the number of workers."""
    return [run for run in stored["runs"] if (run["what"], run["mode"]) == (what, mode)]


def costs_of(stored: Stored) -> Costs:
    """The constants of the learner's process."""
    large = stored["messages"]["sizes"][-1]
    rates = {"put": large["size"] / large["put"], "join": stored["join"]}
    return fit_costs(of(stored, "light", "blocking"), rates)


def cases_of(stored: Stored) -> dict[str, Case]:
    """What is predicted, by a title."""
    light = fit_case(of(stored, "light", "blocking"))
    pendulum = fit_case(of(stored, "pendulum", "blocking"), shared=True)
    pixels = fit_case(of(stored, "pixels", "blocking"))
    return {
        "a simulator of 1 ms a step, one a worker, 4 numbers observed, networks 64-64, 10 epochs "
        "of minibatches of 64, rollouts of 256 steps": light,
        "Pendulum-v1 as it is, 8 a worker, the same networks, epochs and minibatches, "
        "16,384 steps an update shared out": pendulum,
        f"as 2, with steps that are {1e3 * SLOWER_STEP:g} ms longer": pendulum._replace(
            step=pendulum.step + SLOWER_STEP
        ),
        "images 84 x 84 x 4 of 1 ms a step, 8 environments a worker, the Nature CNN, 4 epochs of "
        "minibatches of 256, rollouts of 256 steps": pixels,
        f"as 4, with a learner that is {FASTER_LEARNER} times as fast": pixels._replace(
            update_row=pixels.update_row / FASTER_LEARNER
        ),
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _messages(stored: Stored) -> list[str]:
    calls = stored["messages"]["calls"]
    rows = [
        [
            size_in_words(found["size"]),
            *(f"{milliseconds(found[key])} ms" for key in ("put", "near", "away")),
            rate(found["size"] / found["away"]),
        ]
        for found in stored["messages"]["sizes"]
    ]
    head = ["bytes", "put", "get, from the same node", "get, from another", "that is"]
    return [
        "## What messages cost",
        "",
        "Through Ray's object stores. The other node is on the same machine: bytes go through two "
        "stores and TCP, but over no cable. Up to 100 kB come with the answer to a call itself.",
        "",
        *_table(head, rows),
        "",
        f"An empty call takes {milliseconds(calls['there and back'])} ms there and back, and "
        f"{milliseconds(calls['one of many'])} ms each where many are under way at once. Rollouts "
        f"are put side by side at {rate(stored['join'])}.",
        "",
    ]


def _constants(costs: Costs, case: Case) -> list[str]:
    return [
        "## The learner's constants",
        "",
        "Lines through the blocking runs below: what the learner is busy with besides updates, "
        "over the number of workers; and what an update takes, over its steps.",
        "",
        *_table(
            ["what", "takes"],
            [
                ["fixed, an update", f"{milliseconds(costs.per_update)} ms"],
                ["each rollout", f"{milliseconds(costs.per_rollout)} ms"],
                ["the way there and back", f"{milliseconds(costs.answer)} ms"],
                ["publishing, beside what is fixed", rate(costs.put)],
                ["update, networks 64-64, 10 epochs", f"{1e6 * case.update_row:.1f} us a step"],
            ],
        ),
        "",
    ]


def _fit(stored: Stored, costs: Costs) -> list[str]:
    """Measured beside predicted; the non-blocking runs are nothing that was fitted to."""
    on_one_machine = costs._replace(link=math.inf)
    light = fit_case(of(stored, "light", "blocking"))
    heavy_runs = of(stored, "heavy", "non_blocking")
    heavy = fit_case(heavy_runs)._replace(step=light.step)
    rows = []
    for what, case in (("light", light), ("heavy", heavy)):
        for mode in MODES:
            for run in of(stored, what, mode):
                workers = run["workers"]
                measured = run["rows"] / run["iteration"]
                model = rows_in_all(case, workers) / iteration(on_one_machine, case, workers, mode)
                busy = (run["update"] + run["busy"]) / run["iteration"]
                rows.append(
                    [
                        f"{mode}, {TITLES[what]}",
                        str(workers),
                        shown(measured),
                        shown(model),
                        f"{100 * (model / measured - 1):+.0f} %",
                        f"{100 * busy:.0f} %",
                    ]
                )
    full = enough(lambda workers: learning(on_one_machine, heavy, workers), heavy)
    head = ["run", "workers", "measured steps/s", "model", "off by", "learner busy"]
    return [
        "## The fit",
        "",
        "Environments that sleep 1 ms a step, one a worker, stand for some on machines of their "
        "own; asleep they leave this machine's cores to the learner. Only the blocking runs were "
        "fitted to. With 400 epochs, which stand for a large network, the learner should be busy "
        f"all the time from {full} workers on.",
        "",
        *_table(head, rows),
        "",
    ]


def _limits(costs: Costs, cases: Mapping[str, Case]) -> list[str]:
    rows = []
    for number, case in enumerate(cases.values(), 1):
        busy = enough(lambda workers, case=case: learning(costs, case, workers), case)
        link = enough(lambda workers, case=case: max(moving(case, workers)) / costs.link, case)
        most = "" if busy is None else rows_in_all(case, busy) / learning(costs, case, busy)
        rows.append(
            [
                str(number),
                *(size_in_words(size) for size in (case.row, case.parameters)),
                shown(1.0 / case.step),
                most and shown(most),
                *("more than a million" if n is None else f"{n:,}" for n in (busy, link)),
            ]
        )
    head = ["case", "bytes of a step", "of the parameters", "a worker's steps/s"]
    head += ["the learner's", "workers that keep it busy", "that fill its link"]
    return [
        "## Where it ends",
        "",
        *(f"{number}. {title}" for number, title in enumerate(cases, 1)),
        "",
        "Measured are the bytes, how fast a worker is that has the machine for itself, and the "
        f"time of an update on this CPU. That an accelerator is {FASTER_LEARNER} times as fast at "
        "convolutions is assumed.",
        "",
        *_table(head, rows),
        "",
    ]


def _predictions(costs: Costs, cases: Mapping[str, Case]) -> list[str]:
    rows = []
    for number, case in enumerate(cases.values(), 1):
        for workers in WORKERS:
            seconds = {mode: iteration(costs, case, workers, mode) for mode in MODES}
            made = rows_in_all(case, workers)
            into, out_of = (size / seconds["non_blocking"] for size in moving(case, workers))
            rows.append(
                [
                    str(number),
                    str(workers),
                    *(shown(made / seconds[mode]) for mode in MODES),
                    f"{100 * learning(costs, case, workers) / seconds['non_blocking']:.0f} %",
                    rate(into),
                    rate(out_of),
                ]
            )
    head = ["case", "workers", "blocking steps/s", "non_blocking steps/s"]
    head += ["learner busy", "to the learner", "from it"]
    return [
        "## What is predicted",
        "",
        f"The last three columns are of `non_blocking`. The link carries {rate(LINK)} each way. "
        "Where an update's steps are shared out, more workers have shorter rollouts, and the "
        "learner has more to ask and to take: it becomes slower.",
        "",
        *_table(head, rows),
        "",
    ]


def _advantages(stored: Stored) -> list[str]:
    rows = []
    for what, title in (
        ("light", "64-64, 10 epochs, 256 steps"),
        ("pendulum", "64-64, 10 epochs, 16,384 steps"),
        ("pixels", "Nature CNN, 4 epochs, 256 steps"),
    ):
        run = of(stored, what, "blocking")[0]
        share = run["look"] / run["update"]
        times = [f"{milliseconds(run[key])} ms" for key in ("look", "update")]
        rows.append([title, *times, f"{100 * share:.0f} %"])
    return [
        "## Where advantages are computed",
        "",
        "At the learner, in the program of the update: one pass of the networks over all steps for "
        "their values, then V-trace.",
        "",
        *_table(["update", "values and V-trace", "the whole of it", "share"], rows),
        "",
        "That share is all that workers could take over. In `non_blocking` they cannot: V-trace "
        "weighs what an older policy did by what the newest would do, and takes the newest values; "
        "when workers collect there are neither. In `blocking` the policy that acts is the one "
        "that learns, and workers take most of it: they give what the networks said of each step, "
        "4 bytes a number, which they look at for log-probabilities anyway, and the learner's pass "
        "is saved. What is left are advantages, at the learner, since normalised rewards take the "
        "statistics of all workers. What both ways take was "
        "[measured](distributed.md#what-goes-where).",
        "",
    ]


def _place(stored: Stored) -> str:
    measured = stored["measured"]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    place = f"{measured['date']}, {measured['cores']} cores, {measured['machine']}: {versions}"
    beside = other_work(stored["load"])
    return f"Measured on {place}, by `python benchmarks/scaling.py`{beside}."


def milliseconds(seconds: float) -> str:
    """With two digits that count."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def rate(bytes_a_second: float) -> str:
    """Bytes a second, in words."""
    return f"{size_in_words(bytes_a_second)}/s"


def size_in_words(size: float) -> str:
    """Bytes, in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            value = size / factor
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    return f"{size:.0f} B"
