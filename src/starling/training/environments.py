"""The environments of a run, as its configuration says."""

from __future__ import annotations

from typing import Any

from starling.configs import TrainConfig
from starling.envs.make import auto_backend, make_vec
from starling.envs.safety import Safety
from starling.envs.vector_env import VectorEnv


def requires_timeout(config: TrainConfig) -> bool:
    """Whether `step_timeout` was chosen; the default is for backends that can keep it."""
    return config.step_timeout != type(config).step_timeout


def chosen_backend(
    source: Any, config: TrainConfig, num_envs: int, num_workers: int, compiled: bool
) -> str:
    """The backend of what `new_envs` would make, for whoever does not make it here."""
    if config.backend != "auto":
        return config.backend
    return auto_backend(
        source,
        num_envs,
        num_workers,
        env_kwargs=config.env_kwargs,
        safety=Safety(
            config.on_env_error, config.max_restarts, config.worker_max_rss, config.on_invalid_data
        ),
        timeout_needed=config.step_timeout is not None and requires_timeout(config),
        restricted=not config.exact_resume,
        compiled=compiled,
    )


def new_envs(
    source: Any,
    config: TrainConfig,
    num_envs: int,
    num_workers: int | None,
    compiled: bool,
    first_env: int = 0,
) -> VectorEnv:
    """Environments to train on.

    Args:
        source: As `make_vec` takes it.
        config: Of the run.
        num_envs: How many.
        num_workers: Threads or processes that step them.
        compiled: Whether compiled ones may be stepped inside a program.
        first_env: Index of the first of them in the run.
    """
    return make_vec(
        source,
        num_envs,
        backend=config.backend,
        num_workers=num_workers,
        seed=config.seed,
        env_kwargs=config.env_kwargs,
        copy=False,
        episode_seeds=config.exact_resume,
        step_timeout=config.step_timeout,
        require_timeout=requires_timeout(config),
        compiled=compiled,
        on_env_error=config.on_env_error,
        max_restarts=config.max_restarts,
        worker_max_rss=config.worker_max_rss,
        on_invalid_data=config.on_invalid_data,
        first_env=first_env,
    )
