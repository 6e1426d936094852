"""From what a user calls an environment to a `CompiledEnv`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from gymnasium.envs.registration import EnvSpec

from starling.envs.auto import jax_version
from starling.envs.compiled import BatchedEnv, CompiledEnv
from starling.envs.envpool_registry import envpool_ids
from starling.envs.factories import CallableFactory, EnvPoolFactory, env_factory, env_name
from starling.envs.legacy import is_jax_env
from starling.errors import UserError
from starling.options import did_you_mean


def make_compiled(
    env: Any,
    num_envs: int,
    env_kwargs: dict[str, Any] | None = None,
    num_workers: int | None = None,
) -> CompiledEnv:
    """Makes N environments that can be stepped inside a program.

    Args:
        env: The id of a Gymnasium environment that has a JAX version here (CartPole-v1,
            Pendulum-v1); another id that EnvPool has; `"gymnax:Id"` or `"brax:name"`; a `JaxEnv`,
            or `"module:callable"` or a callable that makes one. A `CompiledEnv` stays as it is.
        num_envs: N.
        env_kwargs: Arguments for making it.
        num_workers: EnvPool's threads; by default as many as pay.

    Raises:
        UserError: There is no such environment, or it cannot be part of a program.
        MissingExtraError: A package that it needs is not installed.
    """
    kwargs = dict(env_kwargs or {})
    if is_jax_env(env):
        if kwargs:
            raise UserError(f"{env_name(env)} is made already, so env_kwargs cannot be given")
        return _compiled(env, num_envs)
    factory = env_factory(env)
    path = jax_version(getattr(factory, "spec", None))
    if path is not None:
        return _compiled(_ours(path, factory.name, kwargs), num_envs)
    if isinstance(factory, CallableFactory):
        env_factory(env, kwargs)  # refuses arguments that it does not take
        return _compiled(factory.function(**factory.kwargs, **kwargs), num_envs)
    named = isinstance(env, str | EnvSpec)
    if isinstance(factory, EnvPoolFactory) or (named and factory.name in envpool_ids()):
        from starling.envs.compiled_envpool import XlaEnvPool

        return XlaEnvPool(factory.name, num_envs, kwargs, num_workers)
    raise UserError(
        f"{factory.name} cannot be part of a compiled program: there is no JAX version of it as it "
        "is, and EnvPool makes environments from ids of its own only; use another backend, or auto"
    )


def _ours(path: str, name: str, kwargs: dict[str, Any]) -> Any:
    module, _, attribute = path.partition(":")
    make = getattr(importlib.import_module(module), attribute)
    takes = list(inspect.signature(make).parameters)
    wrong = [key for key in kwargs if key not in takes]
    if wrong:
        hint = did_you_mean(wrong[0], takes)
        raise UserError(f"the JAX version of {name} takes no argument {wrong[0]!r}: {hint}")
    return make(**kwargs)


def _compiled(made: Any, num_envs: int) -> CompiledEnv:
    if not is_jax_env(made):
        raise UserError(
            f"{type(made).__name__} cannot be part of a compiled program: it would have to be "
            "written in JAX, with reset(key) and step(state, action)"
        )
    own = getattr(made, "num_envs", None)
    if own is None:
        return BatchedEnv(made, num_envs)
    if own != num_envs:
        raise UserError(f"num_envs is {num_envs}, but the {type(made).__name__} has {own}")
    return made
