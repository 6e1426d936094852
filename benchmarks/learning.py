"""What the presets reach: each seed trained anew, then scored over 100 fresh greedy episodes.

`--env ID --seeds N` trains, and appends what came out to results/learning.jsonl; without `--env`
the table is made of what is there, which is how hours of training get into every table.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from typing import Any, NamedTuple

from measuring import BENCHMARKS, STARLING, Row, arguments, here, report, run_json, shown

RESULTS = BENCHMARKS / "results" / "learning.jsonl"
EPISODES = 100


class Goal(NamedTuple):
    """A score, how many seeds are asked for it, and whether each of them or their mean."""

    score: float
    seeds: int
    each: bool


GOALS = {
    ("CartPole-v1", "ppo"): Goal(475, 5, each=True),
    ("CartPole-v1", "async_ppo"): Goal(475, 3, each=True),
    ("Acrobot-v1", "ppo"): Goal(-100, 3, each=True),
    ("MountainCarContinuous-v0", "ppo"): Goal(90, 3, each=True),
    ("Pendulum-v1", "ppo"): Goal(-200, 3, each=True),
    ("Pendulum-v1", "async_ppo"): Goal(-200, 3, each=True),
    ("LunarLander-v3", "ppo"): Goal(200, 3, each=False),
    ("LunarLander-v3", "async_ppo"): Goal(200, 3, each=False),
    ("HalfCheetah-v5", "ppo"): Goal(2000, 3, each=False),
    ("Hopper-v5", "ppo"): Goal(2000, 3, each=False),
    **{
        (env, f"distributed_ppo --num_workers 2 --sync_mode {mode}"): Goal(score, 3, each=True)
        for env, score in (("CartPole-v1", 475), ("Pendulum-v1", -200))
        for mode in ("blocking", "non_blocking")
    },
    **{
        ("CartPole-v1", f"dqn{options}"): Goal(475, 3, each=True)
        for options in ("", " --num_envs 1", " --num_envs 16")
    },
    ("Acrobot-v1", "dqn"): Goal(-100, 3, each=True),
    ("MountainCar-v0", "dqn"): Goal(-130, 3, each=True),
    ("LunarLander-v3", "dqn"): Goal(200, 3, each=False),
}


def train(env: str, algo: str, seed: int, timesteps: int | None) -> dict[str, Any]:
    """Trains one seed and scores it."""
    with tempfile.TemporaryDirectory() as logs:
        command = [STARLING, "train", "--env", env, "--seed", seed, "--algo", *algo.split()]
        if timesteps is not None:
            command += ["--timesteps", timesteps]
        result = run_json([*command, "--log_dir", logs, "--quiet", "--json"])
        evaluate = [STARLING, "evaluate", result["run"], "--episodes", EPISODES, "--json"]
        score = run_json(evaluate)
    names = ("env", "seed", "preset", "backend", "steps", "wall_time_s")
    found = {"algo": algo, **{name: result[name] for name in names}}
    return {**found, **score, "measured": here()}


def stored() -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """The newest result of each seed, by environment and algorithm."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    for result in map(json.loads, lines):
        found.setdefault((result["env"], result["algo"]), {})[result["seed"]] = result
    return found


def row(env: str, algo: str, seeds: dict[int, dict[str, Any]]) -> Row:
    """The seeds of one environment as a row of the table."""
    results = [seeds[seed] for seed in sorted(seeds)]
    scores = [result["mean_return"] for result in results]
    mean = statistics.fmean(scores)
    goal = GOALS.get((env, algo))
    met = None
    if goal:
        reached = min(scores) if goal.each else mean
        met = reached >= goal.score and len(scores) >= goal.seeds
    steps = " or ".join(f"{n:,}" for n in sorted({result["steps"] for result in results}))
    wall = statistics.median([result["wall_time_s"] for result in results])
    return Row(
        what=f"{env}, {algo}, preset, {steps} steps",
        value=mean,
        unit="return",
        floor=f">= {goal.score:g}, {'each' if goal.each else 'mean'} of {goal.seeds}"
        if goal
        else "",
        met=met,
        note=f"seeds: {', '.join(map(shown, scores))}; median {wall:,.0f} s of training",
        command=f"python benchmarks/learning.py --env {env} --seeds {len(results)}"
        + (f' --algo "{algo}"' if " " in algo else f" --algo {algo}" if algo != "ppo" else ""),
        measured=min((result["measured"] for result in results), key=lambda there: there["date"]),
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--env", help="Gymnasium id to train on; without it nothing is trained")
    parser.add_argument("--algo", default="ppo", help="and options of it, in one word")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--timesteps", type=int, help="environment steps; those of the preset")
    options = parser.parse_args()
    if options.env:
        for seed in range(1 if options.quick else options.seeds):
            result = train(options.env, options.algo, seed, options.timesteps)
            print(f"{options.env} seed {seed}: {shown(result['mean_return'])}", flush=True)
            if not options.quick:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    order = list(GOALS)
    found = sorted(
        stored().items(),
        key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0]),
    )
    report([row(env, algo, seeds) for (env, algo), seeds in found])


if __name__ == "__main__":
    main()
