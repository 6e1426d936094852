"""EnvPool's environments, however they are stepped, go by Gymnasium's rules.

They cannot have any spaces, as they are written in C++: a fixed set is compared, step by step.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("envpool")

from starling.envs.envpool import EnvPoolVectorEnv

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning"),
]


def cart_pole_state(env, observation):
    env.state = observation.astype(np.float64)
    env.steps_beyond_terminated = None


def pendulum_state(env, observation):
    cosine, sine, speed = observation.astype(np.float64)
    env.state = np.array([np.arctan2(sine, cosine), speed])


def mountain_car_state(env, observation):
    env.state = observation.astype(np.float64)


def acrobot_state(env, observation):
    cosine1, sine1, cosine2, sine2, speed1, speed2 = observation.astype(np.float64)
    env.state = np.array([np.arctan2(sine1, cosine1), np.arctan2(sine2, cosine2), speed1, speed2])


SET_STATE = {
    "CartPole-v1": cart_pole_state,
    "Pendulum-v1": pendulum_state,
    "MountainCar-v0": mountain_car_state,
    "MountainCarContinuous-v0": mountain_car_state,
    "Acrobot-v1": acrobot_state,
}


class Oracle:
    """Gymnasium's environment, put into the state that an observation shows."""

    def __init__(self, env_id, limit):
        self.env_id, self.limit = env_id, limit
        self.env = gym.make(env_id).unwrapped
        self.env.reset(seed=0)

    def check(self, before, length, action, after, reward, terminated, truncated):
        """Compares the step, an episode's `length`th, that led from `before` to `after`."""
        SET_STATE[self.env_id](self.env, before)
        observation, expected, ended, _, _ = self.env.step(action)
        assert reward == pytest.approx(expected, abs=1e-4)
        assert (terminated, truncated) == (ended, length == self.limit)
        if self.env_id != "Pendulum-v1" or abs(after[2]) < 8:  # its top speed is EnvPool's own
            np.testing.assert_allclose(after, observation, atol=1e-4)


@pytest.mark.parametrize("env_id", SET_STATE)
@settings(max_examples=10, deadline=None)
@example(limit=None, batches=1, batch_size=4, workers=None, seed=0)
@given(
    limit=st.none() | st.integers(1, 40),
    batches=st.integers(1, 3),
    batch_size=st.integers(1, 3),
    workers=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_step_is_gymnasiums(env_id, limit, batches, batch_size, workers, seed):
    n = batches * batch_size
    kwargs = {} if limit is None else {"max_episode_steps": limit}
    envs = EnvPoolVectorEnv(
        env_id, n, seed=seed, num_workers=workers, batch_size=batch_size, env_kwargs=kwargs
    )
    envs.action_space.seed(seed)
    oracle = Oracle(env_id, envs.spec.max_episode_steps)
    before, lengths = envs.reset()[0].copy(), np.zeros(n, int)
    actions = envs.action_space.sample()
    envs.send(actions)
    seen = np.zeros(n, int)
    while seen.min() < 60:
        after, rewards, terminations, truncations, infos = envs.recv()
        ids = infos.get("env_id", np.arange(n))
        valid = infos.get("valid", np.ones(len(ids), bool))
        finals = infos.get("final_obs", [None] * len(ids))
        for k, i in enumerate(ids):
            if valid[k]:
                lengths[i] += 1
                own = after[k] if finals[k] is None else finals[k]
                result = rewards[k], terminations[k], truncations[k]
                oracle.check(before[i], lengths[i], actions[i], own, *result)
            if terminations[k] or truncations[k] or not valid[k]:
                lengths[i] = 0
        before[ids] = after
        seen[ids] += 1
        actions[ids] = envs.action_space.sample()[ids]
        envs.send(actions[ids], ids)
    envs.close()
