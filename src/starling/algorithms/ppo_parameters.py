"""What PPO and A2C can be told. Imports no JAX, so that the command line stays fast."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOParameters:
    """Parameters of the rollout, the advantages and the update."""

    num_steps: int = 2048
    """Steps each environment makes per rollout."""

    epochs: int = 10
    """Passes over each rollout."""

    mini_batch_size: int | None = 64
    """Rows (environment steps) in one gradient step; must divide num_envs x num_steps. None: the
    whole rollout."""

    lr: float = 3e-4
    """Learning rate, at the start of training."""

    lr_schedule: Literal["constant", "linear"] = "constant"
    """How the learning rate goes on: constant, or linear to 0 at the last step."""

    gamma: float = 0.99
    """Discount per environment step, in [0, 1]."""

    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation, in [0, 1]; 1 means Monte-Carlo returns."""

    clip_param: float | None = 0.2
    """Clip range of the probability ratio. None: no clip (A2C)."""

    clip_schedule: Literal["constant", "linear"] = "constant"
    """How the clip range goes on: constant, or linear to 0 at the last step."""

    value_clip: float | None = None
    """Clip range of the change of a value, in units of return. None: no clip."""

    value_coef: float = 0.5
    """Weight of the value loss."""

    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""

    max_grad_norm: float | None = 0.5
    """Gradients are scaled down to this global norm. None: never."""

    target_kl: float | None = None
    """The update of a rollout stops once the approximate KL divergence (nats) from the policy that
    collected it is past this. None: never."""

    normalize_advantage: bool = True
    """Advantages are brought to mean 0 and standard deviation 1 in each minibatch."""

    normalize_observations: bool = False
    """Observations are brought to running mean 0 and standard deviation 1, and clipped to 10."""

    normalize_rewards: bool = False
    """Rewards are divided by the running standard deviation of the discounted return, and clipped
    to 10. Reported returns stay as the environment gives them."""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Gradient descent rule."""

    adam_eps: float = 1e-5
    """Epsilon in the denominator of Adam (of RMSProp, too)."""
