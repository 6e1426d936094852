"""Every setting of a run, by algorithm, and where the values come from.

Values that the user gave win over the preset of the environment, and the preset over the defaults.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from starling.algorithms.async_parameters import ActorParameters, AsyncParameters
from starling.algorithms.dqn_parameters import DQNParameters
from starling.algorithms.ppo_parameters import PPOParameters
from starling.algorithms.update_parameters import UpdateParameters
from starling.errors import UserError
from starling.networks.network_parameters import LayerParameters, NetworkParameters
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(LayerParameters, UpdateParameters, RunConfig):
    """Settings of any run: of its environments, its length, its rollouts and its network."""

    @property
    def batch_size(self) -> int:
        """Rows (environment steps) in one rollout: num_envs x num_steps."""
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        """Rollouts in the whole run: timesteps / batch_size, rounded up."""
        return math.ceil(self.timesteps / self.batch_size)

    def validate(self) -> None:
        """Check every value and what they are together.

        Raises:
            UserError: A value cannot be used, or two do not go together.
        """
        super().validate()
        rows = self.batch_size
        if self.timesteps < rows:
            fitting = self.timesteps // self.num_envs
            fewer = f" or num_steps at most {fitting}" if fitting else ""
            raise UserError(
                f"timesteps {self.timesteps} is shorter than one rollout, num_envs x num_steps = "
                f"{self.num_envs} x {self.num_steps} = {rows}: use timesteps at least {rows}{fewer}"
            )
        if not all(size > 0 for size in self.hidden_sizes or ()):
            raise UserError(f"hidden_sizes must be at least 1 each, not {self.hidden_sizes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(NetworkParameters, PPOParameters, TrainConfig):
    """Every setting of a run of PPO."""

    algo: ClassVar[str] = "ppo"

    @property
    def num_minibatches(self) -> int:
        """Gradient steps in one epoch."""
        return self.batch_size // (self.mini_batch_size or self.batch_size)

    def validate(self) -> None:
        """Check every value and what they are together.

        Raises:
            UserError: A value cannot be used, or two do not go together.
        """
        super().validate()
        rows = self.batch_size
        product = f"num_envs x num_steps = {self.num_envs} x {self.num_steps} = {rows}"
        if self.mini_batch_size is not None and rows % self.mini_batch_size:
            raise UserError(
                f"mini_batch_size {self.mini_batch_size} does not divide {product}: "
                f"use {_nearest_divisors(rows, self.mini_batch_size)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class A2CConfig(PPOConfig):
    """A2C: PPO with one pass over each rollout, whole, and no clip."""

    algo: ClassVar[str] = "a2c"

    num_steps: int = 5
    epochs: int = 1
    mini_batch_size: int | None = None
    lr: float = 7e-4
    gae_lambda: float = 1.0
    clip_param: float | None = None
    entropy_coef: float = 0.0
    normalize_advantage: bool = False
    optimizer: Literal["adam", "rmsprop"] = "rmsprop"
    log_interval: int = 250
    save_interval: int = 2500


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsyncPPOConfig(AsyncParameters, PPOConfig):
    """Every setting of a run of asynchronous PPO."""

    algo: ClassVar[str] = "async_ppo"

    def validate(self) -> None:
        """See `PPOConfig.validate`."""
        super().validate()
        _check_actors(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DQNConfig(DQNParameters, TrainConfig):
    """Every setting of a run of DQN."""

    algo: ClassVar[str] = "dqn"

    num_envs: int = 4
    activation: Literal["tanh", "relu", "relu6", "silu", "elu", "gelu"] | None = "relu"
    log_interval: int = 100
    save_interval: int = 1000

    def validate(self) -> None:
        """See `PPOConfig.validate`."""
        super().validate()
        if self.buffer_size < self.mini_batch_size:
            raise UserError(
                f"buffer_size {self.buffer_size} is below mini_batch_size {self.mini_batch_size}: "
                "a replay must hold a minibatch at least"
            )
        if self.learning_starts > self.buffer_size:
            raise UserError(
                f"learning_starts {self.learning_starts} is above buffer_size {self.buffer_size}, "
                "so that learning would never start: lower it, or use a larger buffer_size"
            )
        steps = self.num_steps + self.n_step + (self.frame_stack or 1) - 1
        if steps > self.buffer_size // self.num_envs:
            raise UserError(
                f"buffer_size {self.buffer_size} keeps {self.buffer_size // self.num_envs} steps "
                f"of each of {self.num_envs} environments, and a rollout with what its returns "
                f"reach back to takes {steps}: use buffer_size at least {steps * self.num_envs}"
            )
        if (self.tau is None) == (self.target_update_interval is None):
            what = "both missing" if self.tau is None else "both given"
            raise UserError(
                f"tau and target_update_interval are {what}: give the one by which the target "
                "network shall follow, and none for the other"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsyncDQNConfig(ActorParameters, DQNConfig):
    """Every setting of a run of asynchronous DQN."""

    algo: ClassVar[str] = "async_dqn"

    num_envs: int = 12
    n_step: int = 3
    prioritized: bool = True
    actor_restarts: int = 20

    @property
    def batch_size(self) -> int:
        """Rows (environment steps) in one rollout, which is one actor's."""
        return self.num_envs // (self.num_actors or 1) * self.num_steps

    def validate(self) -> None:
        """See `PPOConfig.validate`."""
        super().validate()
        _check_actors(self)


class Algorithm(NamedTuple):
    """Where an algorithm is: its configuration, and the trainer as "module:Class"."""

    config: type[RunConfig]
    trainer: str


ALGORITHMS = {
    "ppo": Algorithm(PPOConfig, "starling.training.parallel_ppo:ParallelPPO"),
    "a2c": Algorithm(A2CConfig, "starling.training.parallel_ppo:ParallelPPO"),
    "async_ppo": Algorithm(AsyncPPOConfig, "starling.training.async_ppo:AsyncPPO"),
    "dqn": Algorithm(DQNConfig, "starling.training.dqn:DQN"),
    "async_dqn": Algorithm(AsyncDQNConfig, "starling.training.async_dqn:AsyncDQN"),
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
        if name not in known or name in ("env", "preset"):
            raise UserError(f"preset {preset_name}: {unknown_option(name, known)}")
    return config_class(**{**settings, **given, "preset": preset_name or "none"}), preset_name


# What may change from a run to its resumption: nothing that the rollouts or the update depend on.
RESUMABLE = frozenset(
    {
        "actor_restarts",
        "backend",
        "device",
        "eval_episodes",
        "eval_interval",
        "keep_checkpoints",
        "log_interval",
        "max_restarts",
        "max_time",
        "num_workers",
        "on_env_error",
        "on_invalid_data",
        "save_interval",
        "step_timeout",
        "save_replay",
        "stop_iterations",
        "stop_return",
        "tensorboard",
        "timesteps",
        "wandb_project",
        "worker_max_rss",
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


def _check_actors(config: Any) -> None:
    """Refuses what does not go with actors."""
    if config.num_actors is not None and config.num_envs % config.num_actors:
        raise UserError(
            f"num_actors {config.num_actors} does not divide num_envs {config.num_envs}: "
            f"use {_nearest_divisors(config.num_envs, config.num_actors)}"
        )
    if config.exact_resume:
        raise UserError(
            f"exact_resume does not go with {config.algo}, whose actors are ahead of what is "
            f"saved: leave it out, or use algo {config.algo.removeprefix('async_')}"
        )


def _nearest_divisors(rows: int, size: int) -> str:
    """Return the divisors of `rows` next to `size`, below and above, in words."""
    divisors = [d for d in range(1, math.isqrt(rows) + 1) if rows % d == 0]
    divisors += [rows // d for d in divisors]
    below = max(d for d in divisors if d < size)
    above = [d for d in divisors if d > size]
    return f"{below} or {min(above)}" if above else f"{below}"


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
        if further := markdown_reference(config, without=defaults):
            lines += [f"# {algo}: further parameters than {by_class[base]}'s", "", further]
        other = {
            name: show_default(option)
            for name, option in options(config).items()
            if name in defaults and show_default(option) != defaults[name]
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
