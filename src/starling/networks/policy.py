"""Policy and value networks for any nesting of observation and action spaces."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp

from starling.errors import UserError
from starling.networks.distributions import Distribution, make_distribution
from starling.networks.features import Features
from starling.networks.flat_network import MLP, FlatNetwork, join_images
from starling.networks.network_parameters import NetworkParameters
from starling.networks.normalization import RunningStatistics

Array = jax.Array
Tree = Any


class ActorCritic(nn.Module):
    """Distribution outputs, their free parameters (log-stds), and a value.

    Two separate networks are one network with stacked weights: their products run as one batched
    product, which on a CPU costs two thirds of two.
    """

    num_outputs: int
    num_parameters: int
    options: NetworkParameters
    channels_first: tuple[bool, ...] = ()  # of each image

    @nn.compact
    def __call__(self, features: Array | Features) -> tuple[Array, Array, Array]:
        """Runs on `[..., F]`; gives outputs `[..., A]`, log-stds `[P]` and values `[...]`."""
        options = self.options
        dtype = jnp.dtype(options.precision)
        pixels = bool(self.channels_first)
        hidden_sizes, activation_name = options.layers(pixels)
        activation = getattr(nn, activation_name)
        features = join_images(features, self.channels_first, dtype)
        if options.shares_layers(pixels):
            hidden = MLP(hidden_sizes, activation, dtype, name="torso")(features)
            policy_hidden = value_hidden = hidden
        else:
            pair = nn.vmap(
                MLP,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                axis_size=2,
            )
            # Not one input for both: the weights' product with it would need transposing.
            twice = jnp.broadcast_to(features, (2, *features.shape))
            hidden = pair(hidden_sizes, activation, dtype, name="torso")(twice)
            policy_hidden, value_hidden = hidden[0], hidden[1]
        outputs = nn.Dense(self.num_outputs, name="policy")(policy_hidden.astype(jnp.float32))
        value = nn.Dense(1, name="value")(value_hidden.astype(jnp.float32))
        log_std = self.param("log_std", nn.initializers.zeros, (self.num_parameters,))
        return outputs, log_std, value[..., 0]


class PolicyOutput(NamedTuple):
    """What the networks say of a batch: `outputs [..., A]`, `parameters [P]`, `value [...]`."""

    outputs: Array
    parameters: Array
    value: Array


class Policy(FlatNetwork):
    """The networks for one pair of spaces, as pure functions of a flat parameter vector.

    The policy's last layer begins with gain 0.01 (all actions nearly alike), the value's with 1.

    Attributes:
        distribution: Over the actions.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        options: NetworkParameters,
    ):
        self.action_space = action_space
        self.distribution: Distribution = make_distribution(action_space, options.squash_actions)
        if not self.distribution.num_outputs:
            raise UserError(f"the action space {action_space} leaves nothing to choose")

        def make(channels_first: tuple[bool, ...]) -> ActorCritic:
            outputs, parameters = self.distribution.num_outputs, self.distribution.num_parameters
            return ActorCritic(outputs, parameters, options, channels_first)

        super().__init__(
            observation_space,
            options,
            make,
            gains={"policy": 0.01, "value": 1.0},
            constants={"log_std": options.log_std_init},
        )

    def log_std(self, params: Array) -> Array:
        """The distribution's free parameters, `[P]`."""
        return self.unravel(params)["log_std"]

    def __call__(
        self, params: Array, features: Array | Features, statistics: RunningStatistics | None
    ) -> PolicyOutput:
        """Runs the networks on what `features` gave, `[..., num_features]`."""
        return PolicyOutput(*self.apply(params, features, statistics))
