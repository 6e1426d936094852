"""CartPole-v1 in JAX: balance a pole on a cart by pushing the cart left or right."""

from __future__ import annotations

import math
from typing import NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from starling.envs.compiled import limited_spec

GRAVITY = 9.8
CART_MASS, POLE_MASS = 1.0, 0.1
TOTAL_MASS = CART_MASS + POLE_MASS
HALF_LENGTH = 0.5  # of the pole
FORCE = 10.0
TIME_STEP = 0.02  # seconds
FARTHEST = 2.4  # position of the cart at which the episode ends
STEEPEST = math.radians(12)  # angle of the pole at which it does
START = 0.05  # every part of the first state lies within this of 0


class CartPoleState(NamedTuple):
    """Position and speed of the cart, angle and turning speed of the pole, steps so far."""

    x: jax.Array
    speed: jax.Array
    angle: jax.Array
    turning: jax.Array
    steps: jax.Array


class CartPole:
    """The cart and pole of Barto, Sutton and Anderson (1983), as Gymnasium's CartPole-v1.

    With force F, cart x, pole angle q, masses m_c and m_p of cart and pole, m their sum and l half
    the pole's length:

        p   = (F + m_p l q'^2 sin q) / m
        q'' = (g sin q - p cos q) / (l (4/3 - m_p cos^2 q / m))
        x'' = p - m_p l q'' cos q / m

    integrated by Euler's method: positions move by the speed before the step.
    """

    def __init__(self, max_episode_steps: int = 500):
        """Episodes are truncated after `max_episode_steps`."""
        high = np.array([2 * FARTHEST, np.inf, 2 * STEEPEST, np.inf], np.float32)
        self.observation_space = gym.spaces.Box(-high, high, dtype=np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.spec = limited_spec("CartPole-v1", max_episode_steps)
        self._limit = max_episode_steps

    def reset(self, key: jax.Array) -> tuple[CartPoleState, jax.Array]:
        """Starts near the upright position."""
        start = jax.random.uniform(key, (4,), jnp.float32, -START, START)
        x, speed, angle, turning = start
        return CartPoleState(x, speed, angle, turning, jnp.int32(0)), start

    def step(
        self, state: CartPoleState, action: jax.Array
    ) -> tuple[CartPoleState, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Pushes left (0) or right (1); each step is worth 1."""
        x, speed, angle, turning, steps = state
        force = jnp.where(action == 1, FORCE, -FORCE)
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        push = (force + POLE_MASS * HALF_LENGTH * turning**2 * sine) / TOTAL_MASS
        inertia = HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / TOTAL_MASS)
        turning_rate = (GRAVITY * sine - push * cosine) / inertia
        speed_rate = push - POLE_MASS * HALF_LENGTH * turning_rate * cosine / TOTAL_MASS
        after = CartPoleState(
            x + TIME_STEP * speed,
            speed + TIME_STEP * speed_rate,
            angle + TIME_STEP * turning,
            turning + TIME_STEP * turning_rate,
            steps + 1,
        )
        terminated = (jnp.abs(after.x) > FARTHEST) | (jnp.abs(after.angle) > STEEPEST)
        truncated = after.steps >= self._limit
        return after, jnp.stack(after[:4]), jnp.float32(1), terminated, truncated
