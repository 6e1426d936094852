"""Brax's environments: `"brax:name"`, or an object of its interface in a `BraxEnv`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from starling.envs.compiled import State, Tree
from starling.errors import MissingExtraError, UserError
from starling.options import did_you_mean


class BraxEnv:
    """One of Brax's environments as a `JaxEnv`.

    Its `done` is a termination. The limit of steps, which Brax leaves to a wrapper, truncates.
    """

    def __init__(self, env: Any, max_episode_steps: int = 1000):
        """Takes over an environment without wrappers.

        Args:
            env: A `brax.envs.Env`.
            max_episode_steps: Steps after which an episode is truncated.
        """
        self._env, self._limit = env, max_episode_steps
        shapes = jax.eval_shape(env.reset, jax.random.key(0)).obs
        self.observation_space = _space(shapes)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (int(env.action_size),), np.float32)

    def reset(self, key: jax.Array) -> tuple[State, Tree]:
        """Starts an episode."""
        state = self._env.reset(key)
        return (state, jnp.int32(0)), state.obs

    def step(self, state: State, action: Tree) -> tuple[State, Tree, Any, Any, Any]:
        """Steps."""
        before, steps = state
        after = self._env.step(before, action)
        ends = after.done > 0, steps + 1 >= self._limit
        return (after, steps + 1), after.obs, after.reward, *ends


def make(env_id: str, **env_kwargs: Any) -> BraxEnv:
    """Makes one of Brax's environments.

    Args:
        env_id: Its name, such as `ant`.
        env_kwargs: `max_episode_steps`, and arguments of its class, such as `backend`.

    Raises:
        MissingExtraError: Brax is not installed.
        UserError: It has no such environment, or does not take the arguments.
    """
    try:
        from brax import envs
    except ImportError as error:
        raise MissingExtraError(
            f"brax:{env_id} needs the package brax: pip install 'starling-rl[brax]' ({error})"
        ) from error
    limit = env_kwargs.pop("max_episode_steps", 1000)
    try:
        env = envs.get_environment(env_id, **env_kwargs)
    except KeyError as error:
        hint = did_you_mean(env_id, sorted(envs._envs))
        raise UserError(f"Brax has no environment {env_id!r}: {hint}") from error
    except TypeError as error:
        raise UserError(f"Brax cannot make {env_id} with {env_kwargs}: {error}") from error
    return BraxEnv(env, limit)


def _space(shapes: Any) -> gym.Space:
    """Boxes without bounds, nested as the observation is."""
    if hasattr(shapes, "items"):
        return gym.spaces.Dict({key: _space(sub) for key, sub in shapes.items()})
    return gym.spaces.Box(-np.inf, np.inf, shapes.shape, np.float32)
