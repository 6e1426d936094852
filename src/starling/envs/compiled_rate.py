"""How many steps per second a program makes in compiled environments, policies left out."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
from gymnasium.vector.utils import batch_space

from starling.envs.compiled import CompiledEnv, CompiledStep, State

_STEPS = 64  # in a call of the program, with actions sampled beforehand


def steps_per_second(env: CompiledEnv, seconds: float, seed: int = 0) -> float:
    """Environment steps per second with random actions; rows that only reset are not counted.

    Args:
        env: The environments; they are reset.
        seconds: How long to step.
        seed: Of environments and actions.
    """
    space = batch_space(env.single_action_space, env.num_envs)
    space.seed(seed)
    actions = jax.tree.map(lambda *rows: jnp.stack(rows), *(space.sample() for _ in range(_STEPS)))

    def step(state: State, action: Any) -> tuple[State, CompiledStep]:
        return env.step(state, _allowed(env, action, env.action_mask(state)))

    run = jax.jit(lambda state: jax.lax.scan(step, state, actions))
    state, _ = (jax.jit(env.reset) if env.pure else env.reset)(jax.random.key(seed))
    state, _ = jax.block_until_ready(run(state))  # compiles
    steps, elapsed = 0, 0.0
    while elapsed < seconds:
        before = time.perf_counter()
        state, made = jax.block_until_ready(run(state))
        elapsed += time.perf_counter() - before
        steps += _STEPS * env.num_envs if made.valid is None else int(made.valid.sum())
    return steps / elapsed


def _allowed(env: CompiledEnv, action: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The first action from the random one on that the mask allows."""
    space = env.single_action_space
    if mask is None or not isinstance(space, gym.spaces.Discrete):
        return action
    chosen = action - int(space.start)
    order = (chosen[:, None] + jnp.arange(int(space.n))) % int(space.n)
    first = jnp.take_along_axis(mask, order, axis=1).argmax(axis=1)
    return jnp.take_along_axis(order, first[:, None], axis=1)[:, 0] + int(space.start)
