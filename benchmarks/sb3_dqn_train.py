"""Stable-Baselines3's DQN, run by its own environment (see peers.py).

Prints a JSON object as the last line: the rate after the first 1,000 transitions.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import time

import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv


class Clock(BaseCallback):
    """Notes when so many transitions had been made, and how many they were."""

    def __init__(self, after: int):
        super().__init__()
        self.after, self.start, self.first = after, 0.0, 0

    def _on_step(self) -> bool:
        if not self.first and self.num_timesteps >= self.after:
            self.start, self.first = time.perf_counter(), self.num_timesteps
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--timesteps", type=int, required=True)
    parser.add_argument("--n_envs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--net_arch", type=int, nargs="+", default=[128, 128])
    args = parser.parse_args()
    # The best of its settings for these networks: environments in process, one thread, CPU.
    torch.set_num_threads(1)
    envs = make_vec_env(args.env, args.n_envs, seed=0, vec_env_cls=DummyVecEnv)
    # One gradient step after each step of all environments.
    model = stable_baselines3.DQN(
        "MlpPolicy",
        envs,
        batch_size=args.batch_size,
        learning_starts=64,
        train_freq=1,
        gradient_steps=1,
        buffer_size=100_000,
        policy_kwargs={"net_arch": args.net_arch},
        device="cpu",
    )
    clock = Clock(after=1000)
    model.learn(args.timesteps, callback=clock)
    seconds = time.perf_counter() - clock.start
    rate = (model.num_timesteps - clock.first) / seconds
    print(json.dumps({"steady_steps_per_second": rate}))


if __name__ == "__main__":
    main()
