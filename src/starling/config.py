"""The algorithms there are, and where the values of their settings come from.

Values that the user gave win over the preset of the environment, and the preset over the defaults.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from starling.configs import (
    A2CConfig,
    AsyncDQNConfig,
    AsyncPPOConfig,
    DistributedDQNConfig,
    DistributedPPOConfig,
    DQNConfig,
    PPOConfig,
)
from starling.errors import UserError
from starling.options import (
    convert,
    did_you_mean,
    markdown_reference,
    options,
    show_default,
    unknown_option,
)
from starling.presets import find_preset
from starling.run_parameters import RunConfig


class Algorithm(NamedTuple):
    """Where an algorithm is: its configuration, and the trainer as "module:Class"."""

    config: type[RunConfig]
    trainer: str


ALGORITHMS = {
    "ppo": Algorithm(PPOConfig, "starling.training.parallel_ppo:ParallelPPO"),
    "a2c": Algorithm(A2CConfig, "starling.training.parallel_ppo:ParallelPPO"),
    "async_ppo": Algorithm(AsyncPPOConfig, "starling.training.async_ppo:AsyncPPO"),
    "distributed_ppo": Algorithm(
        DistributedPPOConfig, "starling.training.distributed_ppo:DistributedPPO"
    ),
    "dqn": Algorithm(DQNConfig, "starling.training.dqn:DQN"),
    "async_dqn": Algorithm(AsyncDQNConfig, "starling.training.async_dqn:AsyncDQN"),
    "distributed_dqn": Algorithm(
        DistributedDQNConfig, "starling.training.distributed_dqn:DistributedDQN"
    ),
}


def find_config_class(algo: str) -> type[RunConfig]:
    """Return the configuration class of an algorithm.

    Args:
        algo: A name in ALGORITHMS, or "module:Class" of a trainer of one's own, whose attribute
            `config_class` is the configuration.

    Raises:
        UserError: There is no such algorithm.
    """
    if algo in ALGORITHMS:
        return ALGORITHMS[algo].config
    if ":" in algo:
        return find_trainer_class(algo).config_class
    raise UserError(f"unknown algo {algo!r}: {did_you_mean(algo, ALGORITHMS)}")


def find_trainer_class(algo: str) -> Any:
    """Import the trainer of an algorithm (for Starling's own this imports JAX).

    Raises:
        UserError: There is no such algorithm.
    """
    path = ALGORITHMS[algo].trainer if algo in ALGORITHMS else algo
    module, _, name = path.partition(":")
    if algo not in ALGORITHMS and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command's first entry is the folder that it lies in
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if algo in ALGORITHMS:
            raise
        raise UserError(f"algo {algo!r} cannot be imported: {error}") from None


def resolve(algo: str, given: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Put a configuration together: what was given, over the preset, over the defaults.

    Args:
        algo: Name of the algorithm.
        given: The settings that the user gave, by name; `env_name` means `env`.

    Returns:
        The configuration, whose `preset` says what was taken, and the name of the preset, None if
        none was.

    Raises:
        UserError: A setting, or a value, that there is not.
    """
    config_class = find_config_class(algo)
    known = options(config_class)
    given = dict(given)
    if "env_name" in given:
        given["env"] = given.pop("env_name")
    for name in given:
        if name not in known:
            raise unknown_option(name, known)
    if not given.get("env"):
        raise UserError("env is missing: give a Gymnasium id such as CartPole-v1")
    wanted = convert(known["preset"], given.get("preset", "auto"))
    preset_name, settings = find_preset(algo, wanted, str(given["env"]))
    for name in settings:
        if name in ("algo", "env", "preset"):
            raise UserError(
                f"preset {preset_name} holds {name}, which is given beside it: remove it"
            )
        if name not in known:
            raise UserError(f"preset {preset_name}: {unknown_option(name, known)}")
    return config_class(**{**settings, **given, "preset": preset_name or "none"}), preset_name


# What may change from a run to its resumption: nothing that the rollouts or the update depend on.
RESUMABLE = frozenset(
    {
        "actor_restarts",
        "address",
        "backend",
        "cpus_per_worker",
        "device",
        "eval_episodes",
        "eval_interval",
        "exact_resume",
        "keep_checkpoints",
        "log_interval",
        "max_restarts",
        "max_time",
        "num_devices",
        "num_workers",
        "on_env_error",
        "on_invalid_data",
        "replay_shards",
        "save_interval",
        "save_replay",
        "step_timeout",
        "stop_iterations",
        "stop_return",
        "tensorboard",
        "timesteps",
        "wandb_project",
        "worker_max_rss",
        "worker_restarts",
    }
)


def resume(config: Any, given: Mapping[str, Any]) -> Any:
    """Return the configuration that a stopped run goes on with.

    Args:
        config: The configuration that the run was made with.
        given: The settings that the user gives now; only those in RESUMABLE may differ.

    Raises:
        UserError: Another setting differs; the message says from what to what.
    """
    known = options(type(config))
    changed = {}
    for name, value in given.items():
        if name not in known:
            raise unknown_option(name, known)
        if value != getattr(config, name):
            changed[name] = value
    fixed = [f"{n} {getattr(config, n)}, not {changed[n]}" for n in changed if n not in RESUMABLE]
    if fixed:
        raise UserError(
            f"the run to resume was made with {'; '.join(fixed)}: leave this out, or start a new "
            "run"
        )
    return dataclasses.replace(config, **changed)


def config_from_dict(data: Mapping[str, Any]) -> Any:
    """Return the configuration that `RunConfig.to_dict` described.

    Settings that are missing (the run is older than they are) take their defaults; "versions" only
    serves messages.

    Raises:
        UserError: The content is not that of a config.json, or of a newer Starling.
    """
    settings = dict(data)
    algo, written_by = settings.pop("algo", None), settings.pop("versions", {})
    if not isinstance(algo, str) or "env" not in settings:
        raise UserError("this is no config.json of a run: algo or env is missing")
    config_class = find_config_class(algo)
    foreign = [name for name in settings if name not in options(config_class)]
    if foreign:
        raise UserError(
            f"config.json holds {', '.join(foreign)}, unknown to this version of Starling: use the "
            f"one that wrote it, {written_by.get('starling', 'which is not noted')}"
        )
    return config_class(**settings)


def reference_markdown() -> str:
    """Return the reference page of all options, printed by `python -m starling.config`."""
    lines = [
        "# Parameters",
        "",
        "<!-- Generated by `python -m starling.config`; edit the dataclasses. -->",
        "",
        "On the command line an option is `--num_envs 8` or `--num-envs 8`, and a switch is `--x`,",
        "`--no_x` or `--x True|False`. In Python it is a keyword argument. Values given win over",
        "the preset of the environment, and the preset over the defaults shown here.",
        "",
        markdown_reference(PPOConfig),
    ]
    by_class = {algorithm.config: algo for algo, algorithm in ALGORITHMS.items()}
    for config, algo in by_class.items():
        base = next((base for base in config.__mro__[1:] if base in by_class), PPOConfig)
        defaults = {name: show_default(option) for name, option in options(base).items()}
        docs = {name: option.doc for name, option in options(base).items()}
        same = [n for n, option in options(config).items() if docs.get(n) == option.doc]
        if further := markdown_reference(config, without=same):
            lines += [f"# {algo}: further parameters than {by_class[base]}'s", "", further]
        other = {
            name: show_default(option)
            for name, option in options(config).items()
            if name in same and show_default(option) != defaults[name]
        }
        if other:
            rows = [f"| `{name}` | `{default}` |" for name, default in other.items()]
            lines += [
                f"## {algo}: other defaults than {by_class[base]}'s",
                "",
                "| option | default |",
                "| --- | --- |",
                *rows,
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference_markdown(), end="")
