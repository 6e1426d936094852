"""Pendulum-v1 in JAX: swing a pendulum up and hold it there."""

from __future__ import annotations

import math
from typing import NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from starling.envs.compiled import limited_spec

GRAVITY, MASS, LENGTH = 10.0, 1.0, 1.0
TIME_STEP = 0.05  # seconds
TOP_SPEED, TOP_TORQUE = 8.0, 2.0
START = (math.pi, 1.0)  # first angle and speed lie within these of 0


class PendulumState(NamedTuple):
    """Angle (0 is upright, from -pi to pi), turning speed, steps so far."""

    angle: jax.Array
    speed: jax.Array
    steps: jax.Array


class Pendulum:
    """A rod that hangs from one end and is turned by a torque too weak to lift it straight up.

    With angle q and torque u, of a rod of mass m and length l:

        q'' = 3 g / (2 l) sin q + 3 / (m l^2) u

    The speed is updated first and limited, and the angle moves by the new speed. A step costs
    q^2 + 0.1 q'^2 + 0.001 u^2, of the state before it.
    """

    def __init__(self, max_episode_steps: int = 200):
        """Episodes are truncated after `max_episode_steps`; they never terminate."""
        high = np.array([1, 1, TOP_SPEED], np.float32)
        self.observation_space = gym.spaces.Box(-high, high, dtype=np.float32)
        self.action_space = gym.spaces.Box(-TOP_TORQUE, TOP_TORQUE, (1,), np.float32)
        self.spec = limited_spec("Pendulum-v1", max_episode_steps)
        self._limit = max_episode_steps

    def reset(self, key: jax.Array) -> tuple[PendulumState, jax.Array]:
        """Starts anywhere, turning slowly."""
        angle, speed = jax.random.uniform(key, (2,), jnp.float32, -1, 1) * jnp.array(START)
        state = PendulumState(angle, speed, jnp.int32(0))
        return state, _observation(state)

    def step(
        self, state: PendulumState, action: jax.Array
    ) -> tuple[PendulumState, jax.Array, jax.Array, bool, jax.Array]:
        """Turns by a torque, which is limited to 2."""
        torque = jnp.clip(action[0], -TOP_TORQUE, TOP_TORQUE)
        cost = state.angle**2 + 0.1 * state.speed**2 + 0.001 * torque**2
        rate = 3 * GRAVITY / (2 * LENGTH) * jnp.sin(state.angle) + 3 / (MASS * LENGTH**2) * torque
        speed = jnp.clip(state.speed + TIME_STEP * rate, -TOP_SPEED, TOP_SPEED)
        # kept between -pi and pi, where float32 is exact enough
        angle = state.angle + TIME_STEP * speed
        angle = angle - 2 * math.pi * jnp.floor(angle / (2 * math.pi) + 0.5)
        after = PendulumState(angle, speed, state.steps + 1)
        return after, _observation(after), -cost, False, after.steps >= self._limit


def _observation(state: PendulumState) -> jax.Array:
    return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.speed])
