"""Policy and value networks for any nesting of observation and action spaces.

All parameters live in one flat vector. Passing one array to a compiled step costs a third of what
a dozen do, the optimiser runs over it in one loop, and publishing a policy is swapping a reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
from gymnasium import spaces
from jax.flatten_util import ravel_pytree

from starling.errors import UserError
from starling.networks.distributions import Distribution, make_distribution
from starling.networks.network_parameters import NetworkParameters
from starling.networks.normalization import RunningStatistics

Array = jax.Array
Tree = Any

OBSERVATION_CLIP = 10.0
"""Normalised observations are clipped to this many standard deviations."""


def observation_features(space: gymnasium.Space, observation: Tree) -> Array:
    """One float32 vector for each observation: `[..., F]`.

    Box is flattened, Discrete and MultiDiscrete become one-hot vectors, MultiBinary 0 and 1; the
    leaves of Dict and Tuple follow one another.

    Raises:
        UserError: The space is of a kind that no network here takes.
    """
    match space:
        case spaces.Dict():
            parts = [observation_features(s, observation[k]) for k, s in space.spaces.items()]
            return jnp.concatenate(parts, axis=-1)
        case spaces.Tuple():
            pairs = zip(space.spaces, observation, strict=True)
            return jnp.concatenate([observation_features(s, o) for s, o in pairs], axis=-1)
        case spaces.Discrete():
            return jax.nn.one_hot(observation - int(space.start), int(space.n))
        case spaces.MultiDiscrete():
            sizes = space.nvec.reshape(-1)
            index = (observation - space.start).reshape(*observation.shape[: -len(space.shape)], -1)
            parts = [jax.nn.one_hot(index[..., i], int(n)) for i, n in enumerate(sizes)]
            return jnp.concatenate(parts, axis=-1)
        case spaces.Box() | spaces.MultiBinary():
            batch_shape = observation.shape[: observation.ndim - len(space.shape)]
            return jnp.asarray(observation, jnp.float32).reshape(*batch_shape, -1)
    raise UserError(
        f"the observation space {space} cannot be handled: Starling takes Box, Discrete, "
        "MultiDiscrete, MultiBinary, and Dict and Tuple of them; wrap the environment to give one."
    )


def normalize(features: Array, statistics: RunningStatistics | None) -> Array:
    """Features at mean 0 and standard deviation 1, clipped; unchanged without statistics."""
    if statistics is None:
        return features
    normal = (features - statistics.mean) / statistics.std
    return jnp.clip(normal, -OBSERVATION_CLIP, OBSERVATION_CLIP)


class MLP(nn.Module):
    """Hidden layers, orthogonally initialised with gain sqrt(2)."""

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., F]` to `[..., hidden_sizes[-1]]`."""
        for size in self.hidden_sizes:
            x = nn.Dense(size, kernel_init=nn.initializers.orthogonal(2**0.5), dtype=self.dtype)(x)
            x = self.activation(x)
        return x


class ActorCritic(nn.Module):
    """Distribution outputs, their free parameters (log-stds), and a value.

    Two separate networks are one network with stacked weights: their products run as one batched
    product, which on a CPU costs two thirds of two.
    """

    num_outputs: int
    num_parameters: int
    options: NetworkParameters

    @nn.compact
    def __call__(self, features: Array) -> tuple[Array, Array, Array]:
        """Runs on `[..., F]`; gives outputs `[..., A]`, log-stds `[P]` and values `[...]`."""
        options = self.options
        dtype = jnp.dtype(options.precision)
        activation = getattr(nn, options.activation)
        if options.shared_network:
            hidden = MLP(options.hidden_sizes, activation, dtype, name="torso")(features)
            policy_hidden = value_hidden = hidden
        else:
            pair = nn.vmap(
                MLP,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,  # pyright: ignore[reportArgumentType]
                axis_size=2,
            )
            hidden = pair(options.hidden_sizes, activation, dtype, name="torso")(features)
            policy_hidden, value_hidden = hidden[0], hidden[1]
        head = nn.initializers.orthogonal
        outputs = nn.Dense(self.num_outputs, kernel_init=head(0.01), name="policy")(
            policy_hidden.astype(jnp.float32)
        )
        value = nn.Dense(1, kernel_init=head(1.0), name="value")(value_hidden.astype(jnp.float32))
        log_std = self.param(
            "log_std", nn.initializers.constant(options.log_std_init), (self.num_parameters,)
        )
        return outputs, log_std, value[..., 0]


class PolicyOutput(NamedTuple):
    """What the networks say of a batch: `outputs [..., A]`, `parameters [P]`, `value [...]`."""

    outputs: Array
    parameters: Array
    value: Array


class Policy:
    """The networks for one pair of spaces, as pure functions of a flat parameter vector.

    Attributes:
        distribution: Over the actions.
        num_features: Width of the observation vector that the networks see.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        options: NetworkParameters,
    ):
        self.observation_space = observation_space
        self.action_space = action_space
        self.distribution: Distribution = make_distribution(action_space, options.squash_actions)
        self._network = ActorCritic(
            self.distribution.num_outputs, self.distribution.num_parameters, options
        )
        sample = jax.eval_shape(
            lambda o: observation_features(observation_space, o), observation_space.sample()
        )
        self.num_features: int = sample.shape[-1]
        shapes = jax.eval_shape(self._init_tree, jax.random.key(0))
        template = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        flat, self.unravel = ravel_pytree(template)
        self.num_weights: int = flat.size

    def _init_tree(self, key: Array) -> Tree:
        return self._network.init(key, jnp.zeros((1, self.num_features)))["params"]

    def init(self, key: Array) -> Array:
        """A fresh parameter vector, `[num_weights]` float32."""
        return ravel_pytree(self._init_tree(key))[0]

    def features(self, observation: Tree) -> Array:
        """Observations `[..., *space]` as vectors `[..., num_features]`, not yet normalised."""
        return observation_features(self.observation_space, observation)

    def __call__(
        self, params: Array, features: Array, statistics: RunningStatistics | None
    ) -> PolicyOutput:
        """Runs both networks on feature vectors `[..., num_features]`."""
        variables = {"params": self.unravel(params)}
        return PolicyOutput(*self._network.apply(variables, normalize(features, statistics)))  # pyright: ignore
