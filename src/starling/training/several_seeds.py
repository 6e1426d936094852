"""`train_seeds`: the same training from several seeds at once, for curves with a spread."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from starling.config import find_trainer_class
from starling.configs import PPOConfig
from starling.envs.worker_count import usable_cores
from starling.errors import UserError
from starling.training.device import prepare_cpu
from starling.training.fused import FusedLearner
from starling.training.parallel_ppo import ParallelPPO
from starling.training.result import TrainResult
from starling.training.trainer import Trainer


def train_seeds(
    env_name: Any = None,
    *,
    num_seeds: int,
    algo: str | None = None,
    config: PPOConfig | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
    **settings: Any,
) -> list[TrainResult]:
    """Trains from the seeds seed, seed + 1, ... at once, each as if it were alone.

    Every seed has a run folder of its own, which is evaluated, plotted and gone on with like any
    other; its results are those of a run of that seed to float32 rounding. All seeds share one
    compiled program. On a CPU each core runs it for one seed after another; on other devices it
    runs for all seeds at once (`jax.vmap`).

    Args:
        env_name: As `ParallelPPO` takes it; an environment that is written in JAX.
        num_seeds: How many seeds.
        algo: "ppo" or "a2c".
        config: All settings at once, in place of `env_name` and `settings`.
        stop: Asked between iterations; True stops all runs after a save.
        quiet: Show no progress; otherwise that of the first seed is shown.
        **settings: Any setting of the configuration; `backend` is "compiled" if it is not given.

    Returns:
        What is written to each `result.json`, in the order of the seeds.

    Raises:
        UserError: The environment is not written in JAX, or a setting cannot be used.

    Example:
        >>> starling.train_seeds("CartPole-v1", num_seeds=16, timesteps=100_000)
    """
    if num_seeds < 1:
        raise UserError(f"num_seeds must be at least 1, not {num_seeds}")
    # With the one thread that small networks get otherwise, programs would wait for each other.
    prepare_cpu(math.inf)
    if config is None:
        settings = {"backend": "compiled", **settings}
    elif config.backend == "auto":
        config = dataclasses.replace(config, backend="compiled")
    algo = algo or (config.algo if config else PPOConfig.algo)
    if find_trainer_class(algo) is not ParallelPPO:
        raise UserError(
            f"num_seeds goes with algo ppo and a2c, not with {algo}: train one seed after another"
        )
    first = ParallelPPO(env_name, algo=algo, config=config, **settings)
    agents = [first]
    try:
        if first.mesh is not None:
            raise UserError(
                f"num_seeds does not go with num_devices {first.mesh.size}, since all "
                "seeds are one program of one device: leave one of them out"
            )
        learner = first.make_collector()
        if not isinstance(learner, FusedLearner):
            raise UserError(
                f"num_seeds needs environments that are written in JAX, but backend "
                f"{first.envs.backend} steps {first.config.env}: use backend compiled with such "
                "an environment, or train one seed after another"
            )
        agents += [first.with_seed(first.config.seed + k) for k in range(1, num_seeds)]
        trainers = [
            agent.trainer(learner.beside(), stop=stop, quiet=quiet or agent is not first)
            for agent in agents
        ]
        train = train_in_threads if first.device.platform == "cpu" else train_in_step
        return train(trainers)
    finally:
        for agent in agents:
            agent.close()


def train_in_threads(trainers: Sequence[Trainer]) -> list[TrainResult]:
    """Trains each seed in calls of its own, as many at a time as there are cores.

    On a CPU seeds side by side in one program gain nothing: one alone keeps a core busy.
    """
    cores = threading.Semaphore(usable_cores())
    compiled, over = threading.Event(), threading.Event()

    def train(trainer: Trainer) -> TrainResult:
        asked = trainer.stop
        trainer.stop = lambda: over.is_set() or asked()
        try:
            with contextlib.closing(trainer):
                status = trainer.begin()
                if trainer is not trainers[0]:
                    compiled.wait()  # the first one does it for all
                while status is None:
                    with cores:
                        learnt = trainer.learn()
                        status = trainer.conclude(learnt) if learnt else trainer.end("stopped")
                    compiled.set()
            return trainer.finish(status)
        except BaseException:
            over.set()
            raise
        finally:
            compiled.set()

    with ThreadPoolExecutor(len(trainers), "starling-seed") as pool:
        try:
            return list(pool.map(train, trainers))
        except BaseException:  # Ctrl-C, too: the others end before it is passed on
            over.set()
            raise


def train_in_step(trainers: Sequence[Trainer]) -> list[TrainResult]:
    """Trains all seeds in the same program calls, which fills a large device."""
    agents = [trainer.agent for trainer in trainers]
    learners: list[Any] = [trainer.collector for trainer in trainers]
    with contextlib.ExitStack() as stack:
        for trainer in trainers:
            stack.enter_context(contextlib.closing(trainer))
        statuses = [trainer.begin() for trainer in trainers]
        while None in statuses:
            running = [k for k, status in enumerate(statuses) if status is None]
            ahead = trainers[running[0]].shares_ahead()
            stopped = trainers[0].stop()
            for k in running:
                trainers[k].split.enter("fused")
            learnt = [] if stopped else learners[0].learn_together(agents, learners, ahead)
            for k in running:
                trainer = trainers[k]
                statuses[k] = trainer.end("stopped") if stopped else trainer.conclude(learnt[k])
                if statuses[k] is not None:
                    # Its place in the program stays, since with fewer it would be another one.
                    agents[k] = copy.copy(agents[k])
                    agents[k].state = jax.tree.map(jnp.copy, agents[k].state)
    return [trainer.finish(str(status)) for trainer, status in zip(trainers, statuses, strict=True)]
