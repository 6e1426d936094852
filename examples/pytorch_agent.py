"""Starling's environments and rollout buffer with an agent in PyTorch. Needs torch, but no JAX.

An actor-critic by hand: PPO with the settings of RL Baselines3 Zoo for CartPole-v1.
"""
# pyright: reportMissingImports=false

from typing import Any

import numpy as np
import torch
from torch import nn

import starling

NUM_ENVS, NUM_STEPS, EPOCHS, GAMMA, LAMBDA, CLIP = 8, 32, 20, 0.98, 0.8, 0.2


def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    sizes = [(inputs, 64, 2**0.5), (64, 64, 2**0.5), (64, outputs, gain)]
    layers: list[nn.Module] = []
    for rows, columns, scale in sizes:
        layer = nn.Linear(rows, columns)
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Policy and value, two separate networks."""

    def __init__(self, inputs: int, actions: int):
        super().__init__()
        self.actor, self.critic = network(inputs, actions, 0.01), network(inputs, 1, 1.0)

    def policy(self, observations: Any) -> torch.distributions.Categorical:
        """What to do, in each of `[..., F]`."""
        return torch.distributions.Categorical(logits=self.actor(torch.as_tensor(observations)))

    def value(self, observations: Any) -> torch.Tensor:
        """What comes after, `[...]`."""
        return self.critic(torch.as_tensor(observations)).squeeze(-1)


@torch.no_grad()
def advantages(agent: Agent, rollout: starling.Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantages and returns, `[T, N]`."""
    values = agent.value(rollout.observations)  # [T + 1, N]
    # What a step led to is the next row, but where an episode was cut: there the next row is the
    # first of another episode, and the true one is among the final observations.
    following = values[1:].flatten().clone()
    real = rollout.final_index < following.numel()  # the others are padding
    following[rollout.final_index[real]] = agent.value(rollout.final_observations[real])
    following = following.reshape(NUM_STEPS, NUM_ENVS)
    goes_on = 1.0 - torch.as_tensor(rollout.terminated, dtype=torch.float32)
    same_episode = torch.as_tensor(~(rollout.terminated | rollout.truncated), dtype=torch.float32)
    deltas = torch.as_tensor(rollout.rewards) + GAMMA * goes_on * following - values[:-1]
    result = torch.zeros_like(deltas)
    advantage = torch.zeros(NUM_ENVS)
    for t in reversed(range(NUM_STEPS)):
        advantage = deltas[t] + GAMMA * LAMBDA * same_episode[t] * advantage
        result[t] = advantage
    return result, result + values[:-1]


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: starling.Rollout) -> None:
    """Passes over the whole rollout, with PPO's clipped objective."""
    advantage, target = advantages(agent, rollout)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    observations, actions = rollout.observations[:-1], torch.as_tensor(rollout.actions)
    with torch.no_grad():
        old_log_prob = agent.policy(observations).log_prob(actions)
    for _ in range(EPOCHS):
        ratio = (agent.policy(observations).log_prob(actions) - old_log_prob).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        value_loss = nn.functional.mse_loss(agent.value(observations), target)
        optimizer.zero_grad()
        (0.5 * value_loss - surrogate.mean()).backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()


@torch.no_grad()
def score(agent: Agent, episodes: int) -> float:
    """Mean return of greedy episodes, one in each environment."""
    envs = starling.make_vec("CartPole-v1", episodes, backend="serial", seed=1)
    observations, _ = envs.reset()
    total, going = np.zeros(episodes), np.ones(episodes, bool)
    while going.any():
        actions = agent.policy(observations).probs.argmax(-1).numpy()
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        total += rewards * going
        going &= ~(terminated | truncated)
    envs.close()
    return float(total.mean())


def main(timesteps: int = 100_000) -> float:
    """Trains, and returns the mean of 100 greedy episodes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    envs = starling.make_vec("CartPole-v1", NUM_ENVS, seed=0)
    agent = Agent(4, 2)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
    buffer = starling.RolloutBuffer(NUM_STEPS, NUM_ENVS)
    observations, _ = envs.reset()
    for step in range(0, timesteps, NUM_ENVS * NUM_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / timesteps)
        buffer.begin(observations)
        for _ in range(NUM_STEPS):
            with torch.no_grad():
                actions = agent.policy(observations).sample().numpy()
            observations, rewards, terminated, truncated, infos = envs.step(actions)
            buffer.add(actions, observations, rewards, terminated, truncated, infos)
        update(agent, optimizer, buffer.finish())
    envs.close()
    return score(agent, episodes=100)


if __name__ == "__main__":
    print(f"mean return {main():.1f}")
