"""Every setting of a run: frozen dataclasses, their validation, and where values come from.

Values that the user gave win over the preset of the environment, and the preset over the defaults.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from starling.algorithms.ppo_parameters import PPOParameters
from starling.errors import UserError
from starling.networks.network_parameters import NetworkParameters
from starling.options import convert, did_you_mean, options, unknown_option
from starling.presets import find_preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentParameters:
    """What is trained on, and how it is stepped."""

    env: str
    """Gymnasium id, or module:callable that returns an environment."""

    env_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the environment, on the command line as JSON."""

    num_envs: int = 8
    """Parallel environments."""

    backend: str = "auto"
    """What steps the environments: serial, thread, process, envpool (starling backends lists
    them); auto takes what is fastest here."""

    num_workers: int | None = None
    """Threads or processes that step environments. None: the cores of the machine less 2, at
    least 1."""

    step_timeout: float | None = 300.0
    """Seconds that environments may take for one step before they count as hung. None: for
    ever."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(EnvironmentParameters):
    """How long a run goes on, and what it leaves behind."""

    algo: ClassVar[str]

    timesteps: int = 1_000_000
    """Environment steps in all, over all environments; rounded up to whole rollouts."""

    max_time: float | None = None
    """Seconds after which the run stops, as if it were done. None: no limit."""

    stop_return: float | None = None
    """The run stops once the mean return of the last 100 episodes reaches this. None: never."""

    seed: int = 0
    """Seed of the environments, the networks and the actions; at least 0."""

    device: str = "auto"
    """Where the networks compute: auto, cpu, gpu, cuda, cuda:0, tpu."""

    preset: str = "auto"
    """Settings to start from: auto (that of the environment, if it has one), none, an environment
    id, or a .toml or .json file. Settings given beside it win."""

    log_dir: str = "./logs"
    """Folder that the run's folder is made in."""

    run_name: str | None = None
    """Name of the run's folder. None: made from environment, algorithm and seed."""

    log_interval: int = 10
    """Iterations from one report to the next."""

    save_interval: int = 50
    """Iterations from one checkpoint to the next. 0: only at the end."""

    keep_checkpoints: int = 3
    """Newest checkpoints that are kept; the best one is kept besides."""

    eval_interval: int = 0
    """Iterations from one evaluation on separate environments to the next. 0: none."""

    eval_episodes: int = 10
    """Episodes in each evaluation."""

    exact_resume: bool = False
    """Checkpoints also hold what brings each environment back to where it was, so that a resumed
    run equals one that never stopped, bit for bit. Costs memory; not with EnvPool."""

    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""

    wandb_project: str | None = None
    """Weights & Biases project to report to. None: no reporting to it."""

    def __post_init__(self):
        for option in options(type(self)).values():
            value = convert(option, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
        self.validate()

    def validate(self) -> None:
        """Check every value and what they are together.

        Raises:
            UserError: A value cannot be used, or two do not go together.
        """
        for name, (holds, words) in _LIMITS.items():
            value = getattr(self, name, None)
            if value is not None and not holds(value):
                raise UserError(f"{name} must be {words}, not {value}")
        if not self.env:
            raise UserError("env is empty: give a Gymnasium id such as CartPole-v1")
        if not re.fullmatch(r"auto|cpu|(gpu|cuda|tpu|rocm)(:\d+)?", self.device):
            raise UserError(
                f"unknown device {self.device!r}: use auto, cpu, gpu, cuda, cuda:0 or tpu"
            )
        if self.run_name is not None and not re.fullmatch(
            r"[^/\\\0]*[^/\\\0.][^/\\\0]*", self.run_name
        ):
            raise UserError(
                f"run_name {self.run_name!r} is no name of a folder: leave out slashes, and choose "
                "the place with log_dir"
            )
        _check_backend(self.backend)
        if self.exact_resume and self.backend == "envpool":
            raise UserError(
                "exact_resume does not go with backend envpool, which cannot bring environments "
                "back to where they were: use backend process, thread or serial"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds: the algorithm, every setting, and versions."""
        values = {name: getattr(self, name) for name in options(type(self))}
        settings = {"algo": self.algo, **values, "versions": versions()}
        # Keyword arguments of an environment may be anything: what JSON lacks is kept as text.
        return json.loads(json.dumps(settings, default=repr))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(NetworkParameters, PPOParameters, RunConfig):
    """Every setting of a run of PPO."""

    algo: ClassVar[str] = "ppo"

    @property
    def batch_size(self) -> int:
        """Rows (environment steps) in one rollout: num_envs x num_steps."""
        return self.num_envs * self.num_steps

    @property
    def num_minibatches(self) -> int:
        """Gradient steps in one epoch."""
        return self.batch_size // (self.mini_batch_size or self.batch_size)

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
        product = f"num_envs x num_steps = {self.num_envs} x {self.num_steps} = {rows}"
        if self.mini_batch_size is not None and rows % self.mini_batch_size:
            raise UserError(
                f"mini_batch_size {self.mini_batch_size} does not divide {product}: "
                f"use {_nearest_divisors(rows, self.mini_batch_size)}"
            )
        if self.timesteps < rows:
            fitting = self.timesteps // self.num_envs
            fewer = f" or num_steps at most {fitting}" if fitting else ""
            raise UserError(
                f"timesteps {self.timesteps} is shorter than one rollout, {product}: "
                f"use timesteps at least {rows}{fewer}"
            )
        if not all(size > 0 for size in self.hidden_sizes):
            raise UserError(f"hidden_sizes must be at least 1 each, not {self.hidden_sizes}")


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


class Algorithm(NamedTuple):
    """Where an algorithm is: its configuration, and the trainer as "module:Class"."""

    config: type[RunConfig]
    trainer: str


ALGORITHMS = {
    "ppo": Algorithm(PPOConfig, "starling.training.parallel_ppo:ParallelPPO"),
    "a2c": Algorithm(A2CConfig, "starling.training.parallel_ppo:ParallelPPO"),
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


def config_from_dict(data: Mapping[str, Any]) -> Any:
    """Return the configuration that `RunConfig.to_dict` wrote.

    Settings that are missing (the run is older than they are) take their defaults.

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
            f"config.json holds {', '.join(foreign)}, unknown to this Starling "
            f"{_version('starling-rl')}: use the one that wrote it, "
            f"{written_by.get('starling', 'of another version')}"
        )
    return config_class(**settings)


def versions() -> dict[str, str]:
    """Return the versions of Starling and of the packages that a result depends on."""
    packages = {"starling": "starling-rl", "jax": "jax", "numpy": "numpy", "gymnasium": "gymnasium"}
    return {name: _version(package) for name, package in packages.items()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value >= least), f"at least {least}"


_ABOVE_0 = ((lambda value: value > 0), "above 0")
_FRACTION = ((lambda value: 0 <= value <= 1), "in [0, 1]")

# For each number, what must hold and how to say it; None passes.
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_envs": _at_least(1),
    "num_workers": _at_least(1),
    "step_timeout": _ABOVE_0,
    "timesteps": _at_least(1),
    "max_time": _ABOVE_0,
    "seed": _at_least(0),
    "log_interval": _at_least(1),
    "save_interval": _at_least(0),
    "keep_checkpoints": _at_least(1),
    "eval_interval": _at_least(0),
    "eval_episodes": _at_least(1),
    "num_steps": _at_least(1),
    "epochs": _at_least(1),
    "mini_batch_size": _at_least(1),
    "lr": _ABOVE_0,
    "gamma": _FRACTION,
    "gae_lambda": _FRACTION,
    "clip_param": _ABOVE_0,
    "value_clip": _ABOVE_0,
    "value_coef": _at_least(0),
    "entropy_coef": _at_least(0),
    "max_grad_norm": _ABOVE_0,
    "target_kl": _ABOVE_0,
    "adam_eps": _ABOVE_0,
}


def _check_backend(name: str) -> None:
    if name == "auto" or ":" in name:
        return
    from starling.envs.make import BACKENDS  # imports NumPy and Gymnasium, only when asked for

    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: {did_you_mean(name, ['auto', *BACKENDS])}")


def _nearest_divisors(rows: int, size: int) -> str:
    """Return the divisors of `rows` next to `size`, below and above, in words."""
    divisors = [d for d in range(1, math.isqrt(rows) + 1) if rows % d == 0]
    divisors += [rows // d for d in divisors]
    below = max(d for d in divisors if d < size)
    above = [d for d in divisors if d > size]
    return f"{below} or {min(above)}" if above else f"{below}"
