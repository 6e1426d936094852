"""What the policy and value networks can be told. Imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkParameters:
    """Shape and number format of the policy and value networks."""

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Units of each hidden layer."""

    activation: Literal["tanh", "relu", "relu6", "silu", "elu", "gelu"] = "tanh"
    """Function after each hidden layer."""

    shared_network: bool = False
    """Policy and value share their hidden layers."""

    squash_actions: bool = False
    """Continuous actions pass through tanh and are scaled to the bounds of the space; otherwise
    they are clipped to it."""

    log_std_init: float = 0.0
    """Natural logarithm of the standard deviation of continuous actions at the start, in units of
    the scaled action space [-1, 1]."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format that the networks compute in; log-probabilities, advantages and losses are
    always float32."""
