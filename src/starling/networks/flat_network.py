"""A network as pure functions of one flat parameter vector.

Passing one array to a compiled step costs a third of what a dozen do, the optimiser runs over it in
one loop, and publishing a policy is swapping a reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from starling.errors import UserError
from starling.networks.convolution import NatureCNN
from starling.networks.features import (
    Features,
    count_features,
    find_images,
    has_channels_first,
    normalize,
    observation_features,
)
from starling.networks.network_parameters import LayerParameters
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


def join_images(features: Array | Features, channels_first: tuple[bool, ...], dtype: Any) -> Array:
    """Features as one vector `[..., F]`, images through convolutions; for use within a module."""
    if not isinstance(features, Features):
        return features
    parts = [
        NatureCNN(first, dtype, name=f"cnn_{i}")(image)
        for i, (first, image) in enumerate(zip(channels_first, features.images, strict=True))
    ]
    return jnp.concatenate([features.vector.astype(dtype), *parts], axis=-1)


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...], gain: float) -> np.ndarray:
    """Orthogonal columns (or rows, if there are fewer), for each matrix of a stack."""
    *stack, rows, columns = shape
    normal = rng.standard_normal((*stack, max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return gain * (q if rows >= columns else np.swapaxes(q, -1, -2))


class FlatNetwork:
    """A network for one observation space.

    Args:
        observation_space: Of a single environment.
        options: What its layers can be told.
        make: Makes the module, told of each image whether its channels come first.
        gains: Of the initial weights, by the name of a part of the module; sqrt(2) for the others.
        constants: Initial values of parameters that are neither weights nor biases, by name.

    Attributes:
        num_features: Width of the observation vector that the network sees, images apart.
        num_weights: Length of the parameter vector.
        widest: Numbers in the widest layer's output for a row, those of images apart.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        options: LayerParameters,
        make: Callable[[tuple[bool, ...]], nn.Module],
        gains: Mapping[str, float],
        constants: Mapping[str, float] | None = None,
    ):
        self.observation_space = observation_space
        self.num_features = count_features(observation_space, options.network)
        images = find_images(observation_space, options.network)
        if not self.num_features and not images:
            raise UserError(
                f"the observation space {observation_space} holds no number: observe something, if "
                "only a constant"
            )
        self._network = make(tuple(has_channels_first(image) for image in images))
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
        self._image_network = options.network
        self._gains, self._constants = gains, constants or {}

    def init(self, seed: int) -> np.ndarray:
        """A fresh parameter vector, `[num_weights]` float32.

        Orthogonal weights with gain sqrt(2) in hidden layers (a convolution's are orthogonal as the
        matrix of its kernels, `[rows x columns x C, F]`), and biases 0. Drawn by NumPy: to
        compile a QR decomposition for each shape takes longer than many a training.
        """
        rng = np.random.default_rng(seed)
        parts = []
        for names, shape in zip(self._names, self._shapes, strict=True):
            if names[-1] == "kernel":
                if names[0].startswith("cnn"):
                    shape = (math.prod(shape[:-1]), shape[-1])
                parts.append(_orthogonal(rng, shape, self._gains.get(names[0], math.sqrt(2))))
            else:
                parts.append(np.full(shape, self._constants.get(names[-1], 0.0)))
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

    def features(self, observation: Tree) -> Array | Features:
        """Observations `[..., *space]` as vectors `[..., num_features]`, not yet normalised.

        Where there are images, they stay beside the vectors as they are.
        """
        return observation_features(self.observation_space, observation, self._image_network)

    def apply(
        self, params: Array, features: Array | Features, statistics: RunningStatistics | None
    ) -> Any:
        """Runs the module on what `features` gave, normalised."""
        variables = {"params": self.unravel(params)}
        return self._network.apply(variables, normalize(features, statistics))
