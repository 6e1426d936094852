"""What every algorithm that descends gradients can be told. Imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from starling.ranges import Choice, Range, Ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateParameters:
    """Parameters of the rollout and of the gradient steps."""

    SEARCH: ClassVar[Ranges] = {
        "lr": Range(1e-5, 1e-2, "log", in_run=True),
        "lr_schedule": Choice(("constant", "linear")),
        "gamma": Range(0.9, 0.9999, "near_1", in_run=True),
    }

    num_steps: int = 2048
    """Steps each environment makes per rollout."""

    mini_batch_size: int | None = 64
    """Rows (environment steps) in one gradient step. PPO's must divide num_envs x num_steps, and
    may be None: the whole rollout."""

    lr: float = 3e-4
    """Learning rate, at the start of training."""

    lr_schedule: Literal["constant", "linear"] = "constant"
    """How the learning rate goes on: constant, or linear to 0 at the last step."""

    gamma: float = 0.99
    """Discount per environment step, in [0, 1]."""

    max_grad_norm: float | None = 0.5
    """Gradients are scaled down to this global norm. None: never."""

    adam_eps: float = 1e-5
    """Epsilon in the denominator of Adam (of RMSProp, too)."""

    normalize_observations: bool = False
    """Observations are brought to running mean 0 and standard deviation 1, and clipped to 10."""
