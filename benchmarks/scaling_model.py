"""What an iteration of DistributedPPO costs: the formulae of docs/scaling.md.

`scaling.py` measures what is put into them. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LINK = 10e9 / 8  # bytes a second that the learner's link carries in each direction
WORKERS_PER_NODE = 16
MODES = ("blocking", "non_blocking")


class Costs(NamedTuple):
    """What the learner's process spends besides learning, and how fast bytes move.

    Attributes:
        per_update: Publishing, counting, logging.
        per_rollout: Asking a worker, taking its answer.
        answer: What an iteration waits for beyond collecting: calls on their way.
        put: Bytes a second into the object store.
        join: Bytes a second at which rollouts are put side by side.
        link: Bytes a second to the learner's machine, and from it.
    """

    per_update: float
    per_rollout: float
    answer: float
    put: float
    join: float
    link: float = LINK


class Case(NamedTuple):
    """What is trained.

    Attributes:
        rows: Environment steps of a rollout; where `shared`, of an update.
        shared: Whether workers share an update's steps out; otherwise it grows with them.
        step: Seconds that a worker takes for an environment step, acting included.
        row: Bytes of an environment step in a rollout.
        parameters: Bytes that are published.
        update: Seconds of an update, whatever its size.
        update_row: Seconds of an update for each environment step in it.
    """

    rows: float
    shared: bool
    step: float
    row: float
    parameters: float
    update: float
    update_row: float


def rows_in_all(case: Case, workers: int) -> float:
    """Environment steps in an iteration."""
    return case.rows if case.shared else case.rows * workers


def collecting(case: Case, workers: int) -> float:
    """Seconds that workers take for their rollouts, all at the same time."""
    return case.step * rows_in_all(case, workers) / workers


def learning(costs: Costs, case: Case, workers: int) -> float:
    """Seconds that an iteration keeps the learner busy."""
    fixed = costs.per_update + case.parameters / costs.put + case.update
    of_a_row = case.row / costs.join + case.update_row
    return fixed + workers * costs.per_rollout + rows_in_all(case, workers) * of_a_row


def moving(case: Case, workers: int) -> tuple[float, float]:
    """Bytes to the learner's machine in an iteration, and from it."""
    nodes = math.ceil(workers / WORKERS_PER_NODE)
    return rows_in_all(case, workers) * case.row, nodes * case.parameters


def iteration(costs: Costs, case: Case, workers: int, mode: str) -> float:
    """Seconds of an iteration."""
    collect, learn = collecting(case, workers), learning(costs, case, workers)
    into, out_of = (size / costs.link for size in moving(case, workers))
    if mode == "blocking":
        return collect + costs.answer + into + out_of + learn
    return max(collect, learn, into, out_of)


def enough(busy: Callable[[int], float], case: Case, limit: int = 10**6) -> int | None:
    """The least number of workers that keep something busy; None: more than the limit.

    Args:
        busy: Seconds that it takes in an iteration with so many workers.
        case: What says how long these collect.
        limit: Where looking for it ends.
    """
    low, high = 1, limit
    if busy(high) < collecting(case, high):
        return None
    while low < high:
        middle = (low + high) // 2
        if busy(middle) < collecting(case, middle):
            low = middle + 1
        else:
            high = middle
    return low


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The line through points by least squares, nowhere below 0: its height at 0, its slope."""
    x, y = np.array(points, np.float64).T
    slope, height = np.polyfit(x, y, 1)
    if slope < 0:
        return float(y.mean()), 0.0
    return (float(height), float(slope)) if height > 0 else (0.0, float(x @ y / (x @ x)))


Run = Mapping[str, Any]


def fit_costs(runs: Sequence[Run], rates: Mapping[str, float]) -> Costs:
    """The costs that blocking runs had, which differ in the number of workers."""
    busy = [(run["workers"], run["busy"]) for run in runs]
    waits = [run["waited"] - run["collect"] for run in runs]
    return Costs(*line(busy), max(0.0, float(np.median(waits))), rates["put"], rates["join"])


def fit_case(runs: Sequence[Run], shared: bool = False) -> Case:
    """What was trained in runs that differ in the number of workers.

    How fast workers are is told by the first run: where there are fewest, they have the cores for
    themselves.
    """
    first = runs[0]
    rows = first["rows"] / first["workers"]
    if len(runs) > 1:
        update = line([(run["rows"], run["update"]) for run in runs])
    else:
        update = (0.0, first["update"] / first["rows"])
    return Case(
        rows,
        shared,
        first["collect"] / rows,
        first["rollout_bytes"] / rows,
        first["parameter_bytes"],
        *update,
    )
