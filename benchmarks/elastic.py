"""Training on a Ray cluster that loses workers and nodes, and with environments that fail.

All with DistributedPPO, 3 workers and CartPole-v1, on clusters of Ray on this machine:

- a worker is killed (`ray.kill`) every 10 seconds: what is learnt, and in how many steps, beside
  runs in which none is;
- two workers go with their node, and another node joins: how long until it is of use, and whether
  a rollout is left out or learnt from twice;
- environments crash (1e-4 a step, 1e-3 a reset) and stall (5e-4 a step, for 2 to 5 s);
- the same seed twice: how far parameters are apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from elastic_cases import (
    SOLVED,
    Changed,
    Killed,
    change_nodes,
    cluster_of,
    crash_and_stall,
    kill_workers,
    numbers_learnt,
)
from measuring import Row, arguments, in_turn, median, other_work, report, shown

EVERY = 10.0  # seconds from one kill to the next
MOST_STEPS = 1.3  # times as many as without kills
MOST_SECONDS = 30.0  # until a new node is of use
CRASHING_FLOOR, CRASHING_STEPS, SAME_STEPS = 400.0, 250_000, 30_000


def rows_of_kills(killed: Sequence[Killed], unharmed: Sequence[Killed], beside: str) -> list[Row]:
    what = f"CartPole-v1, a worker of 3 is killed every {EVERY:g} s"
    kills = ", ".join(str(run.kills) for run in killed)
    steps, steps_else = (median([run.solved_at for run in side]) for side in (killed, unharmed))
    lists = [", ".join(shown(run.solved_at) for run in side) for side in (killed, unharmed)]
    return [
        Row(
            what=f"{what}: greedy return after the preset's steps",
            value=median([run.score for run in killed]),
            unit="return",
            peer="none is killed",
            peer_value=median([run.score for run in unharmed]),
            floor=f">= {SOLVED:g}, each of {len(killed)}",
            met=min(run.score for run in killed) >= SOLVED,
            note=f"seeds: {', '.join(shown(run.score) for run in killed)}; none killed: "
            f"{', '.join(shown(run.score) for run in unharmed)}; kills: {kills}{beside}",
        ),
        Row(
            what=f"{what}: steps until 100 training episodes have {SOLVED:g} on average",
            value=steps,
            unit="steps",
            peer="none is killed",
            peer_value=steps_else,
            floor=f"<= {MOST_STEPS:g} times as many",
            met=steps <= MOST_STEPS * steps_else < math.inf,
            note=f"seeds: {lists[0]}; none killed: {lists[1]}{beside}",
        ),
    ]


def rows_of_nodes(changed: Sequence[Changed], beside: str) -> list[Row]:
    what = "CartPole-v1, 2 workers of 3 leave with their node, and another node joins"
    seconds = [run.seconds for run in changed]
    between = ", ".join(str(run.updates_between) for run in changed)
    return [
        Row(
            what=f"{what}: from the start of the node until its first rollout is learnt from",
            value=median(seconds),
            unit="s",
            floor=f"<= {MOST_SECONDS:g} s, each of {len(changed)}",
            met=max(seconds) <= MOST_SECONDS,
            note=f"seeds: {', '.join(map(shown, seconds))}; updates meanwhile, with the worker "
            f"that was left: {between}; workers used of the new node's 2: "
            f"{', '.join(str(run.joined) for run in changed)}; greedy return afterwards: "
            f"{', '.join(shown(run.score) for run in changed)}{beside}",
        ),
        Row(
            what=f"{what}: rollouts left out or learnt from twice",
            value=sum(run.missing + run.repeated for run in changed),
            floor="0",
            met=not any(run.missing or run.repeated for run in changed),
            note=f"by worker and number, in {len(changed)} runs",
        ),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    options = parser.parse_args()
    beside = other_work(os.getloadavg()[0])
    repeats, share = (1, 0.3) if options.quick else (options.repeats, 1.0)
    crashing_steps = 20_000 if options.quick else CRASHING_STEPS
    with cluster_of(3) as cluster:
        seeds = {every: iter(range(repeats)) for every in (EVERY, math.inf)}
        sides = {
            name: lambda every=every: kill_workers(cluster, next(seeds[every]), every, share)
            for name, every in (("killed", EVERY), ("unharmed", math.inf))
        }
        runs = in_turn(repeats, sides)
        survived = crash_and_stall(cluster, 0, crashing_steps)
        same, again, other = (numbers_learnt(cluster, seed, SAME_STEPS) for seed in (0, 0, 1))
    changed = []
    for seed in range(repeats):
        with cluster_of(1) as cluster:
            changed.append(change_nodes(cluster, seed))
    apart = np.abs(same - again).max().item()
    assert not np.array_equal(same, other)
    report(
        [
            *rows_of_kills(runs["killed"], runs["unharmed"], beside),
            *rows_of_nodes(changed, beside),
            Row(
                what="CartPole-v1 that crashes and stalls, 6 workers of 8 environments, "
                f"{crashing_steps:,} steps: greedy return where nothing fails",
                value=survived.score,
                unit="return",
                floor=f">= {CRASHING_FLOOR:g}",
                met=survived.score >= CRASHING_FLOOR,
                note=f"1 run, non_blocking; {survived.crashes} crashes, {survived.lost_steps} "
                f"steps lost by them; {survived.seconds:,.0f} s of training{beside}",
            ),
            Row(
                what="The same seed twice with 3 blocking workers: largest difference of any "
                "parameter",
                value=apart,
                floor="0",
                met=apart == 0,
                note=f"CartPole-v1, {SAME_STEPS:,} steps, with the optimiser's and the "
                "normalisers' numbers; another seed differs",
            ),
        ]
    )


if __name__ == "__main__":
    main()
