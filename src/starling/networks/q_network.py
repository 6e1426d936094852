"""Networks of action values, for actions that can be counted."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from starling.errors import UserError
from starling.networks.features import Features
from starling.networks.flat_network import MLP, FlatNetwork, join_images
from starling.networks.network_parameters import LayerParameters
from starling.networks.normalization import RunningStatistics

Array = jax.Array
Tree = Any

_GAIN = 3**-0.5
"""Of the initial weights, convolutions apart: the scale of PyTorch's, with which most settings
for DQN were found. With the policies' sqrt(2), values start, and are overestimated, higher."""


class ActionValues(nn.Module):
    """Q, or V and advantages in streams of their own, which are the last hidden layer each.

    Dueling streams: Wang et al. 2016, arXiv:1511.06581. What the streams, or the components of an
    action, give back to the layers that they share is their sum, not scaled down as in the papers.
    """

    num_outputs: int
    dueling: bool
    options: LayerParameters
    channels_first: tuple[bool, ...] = ()  # of each image

    @nn.compact
    def __call__(self, features: Array | Features) -> tuple[Array, Array | None]:
        """Runs on `[..., F]`; gives Q or advantages `[..., A]`, and V `[..., 1]` or None."""
        dtype = jnp.dtype(self.options.precision)
        sizes, activation_name = self.options.layers(pixels=bool(self.channels_first))
        activation = getattr(nn, activation_name)
        hidden = join_images(features, self.channels_first, dtype)
        if not self.dueling:
            hidden = MLP(sizes, activation, dtype, name="torso")(hidden)
            return nn.Dense(self.num_outputs, name="q")(hidden.astype(jnp.float32)), None
        hidden = MLP(sizes[:-1], activation, dtype, name="torso")(hidden)
        outputs = []
        for name, width in (("advantage", self.num_outputs), ("value", 1)):
            stream = MLP(sizes[-1:], activation, dtype, name=f"{name}_stream")(hidden)
            outputs.append(nn.Dense(width, name=name)(stream.astype(jnp.float32)))
        return outputs[0], outputs[1]


class QNetwork(FlatNetwork):
    """Action values for one pair of spaces, as pure functions of a flat parameter vector.

    An action is a choice in each of D components, one for Discrete; every component has values
    of its own (action branching: Tavakoli et al. 2018, arXiv:1711.08946), kept as `[..., D, n]`
    where n is the largest number of choices. Where a component has fewer, the last ones mean
    nothing and are never the best.

    Args:
        observation_space: Of a single environment.
        action_space: Of a single environment.
        options: What its layers can be told.
        dueling: Q = V + A - mean A, with the mean over the choices of a component.

    Attributes:
        shape: Of the values of a row, (D, n).

    Raises:
        UserError: The actions cannot be counted.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        options: LayerParameters,
        dueling: bool,
    ):
        sizes, self._start = _components(action_space)
        self._action_shape = action_space.shape or ()
        self.shape = (len(sizes), max(sizes))
        self._sizes = np.array(sizes)
        # [D, n], where there is a choice
        self._real = np.arange(self.shape[1]) < self._sizes[:, None]

        def make(channels_first: tuple[bool, ...]) -> ActionValues:
            return ActionValues(math.prod(self.shape), dueling, options, channels_first)

        parts = ("torso", "q", "advantage_stream", "advantage", "value_stream", "value")
        super().__init__(observation_space, options, make, dict.fromkeys(parts, _GAIN))

    def __call__(
        self, params: Array, features: Array | Features, statistics: RunningStatistics | None
    ) -> Array:
        """Q `[..., D, n]` for what `features` gave, `[..., num_features]`."""
        outputs, value = self.apply(params, features, statistics)
        q = outputs.reshape(*outputs.shape[:-1], *self.shape)
        if value is None:
            return q
        mean = jnp.where(self._real, q, 0.0).sum(-1) / self._sizes
        return value[..., None] + q - mean[..., None]

    def best(self, q: Array, mask: Array | None) -> Array:
        """The allowed choice of greatest value in each component, int32 `[..., D]`.

        Args:
            q: `[..., D, n]`.
            mask: `[..., choices]`, 0 where a choice is not allowed, the components' one after the
                other; None: all are.
        """
        allowed: Any = self._real
        if mask is not None:
            places = np.flatnonzero(self._real)
            flat = jnp.zeros((*mask.shape[:-1], self._real.size), bool)
            allowed = flat.at[..., places].set(mask != 0).reshape(*mask.shape[:-1], *self.shape)
        return jnp.argmax(jnp.where(allowed, q, -jnp.inf), -1).astype(jnp.int32)

    def to_raw(self, choices: Array) -> Array:
        """Choices `[..., D]` as a rollout keeps them, `[..., *space]`, counted from 0."""
        return choices.reshape(*choices.shape[:-1], *self._action_shape)

    def from_raw(self, raw: Array) -> Array:
        """The inverse of `to_raw`."""
        batch_shape = raw.shape[: raw.ndim - len(self._action_shape)]
        return raw.reshape(*batch_shape, self.shape[0])

    def to_env(self, raw: Array) -> Array:
        """What the environment takes; `raw` itself where its choices are counted from 0."""
        return raw if np.all(self._start == 0) else raw + self._start


def _components(space: gymnasium.Space) -> tuple[list[int], Any]:
    """Number of choices in each component of an action, and the first one's number."""
    match space:
        case gymnasium.spaces.Discrete():
            return [int(space.n)], int(space.start)
        case gymnasium.spaces.MultiDiscrete():
            return [int(n) for n in space.nvec.reshape(-1)], np.asarray(space.start)
    raise UserError(
        f"dqn chooses among actions that can be counted, and the action space is {space}: use algo "
        "ppo, or wrap the environment to offer a Discrete or MultiDiscrete choice of its actions"
    )


def pick(values: Array, choices: Array) -> Array:
    """The values of choices: `[..., D, n]` at `[..., D]` gives `[..., D]`."""
    # A one-hot product: its gradient is a product as well, where a gather's is a slow scatter.
    return (values * jax.nn.one_hot(choices, values.shape[-1])).sum(-1)
