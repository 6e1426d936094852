"""PPO's minibatch update in eager PyTorch, run by a peer's environment (see peers.py)."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch import nn

OBSERVATION, ACTION = 3, 1  # Pendulum-v1


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(OBSERVATION, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    )


def main(rows: int, updates: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy, value, log_std = network(ACTION), network(1), nn.Parameter(torch.zeros(ACTION))
    parameters = [*policy.parameters(), *value.parameters(), log_std]
    optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5)
    observation, action = torch.randn(rows, OBSERVATION), torch.randn(rows, ACTION)
    old_log_prob, advantage, target = -torch.rand(rows) - 1, torch.randn(rows), torch.randn(rows)

    def update() -> None:
        distribution = torch.distributions.Normal(policy(observation), log_std.exp())
        log_prob = distribution.log_prob(action).sum(1)
        entropy = distribution.entropy().sum(1).mean()
        scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        ratio = (log_prob - old_log_prob).exp()
        surrogate = torch.min(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled).mean()
        value_loss = nn.functional.mse_loss(value(observation).squeeze(1), target)
        loss = -surrogate + 0.5 * value_loss - 0.01 * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

    times = []
    for _ in range(updates):
        start = time.perf_counter()
        update()
        times.append(time.perf_counter() - start)
    times = times[len(times) // 10 :]  # the first ones allocate
    print(json.dumps({"microseconds": 1e6 * statistics.median(times)}))


if __name__ == "__main__":
    main(rows=int(sys.argv[1]), updates=int(sys.argv[2]))
