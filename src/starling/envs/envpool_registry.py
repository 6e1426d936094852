"""What EnvPool has, and what Starling needs to know of one of its tasks before it is made."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from starling.envs.worker_count import usable_cores
from starling.errors import MissingExtraError, UserError, in_a_line
from starling.options import did_you_mean

_CHEAP = ("classic_control", "toy_text")
# In these families the step limit does nothing but end the episode, so Starling counts it itself
# and can tell an episode that terminated in its very last step from one that was cut off.
_COUNTABLE = (*_CHEAP, "box2d", "mujoco.gym")
_NO_LIMIT = 2**31 - 1
# arguments of the pool, which have other names here
_POOLS_OWN = {
    *("num_envs", "batch_size", "num_threads", "max_num_players", "thread_affinity_offset"),
    *("base_path", "seed", "env_seed", "gym_reset_return_info", "reward_threshold"),
}


@functools.cache
def envpool_ids() -> frozenset[str]:
    """All ids that EnvPool has; none where it is not installed. Importing it takes a second."""
    if importlib.util.find_spec("envpool") is None:
        return frozenset()
    with quiet():
        import envpool

        return frozenset(envpool.list_all_envs())


class Task:
    """One of EnvPool's environments, described without making it.

    Attributes:
        env_id: Its id.
        family: Module of EnvPool that it comes from, such as `classic_control` or `mujoco.gym`.
        observation_space: Space of one observation, as the data are.
        action_space: Space of one action, in the types that Gymnasium uses.
        action_dtype: What EnvPool reads actions as.
        state_keys: Names of the arrays that make up a batch.
        limit: Steps after which an episode is cut off, or None.
        counts_steps: Whether Starling does the cutting off.
        render_mode: None or `"rgb_array"`.
        spec: A Gymnasium `EnvSpec`, whose `make` gives an `EnvPoolEnv`.
    """

    def __init__(self, env_id: str, env_kwargs: dict[str, Any] | None = None):
        """Looks the environment up.

        Raises:
            UserError: EnvPool lacks it, does not know an argument, or cannot render it here.
        """
        if env_id not in envpool_ids():
            raise UserError(_unknown(env_id))
        from envpool.registration import registry

        self.env_id = env_id
        self.family = registry.specs[env_id][0].removeprefix("envpool.")
        self.options = dict(env_kwargs or {})
        self.render_mode: str | None = self.options.get("render_mode")
        if self.render_mode is not None:
            _check_can_render(self, self.render_mode)
        given_limit = self.options.pop("max_episode_steps", None)
        spec, observations, actions = self._read()
        if len(spec._action_keys) != 3 or spec.config.max_num_players > 1:
            raise UserError(f"{env_id} is for several players, which cannot be trained here")
        self.observation_space = _true_bounds(observations)
        self.action_space = _float32_box(actions)
        self.action_dtype = np.dtype(spec._action_spec[-1][0])
        self.state_keys = list(spec._state_keys)
        self.limit = _episode_limit(env_id, given_limit, int(spec.config.max_episode_steps))
        self.counts_steps = self.limit is not None and self.family in _COUNTABLE
        self.spec = EnvSpec(
            env_id,
            entry_point="starling.envs.envpool_single:EnvPoolEnv",
            max_episode_steps=self.limit,
            kwargs={**(env_kwargs or {}), "env_id": env_id},
        )

    def _read(self) -> tuple[Any, spaces.Space, spaces.Space]:
        import envpool

        self._check_options()
        try:
            with quiet():
                spec = envpool.make_spec(self.env_id, **self.options)
                return spec, spec.gymnasium_observation_space, spec.gymnasium_action_space
        except (ImportError, RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"EnvPool cannot make {self.env_id} here: {in_a_line(error)}"
            ) from error

    def _check_options(self) -> None:
        import envpool

        wrappers = {"render_mode", "render_width", "render_height", "render_camera_id"}
        wrong = sorted(set(self.options) - wrappers)
        if not wrong:
            return
        keys = {key.replace(".", "_") for key in envpool.make_spec(self.env_id)._config_keys}
        takes = sorted(keys - _POOLS_OWN)
        wrong = [key for key in wrong if key not in takes]
        if wrong:
            hint = did_you_mean(wrong[0], takes)
            raise UserError(f"EnvPool's {self.env_id} takes no argument {wrong[0]!r}: {hint}")

    def default_threads(self, num_envs: int) -> int:
        """Threads that pay: waking one costs as much as some 30 steps of a cheap environment."""
        useful = -(-num_envs // 32) if self.family in _CHEAP else num_envs
        return max(1, min(useful, usable_cores()))


def make_pool(
    task: Task, num_envs: int, batch_size: int, num_threads: int, seeds: Sequence[int]
) -> Any:
    """Makes EnvPool's own object: environment i is seeded by `seeds[i]`."""
    import envpool

    limit = {}
    if task.limit is not None:  # one more where Starling counts, so that EnvPool never cuts off
        limit["max_episode_steps"] = task.limit + task.counts_steps
    with quiet():
        return envpool.make_gymnasium(
            task.env_id,
            num_envs=num_envs,
            batch_size=batch_size,
            num_threads=num_threads,
            seed=[seed % 2**31 for seed in seeds],
            **limit,
            **task.options,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings about the precision of EnvPool's bounds, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unknown(env_id: str) -> str:
    if not envpool_ids():
        return "the backend envpool needs the package envpool: pip install envpool (Linux only)"
    hint = did_you_mean(env_id, sorted(envpool_ids()))
    near = f" ({hint});" if hint.startswith("did") else ";"
    return f"EnvPool has no environment {env_id!r}{near} use another backend for it, or auto"


def _true_bounds(space: Any) -> spaces.Space:
    """Repairs boxes without bounds, whose lower one EnvPool takes for the least positive float."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _true_bounds(sub) for key, sub in space.spaces.items()})
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        return space
    limits = np.finfo(space.dtype)  # type: ignore[arg-type]
    low = np.where(space.low == limits.tiny, -np.inf, space.low).astype(space.dtype)
    high = np.where(space.high == limits.max, np.inf, space.high).astype(space.dtype)
    return spaces.Box(low, high, dtype=space.dtype)  # type: ignore[arg-type]


def _float32_box(space: Any) -> spaces.Space:
    """Gymnasium's MuJoCo environments declare float32 actions: one policy fits both."""
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32))
    return space


def _episode_limit(env_id: str, given: int | None, own: int) -> int | None:
    """What the user says counts first, then what Gymnasium has registered, then EnvPool's own."""
    registered = gym.registry.get(env_id)
    if given is None and registered is not None:
        given = registered.max_episode_steps
    limit = own if given is None else given
    if limit < 1:
        raise UserError(f"max_episode_steps is {limit}; it must be at least 1")
    return None if limit >= _NO_LIMIT else limit


def _check_can_render(task: Task, render_mode: str) -> None:
    if render_mode != "rgb_array":
        raise UserError(f"EnvPool renders as 'rgb_array' only, not as {render_mode!r}")
    if task.family.startswith("mujoco"):  # it ends the process where it finds no OpenGL
        raise MissingExtraError(
            f"drawing {task.env_id} needs the package mujoco: pip install 'starling-rl[mujoco]'"
        )
