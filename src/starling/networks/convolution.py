"""Convolutions that are fast on a CPU, too, and the network of Mnih et al. (2015) made of them.

JAX's own convolution takes seconds on a CPU for what a matrix product does in a tenth of one, so
there each layer is one matrix product. An image is cut into blocks of stride x stride pixels, and
a kernel into pieces of that size; the product of all blocks with all pieces, shifted by where each
piece lies in the kernel and summed, is the convolution. Images go through all layers in chunks
that fit the processor's cache. Other devices use the library's convolution, with the same weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

CHUNK = 16
"""Images that go through the layers at a time on a CPU. 8 to 32 take the same time, a whole
minibatch of 256 half as long again."""

LIBRARY_CHUNK = 4096
"""The same on other devices, so that the values of a long rollout fit into their memory."""


class Layer(NamedTuple):
    """A convolution with square kernels and no padding."""

    filters: int
    size: int
    stride: int

    def output_size(self, size: int) -> int:
        """Rows (or columns) that come out of so many; below 1 where the kernel does not fit."""
        return (size - self.size) // self.stride + 1


NATURE = (Layer(32, 8, 4), Layer(64, 4, 2), Layer(64, 3, 1))
"""The layers of Mnih et al. (2015), "Human-level control through deep reinforcement learning"."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def block_convolution(
    images: Array, kernel: Array, stride: int, channels_first: bool = False
) -> Array:
    """Convolution without padding as one matrix product, computed in the kernel's format.

    Args:
        images: `[B, H, W, C]`, or `[B, C, H, W]` where channels come first; of any number format.
        kernel: `[size, size, C, F]`.
        stride: Of rows and columns.
        channels_first: Which of the two layouts the images have.

    Returns:
        `[B, H', W', F]`.
    """
    return _forward(images, kernel, stride, channels_first)[0]


def _forward(
    images: Array, kernel: Array, stride: int, channels_first: bool
) -> tuple[Array, tuple[Array, Array]]:
    pieces = _pieces(kernel, stride, channels_first)
    width, n, _, filters = pieces.shape
    rows, columns = _output_shape(images, kernel, stride, channels_first)
    shape = (rows + n - 1, columns + n - 1)
    blocks = _blocks(images, stride, shape, channels_first).astype(kernel.dtype)
    products = blocks.reshape(-1, width) @ pieces.reshape(width, -1)
    products = products.reshape(-1, *shape, n, n, filters)
    shifted = [products[:, i : i + rows, j : j + columns, i, j] for i in range(n) for j in range(n)]
    return functools.reduce(jnp.add, shifted), (images, kernel)


def _backward(
    stride: int, channels_first: bool, inputs: tuple[Array, Array], gradient: Array
) -> tuple[Any, Array]:
    images, kernel = inputs
    pieces, to_kernel = jax.vjp(lambda k: _pieces(k, stride, channels_first), kernel)
    width, n, _, filters = pieces.shape
    _, rows, columns, _ = gradient.shape
    shape = (rows + n - 1, columns + n - 1)

    def cut(images: Array) -> Array:
        return _blocks(images, stride, shape, channels_first)

    # The gradient at each of the products that were summed: that of the sum, shifted back.
    margin = n - 1
    padded = jnp.pad(gradient, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    shifted = [
        padded[:, margin - i : margin - i + shape[0], margin - j : margin - j + shape[1]]
        for i in range(n)
        for j in range(n)
    ]
    products = jnp.concatenate(shifted, axis=-1).reshape(-1, n * n * filters)
    if jnp.issubdtype(images.dtype, jnp.integer):
        blocks, to_images = cut(images), None
    else:
        blocks, to_images = jax.vjp(cut, images)
    by_piece = blocks.reshape(-1, width).astype(kernel.dtype).T @ products
    (kernel_gradient,) = to_kernel(by_piece.reshape(pieces.shape))
    if to_images is None:
        return np.zeros(images.shape, jax.dtypes.float0), kernel_gradient
    by_block = products @ pieces.reshape(width, -1).T
    (image_gradient,) = to_images(by_block.reshape(blocks.shape).astype(images.dtype))
    return image_gradient, kernel_gradient


block_convolution.defvjp(_forward, _backward)


def _output_shape(
    images: Array, kernel: Array, stride: int, channels_first: bool
) -> tuple[int, int]:
    rows, columns = images.shape[2:] if channels_first else images.shape[1:3]
    layer = Layer(kernel.shape[-1], kernel.shape[0], stride)
    return layer.output_size(rows), layer.output_size(columns)


def _pieces(kernel: Array, stride: int, channels_first: bool) -> Array:
    """The kernel `[size, size, C, F]` as n x n pieces `[stride * stride * C, n, n, F]`.

    It is padded with zeros where its size is no multiple of the stride.
    """
    size, _, channels, filters = kernel.shape
    n = -(-size // stride)
    rest = n * stride - size
    kernel = jnp.pad(kernel, ((0, rest), (0, rest), (0, 0), (0, 0)))
    kernel = kernel.reshape(n, stride, n, stride, channels, filters)
    order = (4, 1, 3, 0, 2, 5) if channels_first else (1, 3, 4, 0, 2, 5)
    return kernel.transpose(order).reshape(-1, n, n, filters)


def _blocks(images: Array, stride: int, shape: tuple[int, int], channels_first: bool) -> Array:
    """Images as `shape` blocks of stride x stride pixels, `[B, *shape, stride * stride * C]`.

    Rows and columns beyond the blocks are left out, those that are missing filled with zeros.
    """
    batch = images.shape[0]
    rows, columns = shape
    first = 2 if channels_first else 1
    padding = [(0, 0, 0)] * 4
    for axis, count in ((first, rows), (first + 1, columns)):
        padding[axis] = (0, count * stride - images.shape[axis], 0)
    images = lax.pad(images, np.zeros((), images.dtype), padding)
    if channels_first:
        images = images.reshape(batch, -1, rows, stride, columns, stride)
        order = (0, 2, 4, 1, 3, 5)
    else:
        images = images.reshape(batch, rows, stride, columns, -1)
        order = (0, 1, 3, 2, 4)
    if images.dtype == jnp.uint8 and images.shape[-1] % 4 == 0:
        # Moved as words of four bytes, which takes a tenth of the time.
        words = images.reshape(*images.shape[:-1], -1, 4)
        words = lax.bitcast_convert_type(words, jnp.uint32).transpose(order)
        blocks = lax.optimization_barrier(lax.bitcast_convert_type(words, jnp.uint8))
    else:
        blocks = images.transpose(order)
    return blocks.reshape(batch, rows, columns, -1)


def library_convolution(
    images: Array, kernel: Array, stride: int, channels_first: bool = False
) -> Array:
    """The same as `block_convolution`, by JAX's own convolution."""
    return lax.conv_general_dilated(
        images.astype(kernel.dtype),
        kernel,
        (stride, stride),
        "VALID",
        dimension_numbers=("NCHW" if channels_first else "NHWC", "HWIO", "NHWC"),
    )


Weights = Sequence[tuple[Array, Array]]


def _layers(
    weights: Weights,
    images: Array,
    convolution: Callable[..., Array],
    strides: Sequence[int],
    channels_first: bool,
    dtype: Any,
) -> Array:
    x = images
    for (kernel, bias), stride in zip(weights, strides, strict=True):
        x = convolution(x, kernel.astype(dtype), stride, channels_first and x is images)
        x = jax.nn.relu(x + bias.astype(dtype))
    return x


def _in_chunks(layers: Callable[[Array], Array], images: Array, most: int) -> Array:
    """Layers on `[B, ...]`, at most so many images at a time, in chunks of the same size."""
    rows = images.shape[0]
    chunks = max(1, -(-rows // most))
    if chunks == 1:
        return layers(images)
    size = -(-rows // chunks)
    if missing := chunks * size - rows:
        images = jnp.pad(images, ((0, missing), *[(0, 0)] * (images.ndim - 1)))
    out = lax.map(layers, images.reshape(chunks, size, *images.shape[1:]))
    return out.reshape(-1, *out.shape[2:])[:rows]


def convolutions(
    weights: Weights, images: Array, strides: Sequence[int], channels_first: bool, dtype: Any
) -> Array:
    """Layers of convolution, each with ReLU, in the way that suits the device they run on.

    Args:
        weights: Kernel `[size, size, C, F]` and bias `[F]` of each layer.
        images: `[B, H, W, C]`, or `[B, C, H, W]`.
        strides: Of each layer.
        channels_first: Which of the two layouts the images have.
        dtype: Number format to compute in.

    Returns:
        `[B, H', W', F]`.
    """
    layers = functools.partial(_layers, strides=strides, channels_first=channels_first, dtype=dtype)

    def by_blocks(weights: Weights, images: Array) -> Array:
        convolution: Any = block_convolution
        return _in_chunks(lambda x: layers(weights, x, convolution), images, CHUNK)

    def by_library(weights: Weights, images: Array) -> Array:
        return _in_chunks(lambda x: layers(weights, x, library_convolution), images, LIBRARY_CHUNK)

    return lax.platform_dependent(weights, images, cpu=by_blocks, default=by_library)


class Convolution(nn.Module):
    """The weights of one layer."""

    layer: Layer

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array]:
        """Kernel `[size, size, channels, filters]` and bias `[filters]`."""
        filters, size, _ = self.layer
        zeros = nn.initializers.zeros  # Policy.init draws the weights
        kernel = self.param("kernel", zeros, (size, size, channels, filters))
        return kernel, self.param("bias", zeros, (filters,))


class NatureCNN(nn.Module):
    """The convolutions of Mnih et al. (2015); the hidden layer of 512 comes after them."""

    channels_first: bool
    dtype: Any

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """`[..., H, W, C]` or `[..., C, H, W]` to `[..., F]`; bytes are taken as 0 to 1."""
        *batch_shape, channels, _, _ = images.shape
        if not self.channels_first:
            *batch_shape, _, _, channels = images.shape
        weights = []
        for layer in NATURE:
            weights.append(Convolution(layer)(channels))
            channels = layer.filters
        if images.dtype == jnp.uint8:  # 0 to 1; bytes stay bytes until the product
            weights[0] = (weights[0][0] / 255.0, weights[0][1])
        out = convolutions(
            weights,
            images.reshape(-1, *images.shape[-3:]),
            [layer.stride for layer in NATURE],
            self.channels_first,
            self.dtype,
        )
        return out.reshape(*batch_shape, math.prod(out.shape[1:]))
