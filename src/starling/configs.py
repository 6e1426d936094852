"""Every setting of a run, by algorithm: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from starling.algorithms.async_parameters import ActorParameters, LagParameters
from starling.algorithms.distributed_parameters import (
    DistributedParameters,
    ShardParameters,
    WorkerParameters,
)
from starling.algorithms.dqn_parameters import DQNParameters
from starling.algorithms.ppo_parameters import PPOParameters
from starling.algorithms.update_parameters import UpdateParameters
from starling.errors import UserError
from starling.networks.network_parameters import LayerParameters, NetworkParameters
from starling.ranges import Choice, Range, Ranges
from starling.run_parameters import RunConfig, check_limit


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
        return -(-self.timesteps // self.batch_size)

    @property
    def total_envs(self) -> int:
        """Environments that the run trains on at once."""
        return self.num_envs

    def _rows_in_words(self) -> str:
        return f"num_envs x num_steps = {self.num_envs} x {self.num_steps}"

    def _or_fewer_steps(self) -> str:
        fitting = self.timesteps * self.num_steps // self.batch_size
        return f" or num_steps at most {fitting}" if fitting else ""

    def validate(self) -> None:
        """Check every value and what they are together.

        Raises:
            UserError: A value cannot be used, or two do not go together.
        """
        super().validate()
        rows = self.batch_size
        if self.timesteps < rows:
            raise UserError(
                f"timesteps {self.timesteps} is shorter than one rollout, {self._rows_in_words()} "
                f"= {rows}: use timesteps at least {rows}{self._or_fewer_steps()}"
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
        if self.mini_batch_size is not None and rows % self.mini_batch_size:
            raise UserError(
                f"mini_batch_size {self.mini_batch_size} does not divide {self._rows_in_words()} = "
                f"{rows}: "
                f"use {_nearest_divisors(rows, self.mini_batch_size)}"
            )
        rows, devices = self.mini_batch_size or rows, self.num_devices
        if devices != "all" and rows % devices:
            raise UserError(
                f"num_devices {devices} does not divide the {rows} rows of a minibatch: use "
                f"{_nearest_divisors(rows, devices)}, or another mini_batch_size"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class A2CConfig(PPOConfig):
    """A2C: PPO with one pass over each rollout, whole, and no clip."""

    algo: ClassVar[str] = "a2c"
    SEARCH: ClassVar[Ranges] = {
        "num_steps": Choice((5, 8, 16, 32, 64)),
        "gae_lambda": Range(0.9, 1.0, in_run=True),
        # one pass over the whole rollout, without a clip
        **dict.fromkeys(("epochs", "mini_batch_size", "clip_param")),
    }

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
class AsyncPPOConfig(LagParameters, ActorParameters, PPOConfig):
    """Every setting of a run of asynchronous PPO."""

    algo: ClassVar[str] = "async_ppo"

    def validate(self) -> None:
        """See `PPOConfig.validate`."""
        super().validate()
        _check_actors(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedPPOConfig(DistributedParameters, LagParameters, PPOConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Every setting of a run of PPO with workers on a Ray cluster."""

    algo: ClassVar[str] = "distributed_ppo"

    @property
    def num_parts(self) -> int:
        """Rollouts in an update, or the least where it depends on the cluster."""
        assert self.steps_per_worker is not None
        if self.buffer_size is not None:
            return self.buffer_size // self.steps_per_worker
        return self.num_workers if isinstance(self.num_workers, int) else 1

    @property
    def batch_size(self) -> int:
        """Rows (environment steps) in one update."""
        assert self.steps_per_worker is not None
        return self.num_parts * self.steps_per_worker

    def validate(self) -> None:
        """See `PPOConfig.validate`."""
        for name in ("num_envs", "num_steps", "steps_per_worker", "buffer_size"):
            check_limit(name, getattr(self, name))  # before they divide each other
        if self.steps_per_worker is None:
            object.__setattr__(self, "steps_per_worker", self.num_envs * self.num_steps)
        steps = self.steps_per_worker
        assert steps is not None
        if steps % self.num_envs:
            below = steps - steps % self.num_envs
            raise UserError(
                f"steps_per_worker {steps} cannot be shared out to num_envs {self.num_envs}: use "
                f"{f'{below} or ' if below else ''}{below + self.num_envs}"
            )
        object.__setattr__(self, "num_steps", steps // self.num_envs)
        if self.buffer_size is not None and self.buffer_size % steps:
            raise UserError(
                f"buffer_size {self.buffer_size} is not made of whole rollouts of steps_per_worker "
                f"{steps}: use {-(-self.buffer_size // steps) * steps}"
            )
        super().validate()
        _check_nothing_exact(self)

    def _rows_in_words(self) -> str:
        return f"num_parts x steps_per_worker = {self.num_parts} x {self.steps_per_worker}"

    def _or_fewer_steps(self) -> str:
        return ""  # steps_per_worker decides num_steps, and buffer_size the number of parts


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
        steps = self.num_steps + self.n_step + (self.frame_stack or 1) - 1
        envs = self.total_envs
        if steps > self.buffer_size // envs:
            raise UserError(
                f"buffer_size {self.buffer_size} keeps {self.buffer_size // envs} steps "
                f"of each of {envs} environments, and a rollout with what its returns "
                f"reach back to takes {steps}: use buffer_size at least {steps * envs}"
            )
        # The newest rows of each environment wait for the steps that follow.
        most = envs * (self.buffer_size // envs - self.n_step - (self.frame_stack or 1) + 2)
        if self.mini_batch_size > most:
            raise UserError(
                f"mini_batch_size {self.mini_batch_size} is above the {most} transitions that can "
                f"be drawn of buffer_size {self.buffer_size}, so that learning would never start: "
                "lower it, or use a larger buffer_size"
            )
        made = self.num_iterations * self.batch_size
        for name in ("learning_starts", "mini_batch_size"):
            if (needed := getattr(self, name)) > made:
                raise UserError(
                    f"{name} {needed} is above the {made} transitions that timesteps "
                    f"{self.timesteps} make, so that learning would never start: lower it, or use "
                    f"timesteps at least {needed}"
                )
        if self.exact_resume and not self.save_replay:
            raise UserError(
                "exact_resume needs the replay in the checkpoints: leave save_replay on, or "
                "exact_resume out"
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
    def num_writers(self) -> int:
        """Actors that fill the replay."""
        return self.num_actors or 1

    @property
    def batch_size(self) -> int:
        """Rows (environment steps) in one rollout, which is one actor's."""
        return max(1, self.num_envs // self.num_writers) * self.num_steps  # 0 is refused later

    def validate(self) -> None:
        """See `PPOConfig.validate`."""
        super().validate()
        _check_actors(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedDQNConfig(ShardParameters, WorkerParameters, DQNConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Every setting of a run of DQN with workers on a Ray cluster."""

    algo: ClassVar[str] = "distributed_dqn"

    num_envs: int = 4
    num_steps: int = 16
    n_step: int = 3
    prioritized: bool = True

    @property
    def num_writers(self) -> int:
        """Workers that fill the replay, where it is known how many these are."""
        return self.num_workers if isinstance(self.num_workers, int) else 1

    @property
    def total_envs(self) -> int:
        """Environments of all workers."""
        return self.num_envs * self.num_writers

    def validate(self) -> None:
        """See `PPOConfig.validate`."""
        super().validate()
        _check_nothing_exact(self)
        if self.num_workers == "all":
            raise UserError(
                "num_workers all does not go with distributed_dqn, whose replay has a place for "
                "each environment: give a number, or leave it out"
            )
        if self.num_workers is not None and self.replay_shards > self.num_workers:
            raise UserError(
                f"replay_shards {self.replay_shards} is more than num_workers {self.num_workers}, "
                f"and a shard keeps what one worker or more collect: use {self.num_workers} at most"
            )


def _check_nothing_exact(config: Any) -> None:
    if config.exact_resume:
        raise UserError(
            f"exact_resume does not go with {config.algo}, whose environments are elsewhere: leave "
            f"it out, or use algo {config.algo.removeprefix('distributed_')}"
        )


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
