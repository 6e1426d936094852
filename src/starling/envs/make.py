"""`make_vec`: N environments behind one `step`, by name of a backend."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from gymnasium.vector import VectorEnv as GymnasiumVectorEnv

from starling.envs.auto import choose_backend
from starling.envs.factories import env_factories, env_factory, env_name, make_env
from starling.envs.safety import OnEnvError, OnInvalidData, Safety
from starling.envs.vector_env import VectorEnv, checked_mode, is_same_step
from starling.errors import UserError
from starling.memory import available_memory
from starling.options import did_you_mean

__all__ = ["BACKENDS", "env_factory", "env_name", "make_env", "make_vec"]

# A new backend is one file and one line here. Its class takes what `ShardedVectorEnv` takes; one
# with `by_id = True` takes an id and `num_envs`, `env_kwargs` in place of the factories, and one
# with `by_name = True` has a method `of` that takes whatever the user calls the environment.
BACKENDS = {
    "serial": "starling.envs.serial:SerialVectorEnv",
    "thread": "starling.envs.thread:ThreadVectorEnv",
    "process": "starling.envs.process:ProcessVectorEnv",
    "envpool": "starling.envs.envpool:EnvPoolVectorEnv",
    "compiled": "starling.envs.compiled_vector:CompiledVectorEnv",
}
DEFAULT_NUM_ENVS = 8
_LEAST_MEMORY = 1 << 10  # bytes that an environment takes, whichever it is


def make_vec(
    env: Any,
    num_envs: int | None = None,
    backend: str = "auto",
    num_workers: int | None = None,
    seed: int | None = None,
    *,
    batch_size: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    infos: str = "final",
    copy: bool = True,
    episode_seeds: bool = False,
    step_timeout: float | None = None,
    require_timeout: bool = True,
    autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    compiled: bool = False,
    on_env_error: OnEnvError = "raise",
    max_restarts: int = 20,
    worker_max_rss: float | None = None,
    on_invalid_data: OnInvalidData = "raise",
    first_env: int = 0,
) -> VectorEnv:
    """Makes a vector environment that keeps the contract of `VectorEnv`.

    Args:
        env: What `make_env` takes: a Gymnasium id, `"module:callable"`, a function that makes an
            environment, or an environment to copy; also one that is written in JAX. Or any
            `gymnasium.vector.VectorEnv`, which is used as it is, whatever its autoreset mode.
        num_envs: N; 8 unless it is given.
        backend: `auto`, a key of `BACKENDS`, or `"module:Class"`. `auto` prints its choice and
            the reason to standard error.
        num_workers: Threads or processes, at most `num_envs`; by default the usable cores.
        seed: Seed of the first reset that is given none. Environment i gets a child seed of its
            own, and rollouts are the same for serial, thread and process.
        batch_size: Environments that one `recv` returns; all by default.
        env_kwargs: Arguments for making each environment; for ids `max_episode_steps` is one.
        infos: `"final"` delivers the infos of resets and of steps that ended an episode, `"all"`
            those of every step, which costs time.
        copy: Return copies. Without it, arrays are valid until the next `send` or `step`.
        episode_seeds: Seed every episode anew, so that `state` and `restore` can be used.
        step_timeout: Seconds that a step may take; no limit by default. It takes the backend
            `process`, which `auto` chooses then, or `thread`.
        require_timeout: Whether a `step_timeout` that the backend cannot keep is an error; else
            it has no effect there.
        autoreset_mode: `SAME_STEP`; `NEXT_STEP` is for Gymnasium's wrappers that want it.
        compiled: Whether `auto` may choose compiled environments where others can be had, since
            you step them inside a program, as Starling's trainers do.
        on_env_error: What an exception, a hung step or a dead worker process leads to: `raise`
            an error, `restart` the environment (or the worker, with all it has), `drop` it and
            go on with the others. A lost step is a truncation, and not `valid`.
        max_restarts: Failures within 100,000 environment steps that are borne.
        worker_max_rss: Megabytes of memory beyond which a worker process is replaced by a new
            one, whose episodes are truncated; no limit by default.
        on_invalid_data: What an observation or reward that is not finite, or too large for 32
            bits, leads to: `raise` an error, `replace` it by 0 or the nearest value that its space
            allows, `truncate` the episode, or `off`.
        first_env: Index of the first environment, where these are some of a run's: messages and
            errors give it, and copies of one environment draw different numbers by it.

    Returns:
        A vector environment; its `backend` says which it is.

    Raises:
        UserError: An unknown environment or backend, or arguments that do not go together.
        WorkerError: An environment could not be made.
    """
    safety = Safety(on_env_error, max_restarts, worker_max_rss, on_invalid_data, first_env)
    options = {
        "seed": seed,
        "num_workers": num_workers,
        "batch_size": batch_size,
        "infos": infos,
        "copy": copy,
        "episode_seeds": episode_seeds,
        "step_timeout": step_timeout,
        "autoreset_mode": autoreset_mode,
        "safety": safety,
    }
    if seed is not None and seed < 0:
        raise UserError(f"seed {seed} is negative; give a whole number from 0 up")
    timeout_needed = step_timeout is not None and require_timeout
    if isinstance(env, GymnasiumVectorEnv):
        options["timeout_needed"] = timeout_needed
        return _adapted(env, num_envs, backend, env_kwargs, options)
    n = DEFAULT_NUM_ENVS if num_envs is None else num_envs
    _check_count("num_envs", n)
    _check_memory(n)
    if num_workers is not None:
        _check_count("num_workers", num_workers)
    if backend == "auto":
        backend = auto_backend(
            env,
            n,
            num_workers,
            env_kwargs=env_kwargs,
            safety=safety,
            timeout_needed=timeout_needed,
            restricted=is_same_step(autoreset_mode)
            and not episode_seeds
            and infos == "final"
            and batch_size in (None, n),
            compiled=compiled,
        )
    backend_class = load_backend(backend)
    if timeout_needed and not getattr(backend_class, "keeps_timeouts", False):
        raise UserError(
            f"step_timeout cannot be kept by backend {backend}, whose steps nobody can interrupt: "
            "use backend process, or leave it out"
        )
    try:
        return _made(backend_class, backend, env, n, env_kwargs, options)
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        raise UserError(
            f"{n} environments need more memory than can be had{reason}; lower num_envs"
        ) from error


def auto_backend(
    env: Any,
    num_envs: int,
    num_workers: int | None,
    *,
    env_kwargs: dict[str, Any] | None,
    safety: Safety,
    timeout_needed: bool,
    restricted: bool,
    compiled: bool,
) -> str:
    """Says which backend `auto` is, here and on standard error.

    Args:
        env: As for `make_vec`.
        num_envs: Number of environments.
        num_workers: Workers, if they are given.
        env_kwargs: Arguments for making an environment.
        safety: What to do about faults.
        timeout_needed: Whether a time limit of steps has to be kept.
        restricted: Whether nothing else is asked for that envpool and compiled cannot do.
        compiled: As for `make_vec`.
    """
    if timeout_needed:
        backend, reason = "process", "it can keep a step_timeout"
    else:
        backend, reason = choose_backend(
            env,
            num_envs,
            num_workers=num_workers,
            env_kwargs=env_kwargs,
            restricted=restricted and not safety.recovers and safety.worker_max_rss is None,
            compiled=compiled,
        )
    print(f"starling: backend {backend}: {reason}", file=sys.stderr)
    return backend


def _made(
    backend_class: Any,
    backend: str,
    env: Any,
    n: int,
    env_kwargs: dict[str, Any] | None,
    options: dict[str, Any],
) -> VectorEnv:
    if getattr(backend_class, "by_name", False):
        return backend_class.of(env, n, env_kwargs=env_kwargs, **options)
    if getattr(backend_class, "by_id", False):
        if not isinstance(env, str | EnvSpec):
            raise UserError(
                f"backend {backend} makes environments from their ids; give one, or another backend"
            )
        return backend_class(env_name(env), n, env_kwargs=env_kwargs, **options)
    factories = env_factories(env, n, env_kwargs, options["safety"].first_env)
    return backend_class(factories, **options)


def load_backend(name: str) -> Any:
    """Imports the class of a backend.

    Raises:
        UserError: There is no such backend; the message names the nearest.
    """
    path = BACKENDS.get(name, name)
    if ":" not in path:
        raise UserError(f"unknown backend {name!r}: {did_you_mean(name, ['auto', *BACKENDS])}")
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"backend {name!r} cannot be imported: {error}") from error


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number from 1 up")


def _check_memory(n: int) -> None:
    """Refuses what would run out of memory half way, perhaps hours later."""
    available = available_memory()
    if available is not None and n * _LEAST_MEMORY > available:
        raise UserError(
            f"{n} environments need at least {n * _LEAST_MEMORY >> 20} MB of memory; "
            f"{available >> 20} MB are available: lower num_envs"
        )


def _adapted(
    env: GymnasiumVectorEnv,
    num_envs: int | None,
    backend: str,
    env_kwargs: dict[str, Any] | None,
    options: dict[str, Any],
) -> VectorEnv:
    """Wraps a vector environment of the user's, refusing what cannot be changed any more."""
    from starling.envs.adapter import VectorEnvAdapter

    name, mode = type(env).__name__, checked_mode(options["autoreset_mode"], False)
    if num_envs not in (None, env.num_envs):
        raise UserError(
            f"num_envs is {num_envs}, but the {name} has {env.num_envs} environments; "
            f"leave it out or give {env.num_envs}"
        )
    unchangeable = {
        "backend": backend != "auto",
        "num_workers": options["num_workers"] is not None,
        "env_kwargs": bool(env_kwargs),
        "batch_size": options["batch_size"] not in (None, env.num_envs),
        "episode_seeds (exact_resume)": options["episode_seeds"],
        "step_timeout": options["timeout_needed"],
        "autoreset_mode": mode is not AutoresetMode.SAME_STEP,
    }
    for option, given in unchangeable.items():
        if given:
            raise UserError(f"{option} cannot be chosen for a {name} that exists; leave it out")
    kept = {name: options[name] for name in ("seed", "infos", "copy", "safety")}
    return VectorEnvAdapter(env, **kept)
