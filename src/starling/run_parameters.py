"""Settings that every algorithm shares: the environment, the run, and the limits of all numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from starling.errors import UserError
from starling.options import convert, did_you_mean, options


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentParameters:
    """What is trained on, and how it is stepped."""

    env: str
    """Gymnasium id, module:callable that returns an environment, gymnax:Id or brax:name."""

    env_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the environment, on the command line as JSON."""

    num_envs: int = 8
    """Parallel environments."""

    backend: str = "auto"
    """What steps the environments: serial, thread, process, envpool, compiled (starling backends
    lists them); auto takes what is fastest here."""

    num_workers: int | None = None
    """Threads or processes that step environments, at most num_envs. None: as many as there are
    usable cores (the learner rests while they work)."""

    step_timeout: float | None = 300.0
    """Seconds that environments may take for one step before they count as hung. None: for
    ever."""

    on_env_error: Literal["raise", "restart", "drop"] = "raise"
    """What an exception, a hung step or a dead worker process leads to: the end of the run, a new
    environment (or worker, with all it has) in its place, or going on without it. What was under
    way counts as cut off, and nothing is learnt from the step that was lost."""

    max_restarts: int = 20
    """Failures within 100,000 environment steps that are borne before the run fails."""

    worker_max_rss: float | None = None
    """Megabytes of memory beyond which a worker process is replaced by a new one. None: no
    limit."""

    on_invalid_data: Literal["raise", "replace", "truncate", "off"] = "raise"
    """What an observation or reward that is not finite, or too large for 32 bits, leads to: the
    end of the run, 0 or the nearest value of its space in its place, the end of the episode, or
    nothing."""


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

    stop_iterations: int | None = None
    """The run stops after so many iterations (rollouts that were learnt from) in all. None:
    never."""

    seed: int = 0
    """Seed of the environments, the networks and the actions; at least 0 and at most
    4294967295."""

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
        for name in _LIMITS:
            check_limit(name, getattr(self, name, None))
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
        if self.exact_resume and self.on_env_error == "drop":
            raise UserError(
                "exact_resume does not go with on_env_error drop, since what was dropped cannot be "
                "brought back: use restart, or leave one of them out"
            )
        if self.exact_resume and self.backend in ("envpool", "compiled"):
            raise UserError(
                f"exact_resume does not go with backend {self.backend}, which cannot bring "
                "environments back to where they were: use backend process, thread or serial"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the algorithm and every setting, as JSON holds them."""
        values = {name: getattr(self, name) for name in options(type(self))}
        settings = {"algo": self.algo, **values}
        # Keyword arguments of an environment may be anything: what JSON lacks is kept as text.
        return json.loads(json.dumps(settings, default=repr))


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value >= least), f"at least {least}"


_ABOVE_0 = ((lambda value: value > 0), "above 0")
_ANY = ((lambda value: True), "")
_FRACTION = ((lambda value: 0 <= value <= 1), "in [0, 1]")

# For each number, what must hold and how to say it; None passes.
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_envs": _at_least(1),
    "num_workers": _at_least(1),
    "num_devices": _at_least(1),
    "num_actors": _at_least(1),
    "steps_per_worker": _at_least(1),
    "cpus_per_worker": _at_least(1e-4),  # the least that Ray counts
    "worker_restarts": _at_least(0),
    "rho_clip": _ABOVE_0,
    "c_clip": _ABOVE_0,
    "max_policy_lag": _at_least(0),
    "actor_restarts": _at_least(0),
    "step_timeout": _ABOVE_0,
    "max_restarts": _at_least(0),
    "worker_max_rss": _ABOVE_0,
    "timesteps": _at_least(1),
    "max_time": _ABOVE_0,
    "stop_iterations": _at_least(1),
    "seed": ((lambda value: 0 <= value < 2**32), "at least 0 and at most 4294967295"),
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
    "buffer_size": _at_least(1),
    "replay_shards": _at_least(0),
    "learning_starts": _at_least(0),
    "updates_per_transition": _ABOVE_0,
    "n_step": _at_least(1),
    "frame_stack": _at_least(2),
    "priority_alpha": _FRACTION,
    "priority_beta": _FRACTION,
    "target_update_interval": _at_least(1),
    "tau": _FRACTION,
    "epsilon_start": _FRACTION,
    "epsilon_end": _FRACTION,
    "epsilon_steps": _at_least(1),
}


def check_limit(name: str, value: Any) -> None:
    """Refuse a number beyond the limits of a setting; what is none passes.

    Raises:
        UserError: It is; the message says what the limits are.
    """
    holds, words = _LIMITS.get(name, _ANY)
    if isinstance(value, int | float) and not holds(value):
        raise UserError(f"{name} must be {words}, not {value}")


def _check_backend(name: str) -> None:
    if name == "auto" or ":" in name:
        return
    from starling.envs.make import BACKENDS  # imports NumPy and Gymnasium, only when asked for

    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: {did_you_mean(name, ['auto', *BACKENDS])}")
