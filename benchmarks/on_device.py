"""CartPole on the device, environments and learner in one program, against PureJaxRL's algorithm.

Both sides step the same 512 environments, 128 steps in a rollout, 4 epochs of 4 minibatches through
two 64-64 tanh networks; Starling's figure is that of a whole run with its files. What compiles is
left out on both. Then 16 seeds at once, against the same seeds one after another.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from typing import Any

import jax
import pure_jax_rl
from measuring import Row, arguments, in_turn, median, report, shown, spread

from starling import ParallelPPO
from starling.envs.compiled_make import make_compiled
from starling.envs.sharded import usable_cores
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


def seeds_at_once(updates: int, repeats: int) -> Row:
    steps = updates * ROLLOUT
    with tempfile.TemporaryDirectory() as logs:
        settings = {**SETTINGS, "tensorboard": False, "log_dir": logs, "timesteps": steps}
        with ParallelPPO("CartPole-v1", **settings) as first:
            learner = first.make_collector()
            assert isinstance(learner, FusedLearner)

            def trainers() -> list[Any]:
                agents = [first.with_seed(seed) for seed in range(SEEDS)]
                return [agent.trainer(learner.beside(), quiet=True) for agent in agents]

            at_once = train_in_threads if first.device.platform == "cpu" else train_in_step

            def measure(run: Any) -> float:
                made = trainers()
                start = time.perf_counter()
                run(made)
                return time.perf_counter() - start

            def one_by_one(made: list[Any]) -> None:
                for trainer in made:
                    trainer.train()

            for run in (at_once, one_by_one):  # compiles
                run(trainers())
            sides = {
                "at once": lambda: measure(at_once),
                "one by one": lambda: measure(one_by_one),
            }
            times = in_turn(repeats, sides)
    together, apart = median(times["at once"]), median(times["one by one"])
    cores = usable_cores()
    on_cpu = jax.default_backend() == "cpu"
    return Row(
        what=f"CartPole-v1 on device, {SEEDS} seeds at once, {steps:,} steps each",
        value=together,
        unit="s",
        peer="one seed after another",
        peer_value=apart,
        ratio=apart / together,
        floor=f">= {FLOOR_OF_SEEDS:g}x on 4 cores",
        met=apart / together >= FLOOR_OF_SEEDS if cores >= 4 or not on_cpu else None,
        note=f"{jax.default_backend()}, {cores} cores; {spread(times['at once'])}, one after "
        f"another {spread(times['one by one'])}; {shown(SEEDS * steps / together)} steps/s in all",
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 1 if options.quick else options.repeats
    updates = 2 if options.quick else 20
    rows = [against_pure_jax_rl("CartPole-v1", updates, repeats)]
    if importlib.util.find_spec("gymnax"):
        rows.append(against_pure_jax_rl("gymnax:CartPole-v1", updates, repeats))
    rows.append(seeds_at_once(1 if options.quick else 3, repeats))
    report(rows)


if __name__ == "__main__":
    main()
