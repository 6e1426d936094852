"""What the policy and value networks can be told. Imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

from starling.ranges import Choice, Ranges


class Layers(NamedTuple):
    """The layers after what turns an observation into a vector."""

    hidden_sizes: tuple[int, ...]
    activation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Shape and number format of a network."""

    SEARCH: ClassVar[Ranges] = {"hidden_sizes": Choice(((64, 64), (128, 128), (256, 256)))}

    network: Literal["auto", "mlp", "nature_cnn"] = "auto"
    """What observations go through first. auto: images (bytes in three dimensions) through the
    convolutions of nature_cnn, all else into a vector. mlp: images into the vector, too.
    nature_cnn: whatever has three dimensions through the convolutions."""

    hidden_sizes: tuple[int, ...] | None = None
    """Units of each hidden layer. None: 64 64, or 512 after convolutions."""

    activation: Literal["tanh", "relu", "relu6", "silu", "elu", "gelu"] | None = None
    """Function after each hidden layer. None: tanh, or relu after convolutions."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format that the networks compute in; log-probabilities, advantages and losses are
    always float32."""

    def layers(self, pixels: bool) -> Layers:
        """The hidden layers, with the defaults for vectors or for images filled in."""
        default = Layers((512,), "relu") if pixels else Layers((64, 64), "tanh")
        return Layers(
            default.hidden_sizes if self.hidden_sizes is None else self.hidden_sizes,
            self.activation or default.activation,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkParameters(LayerParameters):
    """What else policy and value networks can be told."""

    shared_network: bool | None = None
    """Policy and value share their hidden layers (convolutions they always share). None: only
    after convolutions."""

    squash_actions: bool = False
    """Continuous actions pass through tanh and are scaled to the bounds of the space; otherwise
    they are clipped to it."""

    log_std_init: float = 0.0
    """Natural logarithm of the standard deviation of continuous actions at the start, in units of
    the scaled action space [-1, 1]."""

    def shares_layers(self, pixels: bool) -> bool:
        """Whether policy and value share their hidden layers."""
        return pixels if self.shared_network is None else self.shared_network
