"""From what a user calls an environment to a function that makes one, at will and in any process.

Ids are looked up here, in the caller's process, so that environments registered by the caller's
script can be made by workers, which never see that script run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import VectorEnv as GymnasiumVectorEnv

from starling.envs.copies import pack, unpack
from starling.envs.envpool_registry import envpool_ids
from starling.envs.legacy import LegacyEnv, modernize
from starling.errors import MissingExtraError, UserError, in_a_line
from starling.options import did_you_mean

# how the error about a missing package begins, or the module's name, and what brings it
_INSTALL = {
    "mujoco": "pip install 'starling-rl[mujoco]'",
    "box2d": "pip install swig, then pip install 'gymnasium[box2d]'",
    "ale": "pip install 'starling-rl[atari]'",
    "pygame": "pip install 'starling-rl[render]'",
    "cv2": "pip install opencv-python-headless",
}


# collections of environments written in JAX, and what makes one of an id of theirs
COLLECTIONS = {
    "gymnax": "starling.envs.compiled_gymnax:make",
    "brax": "starling.envs.compiled_brax:make",
}


def make_env(
    env: Any, env_kwargs: dict[str, Any] | None = None, render_mode: str | None = None
) -> gym.Env:
    """Makes one environment.

    Args:
        env: A Gymnasium id, `"module:Id"`, `"module:callable"`, a callable that makes an
            environment, or an environment, which is copied. An id that Gymnasium does not have,
            or cannot make here, is looked for in EnvPool. `"gymnax:Id"` and `"brax:name"` are
            made by those packages.
        env_kwargs: Arguments for making it; for ids `max_episode_steps` is one.
        render_mode: None, `"human"`, `"rgb_array"` or another that it knows.

    Raises:
        UserError: There is no such environment, or it does not take the arguments.
        MissingExtraError: A package that it needs is not installed.
    """
    return env_factory(env, env_kwargs, render_mode)()


def env_factory(
    env: Any, env_kwargs: dict[str, Any] | None = None, render_mode: str | None = None
) -> EnvFactory:
    """Turns what `make_env` takes into a function without arguments that makes it.

    The function can be sent to other processes by cloudpickle. See `make_env`.
    """
    kwargs = dict(env_kwargs or {})
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    if isinstance(env, EnvFactory):
        return replace(env, kwargs={**env.kwargs, **kwargs})
    if isinstance(env, str):
        return _factory_of_name(env, kwargs)
    if isinstance(env, EnvSpec):
        return _factory_of_spec(env, kwargs)
    if isinstance(env, GymnasiumVectorEnv):
        raise UserError(f"{type(env).__name__} is many environments; one is needed here")
    if isinstance(env, type) or (callable(env) and not hasattr(env, "step")):
        return _factory_of_callable(env, kwargs, getattr(env, "__name__", type(env).__name__))
    if hasattr(env, "reset") and hasattr(env, "step"):
        return _factory_of_instance(env, kwargs)
    raise UserError(
        f"env is {env!r}; give an id such as 'CartPole-v1', 'module:callable', "
        "a function that makes an environment, or an environment"
    )


def env_factories(
    env: Any, num_envs: int, env_kwargs: dict[str, Any] | None = None, first_env: int = 0
) -> list[EnvFactory]:
    """One factory per environment; copies of an instance draw by their index in the run."""
    factory = env_factory(env, env_kwargs)
    if isinstance(factory, CopyFactory):
        return [replace(factory, index=first_env + i) for i in range(num_envs)]
    return [factory] * num_envs


def env_name(env: Any) -> str:
    """What to call it in messages and in the names of files."""
    if isinstance(env, str):
        return env
    if isinstance(env, EnvFactory):
        return env.name
    spec = env if isinstance(env, EnvSpec) else getattr(env, "spec", None)
    if getattr(spec, "id", None):
        return spec.id  # type: ignore[union-attr]
    return getattr(env, "__name__", type(env).__name__)


# ---- factories


@dataclass(frozen=True)
class EnvFactory:
    """Makes environments when called.

    Attributes:
        name: What to call them.
        kwargs: Arguments for making one.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> gym.Env:
        """Makes an environment."""
        raise NotImplementedError


@dataclass(frozen=True)
class SpecFactory(EnvFactory):
    """Makes what a Gymnasium `EnvSpec` describes, without Gymnasium's checker."""

    spec: EnvSpec = field(default_factory=lambda: EnvSpec(""))

    def __call__(self) -> gym.Env:
        """Makes an environment, also if its class is of an older Gym's."""
        kwargs = {"disable_env_checker": True, **self.kwargs}
        try:
            return modernize(gym.make(self.spec, **kwargs))
        except TypeError as error:
            if "gymnasium.Env" not in str(error):
                raise
        spec = replace_entry_point(self.spec, _LegacyCreator(_loaded_creator(self.spec)))
        return gym.make(spec, **kwargs)


@dataclass(frozen=True)
class CallableFactory(EnvFactory):
    """Makes what a user's function or class returns."""

    function: Callable[..., Any] = dict

    def __call__(self) -> gym.Env:
        """Makes an environment."""
        return modernize(self.function(**self.kwargs))


@dataclass(frozen=True)
class EnvPoolFactory(EnvFactory):
    """Makes a `gymnasium.Env` of one of EnvPool's."""

    def __call__(self) -> gym.Env:
        """Makes an environment."""
        from starling.envs.envpool_single import EnvPoolEnv

        if self.kwargs.get("render_mode") != "human":
            return EnvPoolEnv(self.name, **self.kwargs)
        kwargs = {**self.kwargs, "render_mode": "rgb_array"}
        return gym.wrappers.HumanRendering(EnvPoolEnv(self.name, **kwargs))


@dataclass(frozen=True)
class CopyFactory(EnvFactory):
    """Makes copies of an environment that has no usable spec.

    Attributes:
        pickled: The environment, as `pack` gave it.
        index: Copies with different indices have random streams of their own.
    """

    pickled: bytes = b""
    index: int = 0

    def __call__(self) -> gym.Env:
        """Makes a copy."""
        return modernize(unpack(self.pickled, self.index))


@dataclass(frozen=True)
class _LegacyCreator:
    """Entry point that gives `gymnasium.make` an environment of an older Gym's class."""

    creator: Any

    @property
    def metadata(self) -> dict[str, Any]:
        return getattr(self.creator, "metadata", {"render_modes": []})

    def __call__(self, **kwargs: Any) -> gym.Env:
        return LegacyEnv(self.creator(**kwargs))


def replace_entry_point(spec: EnvSpec, entry_point: Any) -> EnvSpec:
    """A copy of a spec that is made by something else."""
    copied = EnvSpec.__new__(EnvSpec)
    copied.__dict__.update(vars(spec), entry_point=entry_point)
    return copied


# ---- names


def _factory_of_name(name: str, kwargs: dict[str, Any]) -> EnvFactory:
    env_id = name
    if ":" in name:
        module_name, _, env_id = name.partition(":")
        if module_name in COLLECTIONS:
            return _factory_of_collection(module_name, env_id, kwargs)
        module = _imported(module_name, name)
        if env_id not in gym.registry:
            function = module
            for part in env_id.split("."):
                function = getattr(function, part, None)
            if callable(function):
                return _factory_of_callable(function, kwargs, name)
    spec = _registered(env_id)
    if spec is None and env_id in envpool_ids():
        return EnvPoolFactory(env_id, kwargs)
    if spec is None:
        raise UserError(_unknown_name(name, env_id))
    return _factory_of_spec(spec, kwargs)


def _factory_of_collection(name: str, env_id: str, kwargs: dict[str, Any]) -> EnvFactory:
    path, _, attribute = COLLECTIONS[name].partition(":")
    make = getattr(importlib.import_module(path), attribute)
    return CallableFactory(f"{name}:{env_id}", {**kwargs, "env_id": env_id}, make)


def _imported(module_name: str, name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise MissingExtraError(f"env {name!r}: importing it failed: {error}") from error
    if os.getcwd() not in sys.path:  # a command's first entry is the folder that it lies in
        sys.path.insert(0, os.getcwd())
        return _imported(module_name, name)
    raise UserError(
        f"env {name!r}: there is no module {module_name!r}; "
        "start from the folder that holds it, or install its package"
    )


def _registered(env_id: str) -> EnvSpec | None:
    """The spec of an id; of the highest version where the id names none."""
    if env_id not in gym.registry and _is_ale(env_id) and importlib.util.find_spec("ale_py"):
        importlib.import_module("ale_py")  # registers its environments
    if env_id in gym.registry:
        return gym.registry[env_id]
    versions = [
        spec
        for spec in gym.registry.values()
        if spec.version is not None and spec.id == f"{env_id}-v{spec.version}"
    ]
    return max(versions, key=lambda spec: spec.version, default=None)  # type: ignore[arg-type,return-value]


def _is_ale(env_id: str) -> bool:
    return env_id.startswith("ALE/") or "NoFrameskip-v" in env_id


def _unknown_name(name: str, env_id: str) -> str:
    if _is_ale(env_id):
        return (
            f"{name} needs the package ale-py: pip install 'starling-rl[atari]' "
            "(EnvPool's Atari games, such as Pong-v5, need nothing)"
        )
    if ":" in name:
        module, _, wanted = name.partition(":")
        return f"module {module!r} has no {wanted!r}, and registers no environment of that id"
    hint = did_you_mean(env_id, sorted({*gym.registry, *envpool_ids()}))
    if not hint.startswith("did"):
        hint = "for one of your own, import the module that registers it, or give 'module:callable'"
    return f"there is no environment {name!r}: {hint}"


# ---- specs, callables and instances


def _factory_of_spec(spec: EnvSpec, kwargs: dict[str, Any]) -> EnvFactory:
    try:
        creator = _loaded_creator(spec)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        if spec.id in envpool_ids():
            return EnvPoolFactory(spec.id, kwargs)
        raise MissingExtraError(_missing(spec.id, error)) from error
    if creator is None:
        raise UserError(f"{spec.id} is registered without an entry point, so it cannot be made")
    if str(spec.entry_point).startswith("__main__:"):  # workers have another __main__
        spec = replace_entry_point(spec, creator)
    _check_arguments(spec.id, creator, kwargs, ("max_episode_steps", "disable_env_checker"))
    limit = kwargs.get("max_episode_steps")
    if limit is not None and limit != -1 and not limit >= 1:  # -1 is Gymnasium's for no limit
        raise UserError(f"max_episode_steps is {limit}; it must be at least 1")
    if kwargs.get("render_mode") is not None:
        _prepare_rendering(spec)
    return SpecFactory(spec.id, kwargs, spec)


def _loaded_creator(spec: EnvSpec) -> Callable[..., Any] | None:
    entry_point = spec.entry_point
    if isinstance(entry_point, str):
        return load_env_creator(entry_point)
    if getattr(entry_point, "__name__", "").startswith("_raise_"):
        entry_point()  # type: ignore[misc] - how Gymnasium registers what has moved elsewhere
    return entry_point


def _missing(what: str, error: Exception) -> str:
    reason = in_a_line(error)
    if isinstance(error, ModuleNotFoundError | gym.error.DependencyNotInstalled):
        missing = (getattr(error, "name", None) or reason).lower()
        for start, command in _INSTALL.items():
            if missing.startswith(start):
                return f"{what} needs a package that is not installed: {command}"
    return f"{what} cannot be made here: {reason}"


def _check_arguments(
    name: str, creator: Callable[..., Any], kwargs: dict[str, Any], also: Sequence[str] = ()
) -> None:
    try:
        parameters = inspect.signature(creator).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    wrong = [key for key in kwargs if key not in parameters and key not in also]
    if not wrong:
        return
    if wrong[0] == "render_mode":
        raise UserError(f"{name} cannot be rendered: it takes no argument 'render_mode'")
    takes = [key for key in parameters if key != "self"] + list(also[:1])
    raise UserError(f"{name} takes no argument {wrong[0]!r}: {did_you_mean(wrong[0], takes)}")


def _prepare_rendering(spec: EnvSpec) -> None:
    entry_point = str(spec.entry_point)
    if entry_point.startswith("gymnasium.envs.mujoco"):
        headless = not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
        if headless and sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")
    elif entry_point.startswith("gymnasium.envs.") and not importlib.util.find_spec("pygame"):
        raise MissingExtraError(
            f"drawing {spec.id} needs pygame: pip install 'starling-rl[render]'"
        )


def _factory_of_callable(
    function: Callable[..., Any], kwargs: dict[str, Any], name: str
) -> EnvFactory:
    _check_arguments(name, function, kwargs)
    return CallableFactory(name, kwargs, function)


def _factory_of_instance(env: Any, kwargs: dict[str, Any]) -> EnvFactory:
    spec = getattr(env, "spec", None)
    if isinstance(spec, EnvSpec) and spec.entry_point is not None:
        wrappers = spec.additional_wrappers
        own = [w for w in wrappers if w.kwargs is None or w.entry_point.startswith("__main__:")]
        if not own:
            return _factory_of_spec(spec, kwargs)
    name = env_name(env)
    if kwargs:
        raise UserError(
            f"{name} is an environment without a spec, so it takes no arguments; "
            "give a function that makes it"
        )
    try:
        pickled = pack(env)
    except Exception as error:
        raise UserError(
            f"{name} cannot be copied ({error}); give a function that makes it"
        ) from error
    return CopyFactory(name, {}, pickled)
