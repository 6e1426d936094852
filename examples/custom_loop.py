"""PPO's loop by hand, from Starling's parts: environments, rollout buffer, act and update."""

import starling
from starling.storage.rollout import Origin


def main(timesteps: int = 100_000) -> float:
    """Trains on CartPole-v1 with its preset; returns the mean of 100 greedy episodes."""
    agent = starling.ParallelPPO(env_name="CartPole-v1", seed=0)
    envs, config = agent.envs, agent.config
    buffer = starling.RolloutBuffer(config.num_steps, config.num_envs)

    observations, _ = envs.reset(seed=config.seed)
    for step in range(0, timesteps, config.batch_size):
        buffer.begin(observations)
        for _ in range(config.num_steps):
            action = agent.act(observations)
            observations, rewards, terminated, truncated, infos = envs.step(action.env)
            buffer.add(action.raw, observations, rewards, terminated, truncated, infos)
        rollout = buffer.finish(Origin(version=agent.version))
        # Anything may happen to the rollout here: other rewards, say.
        metrics = agent.update(rollout, progress=step / timesteps)
        if agent.version % 50 == 0:
            print(f"{step:7,} steps, value {metrics['rollout/value_mean']:.1f}")

    score = agent.evaluate(episodes=100).mean_return
    agent.close()
    return score


if __name__ == "__main__":
    print(f"mean return {main():.1f}")
