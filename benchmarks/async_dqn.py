"""Seconds until AsyncDQN solves CartPole-v1 where a step sleeps 1 ms: 3 actors against 1.

12 environments in both cases, and the settings of the preset. Every 5,000 transitions the greedy
policy plays 50 episodes without sleep, with the clock stopped; at a mean of 475 the run ends. When
it was solved is told by copies of the parameters, taken every 500 transitions, of which the first
that reaches the same score counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time

import numpy as np
from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, run_json, spread

SOLVED, FLOOR = 475.0, 0.5
NUM_ENVS, TIMESTEPS, EPISODES = 12, 150_000, 50
COPY_EVERY, LOOK_EVERY = 500, 5_000


def solve(num_actors: int, seed: int, timesteps: int) -> tuple[float, int]:
    """Seconds, and transitions, until it was solved; that of the whole run if it was not."""
    import gymnasium
    from sleeping import SleepingCartPole

    import starling

    test = gymnasium.make_vec("CartPole-v1", EPISODES, vectorization_mode="sync")
    copies: list[tuple[float, int, np.ndarray]] = []
    stopped = 0.0
    look_at = LOOK_EVERY

    def go_on(iteration) -> bool:
        nonlocal stopped, look_at
        now, step = time.monotonic(), iteration.step
        if step >= COPY_EVERY * (len(copies) + 1):
            copies.append((now - began - stopped, step, np.array(agent.state.params)))
        if step < look_at:
            return True
        look_at += LOOK_EVERY
        score = greedy(agent, test)
        print(f"{step} transitions: {score:.0f}", file=sys.stderr)
        stopped += time.monotonic() - now
        return score < SOLVED

    with tempfile.TemporaryDirectory() as logs:
        agent = starling.AsyncDQN(
            SleepingCartPole, num_envs=NUM_ENVS, num_actors=num_actors, preset="CartPole-v1",
            seed=seed, backend="serial", log_dir=logs, save_replay=False,
        )  # fmt: skip
        began = time.monotonic()
        result = agent.train(timesteps, callbacks=go_on, quiet=True)
        took = time.monotonic() - began - stopped
        if result.status == "callback":
            for seconds, step, params in copies[-LOOK_EVERY // COPY_EVERY :]:
                agent.state = agent.state._replace(params=params)
                if greedy(agent, test) >= SOLVED:
                    agent.close()
                    return seconds, step
        agent.close()
    return took, result.steps


def greedy(agent, envs) -> float:
    """Mean return of the first episode of each environment."""
    observations, _ = envs.reset(seed=0)
    total, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    for _ in range(500):
        observations, rewards, terminated, truncated, _ = envs.step(agent.predict(observations))
        total, running = total + rewards * running, running & ~(terminated | truncated)
    return float(total.mean())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--solve", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solve:  # in a process of its own
        took, steps = solve(*options.solve)
        print(json.dumps({"seconds": took, "steps": steps}))
        return
    repeats, timesteps = (1, 2_000) if options.quick else (options.repeats, TIMESTEPS)
    seeds = {actors: iter(range(repeats)) for actors in (1, 3)}

    def side(actors: int) -> tuple[float, int]:
        words = ["--solve", actors, next(seeds[actors]), timesteps]
        found = run_json([sys.executable, BENCHMARKS / "async_dqn.py", *words], dict(os.environ))
        return found["seconds"], found["steps"]

    runs = in_turn(repeats, {str(actors): lambda a=actors: side(a) for actors in (1, 3)})
    one, three = ([seconds for seconds, _ in runs[side]] for side in ("1", "3"))
    most = max(steps for side in runs.values() for _, steps in side)
    ratio = median(one) / median(three)
    report(
        [
            Row(
                what="CartPole-v1 solved by AsyncDQN, steps that sleep 1 ms, 12 environments, "
                "3 actors",
                value=median(three),
                unit="s",
                peer="1 actor",
                peer_value=median(one),
                ratio=ratio,
                floor=f"<= {FLOOR:g} of its time",
                met=most < timesteps and ratio >= 1 / FLOOR,
                note=f"{spread(three)}, one actor {spread(one)}; at most {most:,} transitions",
            )
        ]
    )


if __name__ == "__main__":
    main()
