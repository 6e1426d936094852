"""Stable-Baselines3's PPO, run by its own environment (see peers.py).

Prints "trained" once training is done, and a JSON object as the last line.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv


class Clock(BaseCallback):
    """Notes the time at the end of each rollout and update."""

    def __init__(self):
        super().__init__()
        self.times: list[float] = []

    def _on_rollout_start(self) -> None:  # the first begins, or an update has ended
        self.times.append(time.perf_counter())

    def _on_training_end(self) -> None:
        self.times.append(time.perf_counter())

    def _on_step(self) -> bool:
        return True


def number_or_schedule(text: str):
    """`0.2`, or `lin_0.2` for a value that goes to 0 linearly, as RL-Zoo writes it."""
    if not text.startswith("lin_"):
        return float(text)
    start = float(text.removeprefix("lin_"))
    return lambda remaining: remaining * start


def main(ppo: type[BaseAlgorithm]) -> None:
    """Trains with a PPO that has the interface of Stable-Baselines3's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--timesteps", type=int, required=True)
    parser.add_argument("--n_envs", type=int, default=8)
    parser.add_argument("--n_steps", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--n_epochs", type=int, default=10)
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--gae_lambda", type=float, default=0.95)
    parser.add_argument("--ent_coef", type=float, default=0.0)
    parser.add_argument("--learning_rate", type=number_or_schedule, default=3e-4)
    parser.add_argument("--clip_range", type=number_or_schedule, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=0, help="to evaluate afterwards")
    args = vars(parser.parse_args())
    env_id, timesteps, n_envs, episodes = (
        args.pop(name) for name in ("env", "timesteps", "n_envs", "episodes")
    )
    # The best of its settings for these networks: environments in process, one thread, CPU.
    torch.set_num_threads(1)
    envs = make_vec_env(env_id, n_envs, seed=args["seed"], vec_env_cls=DummyVecEnv)
    model = ppo("MlpPolicy", envs, device="cpu", **args)
    clock = Clock()
    model.learn(timesteps, callback=clock)
    print("trained", flush=True)
    rollout = n_envs * args["n_steps"]
    iterations = len(clock.times) - 1
    result: dict[str, float | None] = {"steady_steps_per_second": None, "mean_return": None}
    if iterations > 1:
        steady = (iterations - 1) * rollout / (clock.times[-1] - clock.times[1])
        result["steady_steps_per_second"] = steady
    if episodes:
        result["mean_return"] = score(model, env_id, episodes)
    print(json.dumps(result))


def score(model: BaseAlgorithm, env_id: str, episodes: int) -> float:
    """Mean return of greedy episodes, with the same number of them in each environment."""
    n_envs = 10
    envs = make_vec_env(env_id, n_envs, seed=10_000)
    observations = envs.reset()
    returns: list[list[float]] = [[] for _ in range(n_envs)]
    total = np.zeros(n_envs)
    while min(map(len, returns)) < -(-episodes // n_envs):
        observations, rewards, ended, _ = envs.step(
            model.predict(observations, deterministic=True)[0]
        )
        total += rewards
        for i in np.flatnonzero(ended):
            returns[i].append(float(total[i]))
            total[i] = 0.0
    return float(np.mean([row[: -(-episodes // n_envs)] for row in returns]))


if __name__ == "__main__":
    main(stable_baselines3.PPO)
