"""Policy and value networks for any nesting of observation and action spaces.

All parameters live in one flat vector. Passing one array to a compiled step costs a third of what
a dozen do, the optimiser runs over it in one loop, and publishing a policy is swapping a reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from starling.networks.convolution import NatureCNN
from starling.networks.distributions import Distribution, make_distribution
from starling.networks.features import (
    Features,
    count_features,
    find_images,
    has_channels_first,
    normalize,
    observation_features,
)
from starling.networks.network_parameters import NetworkParameters
from starling.networks.normalization import RunningStatistics

Array = jax.Array
Tree = Any


class MLP(nn.Module):
    """Hidden layers."""

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., F]` to `[..., hidden_sizes[-1]]`."""
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, dtype=self.dtype)(x))
        return x


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
        hidden_sizes, activation_name, shared = options.layers(pixels=bool(self.channels_first))
        activation = getattr(nn, activation_name)
        if isinstance(features, Features):
            parts = [
                NatureCNN(first, dtype, name=f"cnn_{i}")(image)
                for i, (first, image) in enumerate(
                    zip(self.channels_first, features.images, strict=True)
                )
            ]
            features = jnp.concatenate([features.vector.astype(dtype), *parts], axis=-1)
        if shared:
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


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...], gain: float) -> np.ndarray:
    """Orthogonal columns (or rows, if there are fewer), for each matrix of a stack."""
    *stack, rows, columns = shape
    normal = rng.standard_normal((*stack, max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return gain * (q if rows >= columns else np.swapaxes(q, -1, -2))


class PolicyOutput(NamedTuple):
    """What the networks say of a batch: `outputs [..., A]`, `parameters [P]`, `value [...]`."""

    outputs: Array
    parameters: Array
    value: Array


class Policy:
    """The networks for one pair of spaces, as pure functions of a flat parameter vector.

    Attributes:
        distribution: Over the actions.
        num_features: Width of the observation vector that the networks see, images apart.
        widest: Numbers in the widest layer's output for a row, those of images apart.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        options: NetworkParameters,
    ):
        self.observation_space = observation_space
        self.action_space = action_space
        self.num_features = count_features(observation_space, options.network)
        images = find_images(observation_space, options.network)
        self.distribution: Distribution = make_distribution(action_space, options.squash_actions)
        self._network = ActorCritic(
            self.distribution.num_outputs,
            self.distribution.num_parameters,
            options,
            tuple(has_channels_first(image) for image in images),
        )
        example: Any = jax.ShapeDtypeStruct((1, self.num_features), jnp.float32)
        if images:
            pixels: Any = [jax.ShapeDtypeStruct((1, *x.shape), jnp.dtype(x.dtype)) for x in images]
            example = Features(example, tuple(pixels))
        variables = jax.eval_shape(self._network.init, jax.random.key(0), example)
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(variables["params"])
        self._names = [tuple(str(entry.key) for entry in path) for path, _ in leaves]
        self._shapes = [leaf.shape for _, leaf in leaves]
        self._ends = np.cumsum([math.prod(shape) for shape in self._shapes]).tolist()
        self.num_weights: int = self._ends[-1]
        self.widest = max((self.num_features, *options.layers(bool(images)).hidden_sizes))
        self._options = options

    def init(self, seed: int) -> np.ndarray:
        """A fresh parameter vector, `[num_weights]` float32.

        Orthogonal weights with gain sqrt(2) in hidden layers (a convolution's are orthogonal as the
        matrix of its kernels, `[rows x columns x C, F]`), 0.01 for the policy's last layer
        (all actions nearly alike at first) and 1 for the value's; biases 0. Drawn by NumPy: to
        compile a QR decomposition for each shape takes longer than many a training.
        """
        rng = np.random.default_rng(seed)
        gains = {"policy": 0.01, "value": 1.0}
        parts = []
        for names, shape in zip(self._names, self._shapes, strict=True):
            if names[-1] == "kernel":
                if names[0].startswith("cnn"):
                    shape = (math.prod(shape[:-1]), shape[-1])
                parts.append(_orthogonal(rng, shape, gains.get(names[0], math.sqrt(2))))
            else:
                value = self._options.log_std_init if names[-1] == "log_std" else 0.0
                parts.append(np.full(shape, value))
        return np.concatenate([part.reshape(-1) for part in parts]).astype(np.float32)

    def unravel(self, params: Array) -> Tree:
        """The parameter vector as a tree of named arrays."""
        parts = jnp.split(params, self._ends[:-1])
        arrays = [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return jax.tree.unflatten(self._structure, arrays)

    def named(self, params: Array) -> dict[str, np.ndarray]:
        """The parameters by name, on the host, for a file."""
        parts = np.split(np.array(params), self._ends[:-1])
        names = ["/".join(names) for names in self._names]
        return {
            name: part.reshape(shape)
            for name, part, shape in zip(names, parts, self._shapes, strict=True)
        }

    def ravel(self, named: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `named`."""
        return np.concatenate([named["/".join(names)].reshape(-1) for names in self._names])

    def log_std(self, params: Array) -> Array:
        """The distribution's free parameters, `[P]`."""
        return self.unravel(params)["log_std"]

    def features(self, observation: Tree) -> Array | Features:
        """Observations `[..., *space]` as vectors `[..., num_features]`, not yet normalised.

        Where there are images, they stay beside the vectors as they are.
        """
        return observation_features(self.observation_space, observation, self._options.network)

    def __call__(
        self, params: Array, features: Array | Features, statistics: RunningStatistics | None
    ) -> PolicyOutput:
        """Runs the networks on what `features` gave, `[..., num_features]`."""
        variables = {"params": self.unravel(params)}
        outputs: Any = self._network.apply(variables, normalize(features, statistics))
        return PolicyOutput(*outputs)
