"""Sample Factory's APPO, run by its own environment (see peers.py).

Asynchronous, without normalisation and V-trace, two tanh networks of 64-64, no recurrence. Prints a
JSON object as the last line.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time

import gymnasium
from sample_factory.algo.runners.runner import AlgoObserver
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.train import make_runner
from sample_factory.utils.utils import log

log.setLevel("ERROR")  # here, so that its worker processes do so, too


class Clock(AlgoObserver):
    """Notes the time at the end of each iteration of the learner."""

    def __init__(self):
        self.times: list[float] = []

    def on_training_step(self, runner: object, training_iteration_since_resume: int) -> None:
        """Called by the runner."""
        self.times.append(time.perf_counter())


def make(name: str, cfg: object = None, env_config: object = None, render_mode: str | None = None):
    return gymnasium.make(name, render_mode=render_mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--timesteps", type=int, required=True)
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--num_envs_per_worker", type=int, default=16)
    parser.add_argument("--rollout", type=int, default=32, help="steps of each environment")
    parser.add_argument("--batch_size", type=int, default=1024, help="of a minibatch")
    parser.add_argument("--num_batches_per_epoch", type=int, default=2)
    parser.add_argument("--num_epochs", type=int, default=2)
    args = parser.parse_args()
    register_env(args.env, make)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        given = {
            **{name: value for name, value in vars(args).items() if name != "timesteps"},
            "train_for_env_steps": args.timesteps,
            "train_dir": folder,
            "device": "cpu",
            "use_rnn": False,
            "nonlinearity": "tanh",
            "actor_critic_share_weights": False,
            "normalize_input": False,
            "normalize_returns": False,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "learning_rate": 3e-4,
            "exploration_loss_coeff": 0.01,
            "ppo_clip_ratio": 0.2,
            "max_grad_norm": 0.5,
            "seed": 0,
        }
        words = [f"--{name}={value}" for name, value in given.items()]
        words += ["--encoder_mlp_layers", "64", "64"]
        cfg = parse_full_cfg(parse_sf_args(words)[0], words)
        cfg, runner = make_runner(cfg)
        runner.register_observer(clock)
        if runner.init() or runner.run():
            sys.exit("Sample Factory failed")
    warm = len(clock.times) // 4  # processes start, and the queues fill
    steps = (len(clock.times) - 1 - warm) * args.batch_size * args.num_batches_per_epoch
    print(json.dumps({"steady_steps_per_second": steps / (clock.times[-1] - clock.times[warm])}))


if __name__ == "__main__":
    main()
