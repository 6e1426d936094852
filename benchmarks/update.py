"""The update alone: microseconds for each minibatch, and how often it is compiled. And acting.

A rollout of Pendulum-v1's shape (8 environments x 2048 steps), 10 epochs of minibatches of 64, two
64-64 tanh networks. Starling's figure is a whole update (values, advantages, shuffling, 2,560
minibatches) divided by its minibatches; eager PyTorch's, for comparison, is the minibatch alone.
"""

from __future__ import annotations

import time

import gymnasium
import jax
import numpy as np
import peers
from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, run_json, spread

from starling.config import PPOConfig
from starling.storage.rollout import Origin, Rollout
from starling.training.agent import Agent

FLOOR, FORMER_FLOOR, ACTING_FLOOR = 45.0, 60.0, 50.0


def random_rollout(agent: Agent, config: PPOConfig) -> Rollout:
    """A rollout with numbers of the right shape and size in it."""
    rng = np.random.default_rng(0)
    shape = (config.num_steps, config.num_envs)
    rows = (config.num_steps + 1, config.num_envs)
    truncated = np.zeros(shape, np.bool_)
    truncated[199::200] = True
    index = np.flatnonzero(truncated).astype(np.int32)
    return Rollout(
        observations=rng.standard_normal((*rows, 3), np.float32),
        actions=rng.standard_normal((*shape, 1), np.float32),
        rewards=-rng.random(shape, np.float32),
        terminated=np.zeros(shape, np.bool_),
        truncated=truncated,
        final_observations=rng.standard_normal((len(index), 3), np.float32),
        final_index=index,
        origin=Origin(agent.version),
    )


def starling_updates(updates: int) -> tuple[list[float], int]:
    """Microseconds for each minibatch of some updates after the first, and programs compiled."""
    config = PPOConfig(env="Pendulum-v1")
    env = gymnasium.make("Pendulum-v1")
    agent = Agent(config, env.observation_space, env.action_space)
    agent.update(random_rollout(agent, config))  # compiles
    compiled: list[str] = []

    def notice(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(notice)
    times = []
    for _ in range(updates):
        rollout = random_rollout(agent, config)
        start = time.perf_counter()
        agent.update(rollout)
        times.append(1e6 * (time.perf_counter() - start))
    jax.monitoring.clear_event_listeners()
    minibatches = config.epochs * config.num_minibatches
    return [duration / minibatches for duration in times], len(compiled)


def acting(calls: int) -> float:
    """Microseconds for sampling actions for 8 observations on the host, NumPy in and out."""
    config = PPOConfig(env="Pendulum-v1", num_envs=8, num_steps=calls)
    env = gymnasium.make("Pendulum-v1")
    agent = Agent(config, env.observation_space, env.action_space)
    observations = np.zeros((8, 3), np.float32)
    agent.act(observations)  # compiles
    start = time.perf_counter()
    for _ in range(calls - 1):  # of one table of noise
        agent.act(observations)
    return 1e6 * (time.perf_counter() - start) / (calls - 1)


def cartpole_rate(steps: int) -> float:
    """Steps per second of one CartPole-v1: how fast this machine runs Python."""
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    start = time.perf_counter()
    for step in range(steps):
        _, _, terminated, truncated, _ = env.step(step & 1)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - start)


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats, updates = (1, 3) if options.quick else (options.repeats, 10)
    compiled: list[int] = []

    def measure_starling() -> float:
        times, programs = starling_updates(updates)
        compiled.append(programs)
        return median(times)

    def measure_torch() -> float:
        minibatches = 200 if options.quick else 3000
        command = [peers.python("sb3"), BENCHMARKS / "torch_update.py", 64, minibatches]
        return run_json(command)["microseconds"]

    sides = {"Starling": measure_starling, "PyTorch": measure_torch}
    times = in_turn(repeats, sides)
    ours, theirs = median(times["Starling"]), median(times["PyTorch"])
    calls = 200 if options.quick else 5000
    acted = [acting(calls) for _ in range(repeats)]
    cartpole = median([cartpole_rate(20_000 if options.quick else 200_000) for _ in range(repeats)])
    report(
        [
            Row(
                what="The update alone, each minibatch of 64, two 64-64 networks",
                value=ours,
                unit="us",
                peer=f"PyTorch {peers.TORCH}, eager, 1 thread",
                peer_value=theirs,
                ratio=theirs / ours,
                floor=f"<= {FLOOR:g} us",
                met=ours <= FLOOR,
                note=f"{spread(times['Starling'])}; one CartPole-v1 makes {cartpole:,.0f} steps/s "
                "here. The floor was set on a machine where that makes 207,000 and PyTorch takes "
                f"799 us; the former floor, {FORMER_FLOOR:g} us, is "
                f"{'met' if ours <= FORMER_FLOOR else 'not met'}",
            ),
            Row(
                what="Acting on the host: 8 observations to 8 actions, NumPy to NumPy",
                value=median(acted),
                unit="us",
                floor=f"<= {ACTING_FLOOR:g} us",
                met=median(acted) <= ACTING_FLOOR,
                note=spread(acted),
            ),
            Row(
                what="The update is compiled once: programs compiled by later updates",
                value=max(compiled),
                floor="0",
                met=not any(compiled),
                note=f"{len(compiled)} x {updates} updates",
            ),
        ]
    )


if __name__ == "__main__":
    main()
