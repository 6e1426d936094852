"""What networks see of an observation: one vector, and the images as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from starling.errors import UserError
from starling.networks.convolution import NATURE
from starling.networks.normalization import RunningStatistics

Array = jax.Array
Tree = Any

OBSERVATION_CLIP = 10.0
"""Normalised observations are clipped to this many standard deviations."""


class Features(NamedTuple):
    """An observation in which there are images.

    Attributes:
        vector: `[..., F]` float32, all that is no image; F may be 0.
        images: Each `[..., H, W, C]` or `[..., C, H, W]`, in its native type.
    """

    vector: Array
    images: tuple[Array, ...]


def find_images(space: gymnasium.Space, network: str) -> list[spaces.Box]:
    """The parts of an observation space that go through convolutions, in the space's order.

    Args:
        space: Of the observations.
        network: "auto" takes bytes `[H, W, C]` or `[C, H, W]` for images, "nature_cnn" numbers of
            any type, "mlp" none.

    Raises:
        UserError: There is none, though the network is for images, or one is too small for it.
    """
    images = [leaf for leaf, _ in _leaves(space) if _is_image(leaf, network)]
    if network == "nature_cnn" and not images:
        raise UserError(
            f"network nature_cnn takes images, Box of three dimensions, and the observation space "
            f"{space} has none: use network mlp"
        )
    for image in images:
        _check_size(image)
    return images  # type: ignore[return-value]


def _is_image(space: gymnasium.Space | None, network: str) -> bool:
    if network == "mlp" or not isinstance(space, spaces.Box) or len(space.shape) != 3:
        return False
    return network == "nature_cnn" or space.dtype == np.uint8


def has_channels_first(image: spaces.Box) -> bool:
    """Whether an image is `[C, H, W]`: there are fewer channels than rows or columns."""
    return image.shape[0] < image.shape[2]


def _check_size(image: spaces.Box) -> None:
    size = image.shape[1:] if has_channels_first(image) else image.shape[:2]
    needed = 1
    for layer in reversed(NATURE):
        needed = (needed - 1) * layer.stride + layer.size
    rows, columns = size
    for number, layer in enumerate(NATURE, 1):
        if min(rows, columns) < layer.size:
            raise UserError(
                f"images of {size[0]} x {size[1]} pixels are too small for network nature_cnn: its "
                f"convolution {number} of {len(NATURE)} is of {layer.size} x {layer.size} and gets "
                f"{rows} x {columns}; give at least {needed} x {needed}, or use network mlp"
            )
        rows, columns = layer.output_size(rows), layer.output_size(columns)


def _leaves(space: gymnasium.Space, observation: Tree = None) -> Iterator[tuple[Any, Tree]]:
    """The parts of a space that are neither Dict nor Tuple, each with that of an observation."""
    match space:
        case spaces.Dict():
            for key, part in space.spaces.items():
                yield from _leaves(part, None if observation is None else observation[key])
        case spaces.Tuple():
            parts = [None] * len(space.spaces) if observation is None else observation
            for part, value in zip(space.spaces, parts, strict=True):
                yield from _leaves(part, value)
        case _:
            yield space, observation


def count_features(space: gymnasium.Space, network: str = "mlp") -> int:
    """Width of the vectors that `observation_features` gives.

    Raises:
        UserError: The space is of a kind that no network here takes.
    """
    known = (spaces.Discrete, spaces.MultiDiscrete, spaces.Box, spaces.MultiBinary)
    leaves = [leaf for leaf, _ in _leaves(space)]
    if not leaves or not all(isinstance(leaf, known) for leaf in leaves):
        raise UserError(
            f"the observation space {space} cannot be handled: Starling takes Box, Discrete, "
            "MultiDiscrete, MultiBinary, and Dict and Tuple of them; wrap the environment to give "
            "one."
        )
    return sum(spaces.flatdim(leaf) for leaf in leaves if not _is_image(leaf, network))


def observation_features(
    space: gymnasium.Space, observation: Tree, network: str = "mlp"
) -> Array | Features:
    """One float32 vector for each observation, `[..., F]`, and the images where there are any.

    Box is flattened, Discrete and MultiDiscrete become one-hot vectors, MultiBinary 0 and 1; the
    leaves of Dict and Tuple follow one another.
    """
    leaves = list(_leaves(space, observation))
    vectors = [_vector(leaf, value) for leaf, value in leaves if not _is_image(leaf, network)]
    images = tuple(value for leaf, value in leaves if _is_image(leaf, network))
    if not images:
        return jnp.concatenate(vectors, axis=-1)
    if not vectors:
        vectors = [jnp.zeros((*images[0].shape[:-3], 0))]
    return Features(jnp.concatenate(vectors, axis=-1), images)


def _vector(space: gymnasium.Space, observation: Array) -> Array:
    match space:
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
    raise TypeError(f"no features of {space}")


def vector_of(features: Array | Features) -> Array:
    """All that is no image, `[..., F]`."""
    return features.vector if isinstance(features, Features) else features


def normalize(features: Any, statistics: RunningStatistics | None) -> Any:
    """Vectors at mean 0 and standard deviation 1, clipped; unchanged without statistics.

    Images stay as they are.
    """
    if statistics is None:
        return features
    if isinstance(features, Features):
        return features._replace(vector=normalize(features.vector, statistics))
    normal = (features - statistics.mean) / statistics.std
    return jnp.clip(normal, -OBSERVATION_CLIP, OBSERVATION_CLIP)
