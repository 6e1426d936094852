"""Probability distributions over actions, one for each kind of action space.

A distribution turns the last layer of a policy, `outputs [..., num_outputs]`, into actions. It
samples from noise drawn beforehand: `sample(outputs, noise)`. A rollout's noise is one program's
work then, and not a random-number call in every step, which would cost more than the network.

`raw` actions are what the distribution sampled (unbounded for a Gaussian, counted from 0 for a
choice); log-probabilities are taken of them. `to_env` turns them into what the environment takes.
"""

# The methods are described once, in `Distribution`.
# ruff: noqa: D102

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import Any, Protocol

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from starling.errors import UserError

Array = jax.Array
Tree = Any


class Distribution(Protocol):
    """What a policy needs of a distribution over one action space.

    Attributes:
        num_outputs: Width of the network's last layer.
        num_logits: Width of the action mask: how many single choices there are.
        num_parameters: Length of the parameters that do not depend on the observation (log-stds).
    """

    num_outputs: int
    num_logits: int
    num_parameters: int

    def noise(self, key: Array, batch_shape: tuple[int, ...]) -> Tree:
        """Draws what `sample` needs for `batch_shape` actions."""
        ...

    def sample(self, outputs: Array, parameters: Array, noise: Tree, mask: Array | None) -> Tree:
        """Raw actions, distributed as the outputs say."""
        ...

    def mode(self, outputs: Array, parameters: Array, mask: Array | None) -> Tree:
        """The most probable raw actions."""
        ...

    def log_prob(self, outputs: Array, parameters: Array, raw: Tree, mask: Array | None) -> Array:
        """Log-probability (density) of the raw actions' environment actions, `[...]`."""
        ...

    def entropy(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        """Differential or Shannon entropy in nats, `[...]`."""
        ...

    def to_env(self, raw: Tree) -> Tree:
        """The actions that the environment takes."""
        ...


def _masked(logits: Array, mask: Array | None) -> Array:
    """Logits of choices that a mask forbids (0) are made negligible, not infinite: no NaN."""
    if mask is None:
        return logits
    return jnp.where(mask != 0, logits, jnp.finfo(logits.dtype).min)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


class MultiCategorical:
    """Independent choices; `Discrete(n)` is the case of one. Raw: int32 `[..., *shape]`.

    Sampling is by the Gumbel-max trick: the argmax of logits plus Gumbel noise.
    """

    num_parameters = 0

    def __init__(self, sizes: list[int], shape: tuple[int, ...], start: np.ndarray | int = 0):
        self.sizes = sizes
        self.shape = shape
        self.start = start
        self.num_outputs = self.num_logits = sum(sizes)
        self._splits = np.cumsum(sizes)[:-1].tolist()

    def _logits(self, outputs: Array, mask: Array | None) -> list[Array]:
        logits = _masked(outputs, mask)
        return [jax.nn.log_softmax(part) for part in jnp.split(logits, self._splits, axis=-1)]

    def _stack(self, choices: list[Array]) -> Array:
        raw = jnp.stack(choices, axis=-1).astype(jnp.int32)
        return raw.reshape(*raw.shape[:-1], *self.shape)

    def noise(self, key: Array, batch_shape: tuple[int, ...]) -> Array:
        return jax.random.gumbel(key, (*batch_shape, self.num_outputs))

    def sample(self, outputs: Array, parameters: Array, noise: Array, mask: Array | None) -> Array:
        perturbed = _masked(outputs + noise, mask)
        return self._stack(
            [jnp.argmax(part, -1) for part in jnp.split(perturbed, self._splits, axis=-1)]
        )

    def mode(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        return self._stack([jnp.argmax(part, -1) for part in self._logits(outputs, mask)])

    def log_prob(self, outputs: Array, parameters: Array, raw: Array, mask: Array | None) -> Array:
        choices = raw.reshape(*outputs.shape[:-1], len(self.sizes))
        # A one-hot product: its gradient is a product as well, where a gather's is a slow scatter.
        pairs = zip(self._logits(outputs, mask), self.sizes, strict=True)
        return _sum(
            jnp.sum(logits * jax.nn.one_hot(choices[..., i], size), -1)
            for i, (logits, size) in enumerate(pairs)
        )

    def entropy(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        return _sum(-jnp.sum(jnp.exp(p) * p, -1) for p in self._logits(outputs, mask))

    def to_env(self, raw: Array) -> Array:
        return raw if np.all(self.start == 0) else raw + self.start


class Bernoulli:
    """Independent yes-or-no choices (`MultiBinary`). Raw: int8 `[..., *shape]`."""

    num_logits = 0
    num_parameters = 0

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.num_outputs = math.prod(shape)

    def _raw(self, choices: Array) -> Array:
        return choices.astype(jnp.int8).reshape(*choices.shape[:-1], *self.shape)

    def noise(self, key: Array, batch_shape: tuple[int, ...]) -> Array:
        return jax.random.logistic(key, (*batch_shape, self.num_outputs))

    def sample(self, outputs: Array, parameters: Array, noise: Array, mask: Array | None) -> Array:
        return self._raw(outputs + noise > 0)

    def mode(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        return self._raw(outputs > 0)

    def log_prob(self, outputs: Array, parameters: Array, raw: Array, mask: Array | None) -> Array:
        sign = 2.0 * raw.reshape(outputs.shape).astype(outputs.dtype) - 1.0
        return jnp.sum(jax.nn.log_sigmoid(sign * outputs), -1)

    def entropy(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        p = jax.nn.sigmoid(outputs)
        return -jnp.sum(
            p * jax.nn.log_sigmoid(outputs) + (1 - p) * jax.nn.log_sigmoid(-outputs), -1
        )

    def to_env(self, raw: Array) -> Array:
        return raw


_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def _rounded(bound: np.ndarray, inwards: float) -> np.ndarray:
    """A bound as float32, on its inner side: rounded outwards it would let actions out."""
    rounded = bound.astype(np.float32)
    outside = rounded < bound if inwards > 0 else rounded > bound
    return np.where(outside, np.nextafter(rounded, np.float32(inwards)), rounded)


class DiagonalGaussian:
    """Independent Gaussians with a mean from the network and a log-std of their own (`Box`).

    Raw actions u are unbounded. The environment takes `centre + half * clip(u, -1, 1)`, or, if
    squashed, `centre + half * tanh(u)`; dimensions without two finite bounds take u, clipped.
    A clipped action keeps the density of u, as is usual; a squashed one has that of the
    environment's action, with the Jacobian of tanh and of the scale.
    """

    num_logits = 0

    def __init__(self, space: gymnasium.spaces.Box, squash: bool):
        low = np.asarray(space.low, np.float64).reshape(-1)
        high = np.asarray(space.high, np.float64).reshape(-1)
        bounded = np.isfinite(low) & np.isfinite(high)
        if squash and not bounded.all():
            raise UserError(
                f"squash_actions needs finite action bounds, but the action space is {space}: "
                "leave it off, or wrap the environment in gymnasium.wrappers.RescaleAction."
            )
        with np.errstate(invalid="ignore", over="ignore"):
            self.half = np.where(bounded, high / 2 - low / 2, 1.0).astype(np.float32)
            self.centre = np.where(bounded, high / 2 + low / 2, 0.0).astype(np.float32)
        self.low, self.high = _rounded(low, np.inf), _rounded(high, -np.inf)
        self.shape, self.dtype = space.shape, space.dtype
        self.squash = squash
        self.num_outputs = self.num_parameters = math.prod(space.shape)

    def noise(self, key: Array, batch_shape: tuple[int, ...]) -> Array:
        return jax.random.normal(key, (*batch_shape, self.num_outputs))

    def _shaped(self, flat: Array) -> Array:
        return flat.reshape(*flat.shape[:-1], *self.shape)

    def sample(self, outputs: Array, parameters: Array, noise: Array, mask: Array | None) -> Array:
        return self._shaped(outputs + jnp.exp(parameters) * noise)

    def mode(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        return self._shaped(outputs)

    def _log_jacobian(self, raw: Array) -> Array:
        """Log |d action / d u| = log half + log(1 - tanh(u)^2), stable for large |u|."""
        scale = np.where(self.half > 0, self.half, 1.0)  # low == high: no density, and no infinity
        return jnp.log(scale) + 2 * (math.log(2) - raw - jax.nn.softplus(-2 * raw))

    def log_prob(self, outputs: Array, parameters: Array, raw: Array, mask: Array | None) -> Array:
        raw = raw.reshape(outputs.shape)
        z = (raw - outputs) * jnp.exp(-parameters)
        density = -0.5 * z * z - parameters - _LOG_SQRT_2PI
        if self.squash:
            density = density - self._log_jacobian(raw)
        return density.sum(-1)

    def entropy(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        entropy = jnp.broadcast_to(parameters + 0.5 + _LOG_SQRT_2PI, outputs.shape).sum(-1)
        if self.squash:  # plus the mean of the log-Jacobian, by Gauss-Hermite quadrature
            raw = outputs[..., None] + jnp.exp(parameters)[:, None] * _NODES.astype(np.float32)
            jacobian = jnp.swapaxes(self._log_jacobian(jnp.swapaxes(raw, -1, -2)), -1, -2)
            entropy = entropy + (jacobian @ _WEIGHTS.astype(np.float32)).sum(-1)
        return entropy

    def to_env(self, raw: Array) -> Array:
        flat = raw.reshape(*raw.shape[: raw.ndim - len(self.shape)], self.num_outputs)
        unit = jnp.tanh(flat) if self.squash else flat
        action = jnp.clip(self.centre + self.half * unit, self.low, self.high)
        if np.issubdtype(self.dtype, np.integer):
            action = jnp.round(action)
        return self._shaped(action.astype(jax.dtypes.canonicalize_dtype(self.dtype)))


class Composite:
    """Independent distributions for the leaves of a Dict or Tuple action space.

    Outputs, parameters and masks are the leaves', one after the other; raw actions have the
    space's own structure.
    """

    def __init__(self, space: gymnasium.Space, squash: bool):
        if isinstance(space, gymnasium.spaces.Dict):
            self._names: list[str] | None = list(space.spaces)
            children = list(space.spaces.values())
        else:
            assert isinstance(space, gymnasium.spaces.Tuple)
            self._names = None
            children = list(space.spaces)
        self.parts = [make_distribution(child, squash) for child in children]
        self.num_outputs = sum(part.num_outputs for part in self.parts)
        self.num_logits = sum(part.num_logits for part in self.parts)
        self.num_parameters = sum(part.num_parameters for part in self.parts)

    def _pack(self, values: list[Tree]) -> Tree:
        if self._names is None:
            return tuple(values)
        return dict(zip(self._names, values, strict=True))

    def _unpack(self, tree: Tree) -> list[Tree]:
        return list(tree) if self._names is None else [tree[name] for name in self._names]

    def _each(self, outputs: Array, parameters: Array, mask: Array | None) -> list[tuple]:
        """(part, its outputs, its parameters, its mask) for each part."""
        rows, o, p, m = [], 0, 0, 0
        for part in self.parts:
            own_mask = None
            if mask is not None and part.num_logits:
                own_mask = mask[..., m : m + part.num_logits]
            own_outputs = outputs[..., o : o + part.num_outputs]
            own_parameters = parameters[p : p + part.num_parameters]
            rows.append((part, own_outputs, own_parameters, own_mask))
            o, p, m = o + part.num_outputs, p + part.num_parameters, m + part.num_logits
        return rows

    def noise(self, key: Array, batch_shape: tuple[int, ...]) -> Tree:
        keys = jax.random.split(key, len(self.parts))
        return [part.noise(k, batch_shape) for part, k in zip(self.parts, keys, strict=True)]

    def sample(self, outputs: Array, parameters: Array, noise: Tree, mask: Array | None) -> Tree:
        rows = zip(self._each(outputs, parameters, mask), noise, strict=True)
        return self._pack([part.sample(o, p, z, m) for (part, o, p, m), z in rows])

    def mode(self, outputs: Array, parameters: Array, mask: Array | None) -> Tree:
        rows = self._each(outputs, parameters, mask)
        return self._pack([part.mode(o, p, m) for part, o, p, m in rows])

    def log_prob(self, outputs: Array, parameters: Array, raw: Tree, mask: Array | None) -> Array:
        rows = zip(self._each(outputs, parameters, mask), self._unpack(raw), strict=True)
        return _sum(part.log_prob(o, p, u, m) for (part, o, p, m), u in rows)

    def entropy(self, outputs: Array, parameters: Array, mask: Array | None) -> Array:
        rows = self._each(outputs, parameters, mask)
        return _sum(part.entropy(o, p, m) for part, o, p, m in rows)

    def to_env(self, raw: Tree) -> Tree:
        pairs = zip(self.parts, self._unpack(raw), strict=True)
        return self._pack([part.to_env(u) for part, u in pairs])


def make_distribution(space: gymnasium.Space, squash: bool = False) -> Distribution:
    """The distribution for an action space.

    Args:
        space: Box, Discrete, MultiDiscrete, MultiBinary, or any nesting of Dict and Tuple of them.
        squash: Pass continuous actions through tanh instead of clipping them.

    Raises:
        UserError: The space is of another kind, or cannot be squashed.
    """
    match space:
        case gymnasium.spaces.Discrete():
            return MultiCategorical([int(space.n)], (), int(space.start))
        case gymnasium.spaces.MultiDiscrete():
            return MultiCategorical(
                [int(n) for n in space.nvec.reshape(-1)], space.shape, np.asarray(space.start)
            )
        case gymnasium.spaces.MultiBinary():
            return Bernoulli(space.shape)
        case gymnasium.spaces.Box():
            return DiagonalGaussian(space, squash)
        case gymnasium.spaces.Dict() | gymnasium.spaces.Tuple() if len(space.spaces):
            return Composite(space, squash)
    raise UserError(
        f"the action space {space} cannot be handled: Starling takes Box, Discrete, MultiDiscrete, "
        "MultiBinary, and Dict and Tuple of them; wrap the environment to give one of these."
    )
