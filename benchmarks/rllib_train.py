"""RLlib's PPO on its new API stack, run by its own environment (see peers.py).

Two tanh networks of 64-64 and the loss of PPO without RLlib's penalty on the divergence. Prints a
JSON object as the last line.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import math
import time

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--iterations", type=int, required=True, help="after the first")
    parser.add_argument("--batch_size", type=int, default=8 * 2048)
    parser.add_argument("--minibatch_size", type=int, default=64)
    parser.add_argument("--num_epochs", type=int, default=10)
    parser.add_argument("--num_env_runners", type=int, default=2)
    parser.add_argument("--num_envs_per_env_runner", type=int, default=4)
    args = parser.parse_args()
    # One core for the learner, which waits while the runners collect and the other way round.
    ray.init(num_cpus=args.num_env_runners + 1, include_dashboard=False)
    config = (
        PPOConfig()
        .environment(args.env)
        .env_runners(
            num_env_runners=args.num_env_runners,
            num_envs_per_env_runner=args.num_envs_per_env_runner,
        )
        .learners(num_learners=0)
        .rl_module(
            model_config=DefaultModelConfig(
                fcnet_hiddens=[64, 64], fcnet_activation="tanh", vf_share_layers=False
            )
        )
        .training(
            train_batch_size_per_learner=args.batch_size,
            minibatch_size=args.minibatch_size,
            num_epochs=args.num_epochs,
            lr=3e-4,
            gamma=0.99,
            lambda_=0.95,
            clip_param=0.2,
            vf_clip_param=math.inf,
            vf_loss_coeff=0.5,
            entropy_coeff=0.01,
            grad_clip=0.5,
            use_kl_loss=False,
        )
        .debugging(seed=0, log_level="ERROR")
    )
    algorithm = config.build_algo()
    first = algorithm.train()  # actors start
    start, last = time.perf_counter(), first
    for _ in range(args.iterations):
        last = algorithm.train()
    seconds = time.perf_counter() - start
    steps = sampled(last) - sampled(first)
    algorithm.stop()
    ray.shutdown()
    print(json.dumps({"steady_steps_per_second": steps / seconds}))


def sampled(result: dict) -> int:
    """Environment steps until the end of an iteration."""
    return result["env_runners"]["num_env_steps_sampled_lifetime"]


if __name__ == "__main__":
    main()
