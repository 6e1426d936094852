"""CartPole on the device, environments and learner in one program, against PureJaxRL's algorithm.

Both sides step the same 512 environments, 128 steps in a rollout, 4 epochs of 4 minibatches through
two 64-64 tanh networks; Starling's figure is that of a whole run with its files. What compiles is
left out on both. Then 16 seeds at once, against the same seeds one after another.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
import time
from typing import Any

import jax
import pure_jax_rl
from measuring import Row, arguments, in_turn, median, report, run_json, shown, spread

from starling import ParallelPPO
from starling.envs.compiled_make import make_compiled
from starling.envs.worker_count import usable_cores
from starling.training.device import prepare_cpu
from starling.training.fused import FusedLearner
from starling.training.several_seeds import train_in_step, train_in_threads

NUM_ENVS, NUM_STEPS, SEEDS = 512, 128, 16
ROLLOUT = NUM_ENVS * NUM_STEPS
FLOOR, FLOOR_OF_SEEDS = 1.5, 3.0
SETTINGS: dict[str, Any] = {
    "preset": "none",
    "backend": "compiled",
    "num_envs": NUM_ENVS,
    "num_steps": NUM_STEPS,
    "epochs": 4,
    "mini_batch_size": ROLLOUT // 4,
    "lr": 2.5e-4,
    "lr_schedule": "linear",
    "value_clip": 0.2,
}


def starling(env: str, updates: int) -> float:
    """Steps per second of a run, after the iteration that compiles."""
    steps = (updates + 1) * ROLLOUT
    with (
        tempfile.TemporaryDirectory() as logs,
        ParallelPPO(env, timesteps=steps, log_dir=logs, **SETTINGS) as agent,
    ):
        return agent.train(quiet=True).steady_steps_per_second


def against_pure_jax_rl(env: str, updates: int, repeats: int) -> Row:
    with ParallelPPO(env, **SETTINGS):  # sets the CPU up for both, before it is used
        pass
    train = pure_jax_rl.make_train(
        make_compiled(env, NUM_ENVS), pure_jax_rl.Settings(updates, NUM_ENVS, NUM_STEPS)
    )
    program = jax.jit(train).lower(jax.random.key(0)).compile()
    keys = iter(range(repeats))

    def theirs() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(jax.random.key(next(keys))))
        return updates * ROLLOUT / (time.perf_counter() - start)

    sides = {"Starling": lambda: starling(env, updates), "PureJaxRL": theirs}
    rates = in_turn(repeats, sides)
    ratio = median(rates["Starling"]) / median(rates["PureJaxRL"])
    return Row(
        what=f"{env} on device, {NUM_ENVS} x {NUM_STEPS}, 4 epochs of 4 minibatches",
        value=median(rates["Starling"]),
        unit="steps/s",
        peer="PureJaxRL's algorithm, in the same process",
        peer_value=median(rates["PureJaxRL"]),
        ratio=ratio,
        floor=f">= {FLOOR:g}x",
        met=ratio >= FLOOR,
        note=f"{jax.default_backend()}; {spread(rates['Starling'])}, "
        f"PureJaxRL {spread(rates['PureJaxRL'])}",
    )


def time_seeds(at_once: bool, updates: int) -> float:
    """Seconds that the seeds take in this process, after what compiles."""
    if at_once:
        prepare_cpu(math.inf)  # as `train_seeds` does; one after another, one thread is faster
    settings = {**SETTINGS, "tensorboard": False, "timesteps": updates * ROLLOUT}
    with (
        tempfile.TemporaryDirectory() as logs,
        ParallelPPO("CartPole-v1", log_dir=logs, **settings) as first,
    ):
        learner = first.make_collector()
        assert isinstance(learner, FusedLearner)

        def run(num_seeds: int) -> float:
            agents = [first.with_seed(seed) for seed in range(num_seeds)]
            trainers = [agent.trainer(learner.beside(), quiet=True) for agent in agents]
            start = time.perf_counter()
            if not at_once:
                for trainer in trainers:
                    trainer.train()
            elif first.device.platform == "cpu":
                train_in_threads(trainers)
            else:
                train_in_step(trainers)
            return time.perf_counter() - start

        run(1 if first.device.platform == "cpu" else SEEDS)
        return run(SEEDS)


def seeds_at_once(updates: int, repeats: int) -> Row:
    def measure(side: str) -> float:
        command = [sys.executable, __file__, "--seeds", side, "--updates", updates]
        return run_json(command)["seconds"]

    sides = {"together": lambda: measure("together"), "apart": lambda: measure("apart")}
    times = in_turn(repeats, sides)
    together, apart = median(times["together"]), median(times["apart"])
    cores, steps, platform = usable_cores(), updates * ROLLOUT, jax.default_backend()
    return Row(
        what=f"CartPole-v1 on device, {SEEDS} seeds at once, {steps:,} steps each",
        value=together,
        unit="s",
        peer="one seed after another",
        peer_value=apart,
        ratio=apart / together,
        floor=f">= {FLOOR_OF_SEEDS:g}x on 4 cores",
        met=apart / together >= FLOOR_OF_SEEDS if cores >= 4 or platform != "cpu" else None,
        note=f"{platform}, {cores} cores; {spread(times['together'])}, one after another "
        f"{spread(times['apart'])}; {shown(SEEDS * steps / together)} steps/s in all",
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", choices=["together", "apart"], help="time one side, as JSON")
    parser.add_argument("--updates", type=int, default=3, help="of each seed, with --seeds")
    options = parser.parse_args()
    if options.seeds:
        seconds = time_seeds(options.seeds == "together", options.updates)
        print(json.dumps({"seconds": seconds}))
        return
    repeats = 1 if options.quick else options.repeats
    updates = 2 if options.quick else 20
    rows = [against_pure_jax_rl("CartPole-v1", updates, repeats)]
    if importlib.util.find_spec("gymnax"):
        rows.append(against_pure_jax_rl("gymnax:CartPole-v1", updates, repeats))
    rows.append(seeds_at_once(2 if options.quick else 5, repeats))
    report(rows)


if __name__ == "__main__":
    main()
