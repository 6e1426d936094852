"""What PPO and A2C can be told. Imports no JAX, so that the command line stays fast."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from starling.algorithms.update_parameters import UpdateParameters
from starling.ranges import Choice, Range, Ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOParameters(UpdateParameters):
    """Parameters of the advantages and the update."""

    SEARCH: ClassVar[Ranges] = {
        "num_steps": Choice((32, 64, 128, 256, 512, 1024, 2048)),
        "mini_batch_size": Choice((32, 64, 128, 256, 512)),
        "epochs": Range(3, 20),
        "gae_lambda": Range(0.8, 0.99, "near_1", in_run=True),
        "clip_param": Range(0.1, 0.4, in_run=True),
        "entropy_coef": Range(1e-5, 0.1, "log", in_run=True),
    }

    epochs: int = 10
    """Passes over each rollout."""

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

    target_kl: float | None = None
    """The update of a rollout stops once the approximate KL divergence (nats) from the policy that
    collected it is past this. None: never."""

    normalize_advantage: bool = True
    """Advantages are brought to mean 0 and standard deviation 1 in each minibatch."""

    normalize_rewards: bool = False
    """Rewards are divided by the running standard deviation of the discounted return, and clipped
    to 10. Reported returns stay as the environment gives them."""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Gradient descent rule."""

    num_devices: int | Literal["all"] = 1
    """Devices that learn, from `device` on, each from an equal share of every minibatch; all: as
    many as there are. The result is that of one device to float32 rounding."""
