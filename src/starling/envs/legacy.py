"""Environments written for other interfaces than Gymnasium's, made to answer as its do.

The older interfaces: `reset` returns only the observation, `step` returns `(observation, reward,
done, info)` with `info["TimeLimit.truncated"]`, seeds go through `env.seed(seed)`, spaces are
`gym.spaces`. Nothing has to be said about an environment: what it returns tells. And those
written in JAX, whose `step` takes a state besides the action.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from starling.errors import UserError


def modernize(env: Any) -> gym.Env:
    """Returns the environment itself if it is a Gymnasium one, else an adapter around it.

    A Gymnasium environment that returns what older ones did is patched in place, in the layers
    that the user wrote. For one that is up to date the patches are gone after the first step.

    Raises:
        UserError: It has no `reset`, `step` or spaces.
    """
    _check_is_env(env)
    if is_jax_env(env):
        from starling.envs.compiled_single import CompiledSingleEnv

        return CompiledSingleEnv(env)
    if not isinstance(env, gym.Env):
        return LegacyEnv(env)
    for layer in _outer_user_layers(env):
        _patch(layer)
    return env


def is_jax_env(env: Any) -> bool:
    """Whether it is an environment as `starling.envs.compiled.JaxEnv` describes it."""
    return not isinstance(env, gym.Env | type) and _arguments_of_step(env) == 2  # state, action


def is_jax_class(made_by: Any) -> bool:
    """Whether it is a class of such environments."""
    if not isinstance(made_by, type) or issubclass(made_by, gym.Env):
        return False
    return _arguments_of_step(made_by) == 3  # self, state and action


def _arguments_of_step(env: Any) -> int:
    """How many arguments its `step` has to be given; 0 if it is no environment."""
    step = getattr(env, "step", None)
    if not callable(step) or not hasattr(env, "reset"):
        return 0
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return 0
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _check_is_env(env: Any) -> None:
    needed = ("reset", "step", "observation_space", "action_space")
    missing = [name for name in needed if not hasattr(env, name)]
    if missing:
        raise UserError(
            f"{type(env).__name__} is no environment: it has no {' and no '.join(missing)}"
        )


def converted_methods(env: gym.Env) -> list[str]:
    """Which of `reset` and `step` an environment made by `modernize` has in an older form.

    It has to have been reset and stepped: what the methods return tells.
    """
    found: list[str] = []
    layer: Any = env
    while True:
        patches = (name for name in ("reset", "step") if name in vars(layer))
        found += [
            name for name in patches if getattr(vars(layer)[name], "__module__", "") == __name__
        ]
        if not isinstance(layer, gym.Wrapper):
            return found
        layer = layer.env


class LegacyEnv(gym.Env):
    """A Gymnasium view of an environment that does not derive from `gymnasium.Env`.

    Attributes that Gymnasium does not know are those of the environment itself.
    """

    def __init__(self, env: Any):
        """Wraps `env`, an object with `reset`, `step`, `observation_space` and `action_space`."""
        self.env = env
        self.observation_space = modern_space(env.observation_space)
        self.action_space = modern_space(env.action_space)
        self.metadata = {"render_modes": [], **(getattr(env, "metadata", None) or {})}
        self.render_mode = getattr(env, "render_mode", None)
        self._reset_env = _modern_reset(env, env.reset, self.observation_space)
        self._step_env = env.step

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Starts an episode; the seed reaches the environment in the way it has for it."""
        return self._reset_env(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Steps; `done` becomes terminated or, where a time limit ended the episode, truncated."""
        return _modern_step(self._step_env(action))

    def render(self) -> Any:
        """Renders; a `mode` argument of the older interface gets the render mode."""
        if "mode" in inspect.signature(self.env.render).parameters:
            return self.env.render(mode=self.render_mode or "rgb_array")
        return self.env.render()

    def close(self) -> None:
        """Closes the environment, where it can be."""
        if hasattr(self.env, "close"):
            self.env.close()

    def __getattr__(self, name: str) -> Any:
        if name == "env" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.env, name)


# ---- patches


def _outer_user_layers(env: gym.Env) -> list[gym.Env]:
    """The user's own classes in a stack of wrappers; of neighbours only the outermost.

    Neighbours understand one another already; Gymnasium's wrappers and Starling expect the
    present interface.
    """
    found = []
    above_is_users = False
    layer: Any = env
    while True:
        users = not type(layer).__module__.startswith(("gymnasium.", "starling."))
        if users and not above_is_users:
            found.append(layer)
        above_is_users = users
        if not isinstance(layer, gym.Wrapper):
            return found
        layer = layer.env


def _patch(env: gym.Env) -> None:
    """Puts a check in front of `reset` and `step`, for the first call or, where needed, for good.

    Instance attributes hide the methods, so that wrappers around the environment find them.
    """
    reset, step = env.reset, env.step
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name), spaces.Space):
            setattr(env, name, modern_space(getattr(env, name)))
    space = env.observation_space
    modern_reset = _modern_reset(env, reset, space)
    looks_modern = _takes(reset, "seed") and _takes(reset, "options")

    def first_reset(*, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if not looks_modern:
            return modern_reset(seed=seed, options=options)
        result = reset(seed=seed, options=options)
        if _is_modern_reset(result, space):
            _unpatch(env, "reset", reset)
            return result
        return result, {}

    def first_step(action: Any) -> tuple:
        result = step(action)
        modern = _modern_step(result)
        if modern is result:
            _unpatch(env, "step", step)
        return modern

    vars(env).update(reset=first_reset, step=first_step)


def _unpatch(env: gym.Env, name: str, original: Callable) -> None:
    vars(env).pop(name, None)
    if getattr(env, name) != original:  # it was an attribute of this instance before
        setattr(env, name, original)


def _modern_reset(env: Any, reset: Callable, space: spaces.Space) -> Callable[..., tuple]:
    """`reset(seed=, options=)` that returns `(observation, info)`, whatever `reset` is."""
    accepted = [name for name in ("seed", "options") if _takes(reset, name)]

    def modern_reset(*, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if seed is not None and "seed" not in accepted:
            _seed(env, seed)
        given = {"seed": seed, "options": options}
        result = reset(**{name: given[name] for name in accepted})
        return result if _is_modern_reset(result, space) else (result, {})

    return modern_reset


def _takes(function: Callable, name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _seed(env: Any, seed: int) -> None:
    if callable(getattr(env, "seed", None)):
        env.seed(seed)
    elif isinstance(env, gym.Env):
        gym.Env.reset(env.unwrapped, seed=seed)  # what super().reset(seed=seed) would have done


def _is_modern_reset(result: Any, space: spaces.Space) -> bool:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        return False
    # an observation may itself be a pair that ends in a dictionary
    return not (isinstance(space, spaces.Tuple) and space.contains(result))


def _modern_step(result: tuple) -> tuple[Any, Any, bool, bool, dict]:
    if not isinstance(result, tuple | list) or len(result) not in (4, 5):
        got = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise UserError(
            f"step() returned {got}; return (observation, reward, terminated, truncated, info)"
        )
    if len(result) == 5:
        return result
    observation, reward, done, info = result
    truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
    return observation, reward, bool(done) and not truncated, truncated, info


# ---- spaces


def modern_space(space: Any) -> spaces.Space:
    """Converts a space of the older `gym` package, known by its class's name, to Gymnasium's.

    Raises:
        UserError: There is no counterpart.
    """
    if isinstance(space, spaces.Space):
        return space
    kind = next((c.__name__ for c in type(space).__mro__ if c.__name__ in _CONVERSIONS), None)
    if kind is None:
        raise UserError(
            f"{type(space).__name__} is no space that can be handled; use those of gymnasium.spaces"
        )
    return _CONVERSIONS[kind](space)


_CONVERSIONS: dict[str, Callable[[Any], spaces.Space]] = {
    "Box": lambda s: spaces.Box(
        np.asarray(s.low, s.dtype), np.asarray(s.high, s.dtype), dtype=np.dtype(s.dtype).type
    ),
    "Discrete": lambda s: spaces.Discrete(int(s.n), start=int(getattr(s, "start", 0))),
    "MultiDiscrete": lambda s: spaces.MultiDiscrete(np.asarray(s.nvec)),
    "MultiBinary": lambda s: spaces.MultiBinary(s.n),
    "Dict": lambda s: spaces.Dict({key: modern_space(sub) for key, sub in s.spaces.items()}),
    "Tuple": lambda s: spaces.Tuple([modern_space(sub) for sub in s.spaces]),
}
