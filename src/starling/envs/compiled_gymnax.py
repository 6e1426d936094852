"""gymnax's environments: `"gymnax:Id"`, or an object of its interface in a `GymnaxEnv`."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import jax
import numpy as np

from starling.envs.compiled import State, Tree
from starling.errors import MissingExtraError, UserError
from starling.options import did_you_mean


class GymnaxEnv:
    """One of gymnax's environments (1.0 or later) as a `JaxEnv`.

    An episode that its `is_truncated` ends is truncated, as gymnax's own `step` has it; that
    `step` is not used, since it resets in every step.
    """

    def __init__(self, env: Any, params: Any = None):
        """Takes over an environment.

        Args:
            env: A `gymnax.environments.environment.Environment`.
            params: Its parameters, `env.default_params` if they are left out.
        """
        self._env = env
        self._params = params = env.default_params if params is None else params
        self.observation_space = _space(env.observation_space(params))
        self.action_space = _space(env.action_space(params))

    def reset(self, key: jax.Array) -> tuple[State, Tree]:
        """Starts an episode."""
        next_key, key = jax.random.split(key)
        observation, state = self._env.reset_env(key, self._params)
        return (state, next_key), observation

    def step(self, state: State, action: Tree) -> tuple[State, Tree, Any, Any, Any]:
        """Steps; the state holds a key, as gymnax's steps take one each."""
        before, key = state
        next_key, key = jax.random.split(key)
        observation, after, reward, terminated, _ = self._env.step_env(
            key, before, action, self._params
        )
        truncated = self._env.is_truncated(after, self._params)
        return (after, next_key), observation, reward, terminated, truncated


def make(env_id: str, **env_kwargs: Any) -> GymnaxEnv:
    """Makes one of gymnax's environments.

    Args:
        env_id: An id of `gymnax.registered_envs`.
        env_kwargs: Fields of its parameters, `max_episode_steps`, or arguments of its class.

    Raises:
        MissingExtraError: gymnax is not installed.
        UserError: It has no such environment, or does not take the arguments.
    """
    try:
        import gymnax
    except ImportError as error:
        raise MissingExtraError(
            f"gymnax:{env_id} needs the package gymnax: pip install 'starling-rl[gymnax]' ({error})"
        ) from error
    known = gymnax.registered_envs
    if env_id not in known:
        raise UserError(f"gymnax has no environment {env_id!r}: {did_you_mean(env_id, known)}")
    if "max_episode_steps" in env_kwargs:
        env_kwargs["max_steps_in_episode"] = env_kwargs.pop("max_episode_steps")
    _, params = gymnax.make(env_id)
    fields = {field.name for field in dataclasses.fields(params)}
    for_class = {key: value for key, value in env_kwargs.items() if key not in fields}
    try:
        env, params = gymnax.make(env_id, **for_class)
    except TypeError as error:
        wrong = next(iter(for_class))
        hint = did_you_mean(wrong, sorted(fields))
        raise UserError(f"gymnax's {env_id} takes no argument {wrong!r}: {hint}") from error
    for_params = {key: value for key, value in env_kwargs.items() if key in fields}
    return GymnaxEnv(env, dataclasses.replace(params, **for_params))


def _space(space: Any) -> gym.Space:
    """Gymnasium's space for one of gymnax's, which are classes of their own."""
    if hasattr(space, "n"):
        return gym.spaces.Discrete(int(space.n))
    if hasattr(space, "low"):
        dtype = np.dtype(space.dtype)
        low, high = (np.broadcast_to(x, space.shape) for x in (space.low, space.high))
        return gym.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype.type)
    if isinstance(getattr(space, "spaces", None), dict):
        return gym.spaces.Dict({key: _space(sub) for key, sub in space.spaces.items()})
    if hasattr(space, "spaces"):
        return gym.spaces.Tuple([_space(sub) for sub in space.spaces])
    raise UserError(f"gymnax's space {space!r} has no counterpart in Gymnasium")
