"""Who looks at the steps of a blocking run for their values: the learner, or the workers.

Workers look at them anyway, for log-probabilities. What they then give besides spares the learner a
pass of the networks; it costs them the values, and bytes. Timed without Ray: a worker's part, and
the learner's update, with that pass and without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import jax
import numpy as np
from measuring import Row, arguments, in_turn, median, report, spread
from sleeping import SleepingPixels

from starling.algorithms.acting import Acting
from starling.algorithms.vtrace_ppo import VTracePPO
from starling.configs import DistributedPPOConfig
from starling.storage.rollout import Rollout, join_rollouts

KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Pendulum-v1, 3 workers of 4 environments, 512 steps, 10 epochs, minibatch 64": (
        lambda: gymnasium.make("Pendulum-v1"),
        {"num_workers": 3, "num_envs": 4, "num_steps": 512, "epochs": 10, "mini_batch_size": 64},
    ),
    "images 84 x 84 x 4, 2 workers of 8 environments, 32 steps, 4 epochs, minibatch 256": (
        SleepingPixels,
        {"num_workers": 2, "num_envs": 8, "num_steps": 32, "epochs": 4, "mini_batch_size": 256},
    ),
}


class Run:
    """A worker's and the learner's part of an iteration, of steps with any numbers in them.

    Args:
        new_env: Makes an environment, for its spaces.
        settings: Of DistributedPPO.
        sync_mode: "blocking": workers give what the networks said; "non_blocking": they do not.
    """

    def __init__(self, new_env: Callable[[], Any], settings: dict[str, Any], sync_mode: Any):
        env = new_env()
        rows = settings["num_workers"] * settings["num_envs"] * settings["num_steps"]
        config: Any = DistributedPPOConfig(
            env="any", timesteps=rows, sync_mode=sync_mode, **settings
        )
        spaces = env.observation_space, env.action_space
        self.algorithm = VTracePPO(*spaces, config, config, config.num_envs)
        self.state = self.algorithm.init(0)
        self.raw = random_rollout(*spaces, config.num_steps, config.num_envs)
        part = self.describe()
        self.rollout = join_rollouts([part] * config.num_workers)
        given = part.outputs or ()
        self.bytes_a_step = sum(x.nbytes for x in given) / part.rewards.size

    def describe(self) -> Rollout:
        """What a worker does with a rollout that it has collected."""
        acting = Acting(self.state.params, self.state.observation_statistics)
        return self.algorithm.describe(acting, self.raw, None)[0]

    def update(self) -> None:
        """What the learner does with those of all workers."""
        self.state, _ = self.algorithm.update(self.state, self.rollout)
        jax.block_until_ready(self.state.params)


def random_rollout(seen: Any, done: Any, steps: int, envs: int) -> Rollout:
    """A rollout of one worker."""
    rng = np.random.default_rng(0)
    shape, never = (steps, envs), np.zeros((steps, envs), np.bool_)
    if seen.dtype == np.uint8:
        observations = rng.integers(0, 256, (steps + 1, envs, *seen.shape), np.uint8)
    else:
        observations = rng.standard_normal((steps + 1, envs, *seen.shape), np.float32)
    if isinstance(done, gymnasium.spaces.Discrete):
        actions = rng.integers(0, done.n, shape)
    else:
        actions = rng.standard_normal((*shape, *done.shape), np.float32)
    return Rollout(observations, actions, rng.random(shape, np.float32), never, never, None, None)


def milliseconds(what: Callable[[], Any]) -> float:
    """That something takes."""
    start = time.perf_counter()
    what()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 2 if options.quick else 3 * options.repeats
    rows = []
    for kind, (new_env, settings) in KINDS.items():
        given, missing = (Run(new_env, settings, mode) for mode in ("blocking", "non_blocking"))
        parts = (given.update, missing.update, given.describe, missing.describe)
        for part in parts:
            part()  # compiles
        sides = {f"{i}": lambda part=part: milliseconds(part) for i, part in enumerate(parts)}
        with_it, without, worker, worker_without = in_turn(repeats, sides).values()
        ratio = median(without) / median(with_it)
        rows.append(
            Row(
                what=f"An update, given what the networks said, {kind}",
                value=median(with_it),
                unit="ms",
                peer="the learner looks again",
                peer_value=median(without),
                ratio=ratio,
                note=f"{spread(with_it, 'ms')}, else {spread(without, 'ms')}; a worker's part "
                f"takes {median(worker):.1f} ms, else {median(worker_without):.1f} ms, and "
                f"{given.bytes_a_step:g} bytes a step more are sent",
            )
        )
    report(rows)


if __name__ == "__main__":
    main()
