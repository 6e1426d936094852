"""Convolution by blocks against the library's, and policies that see images."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from starling.errors import UserError
from starling.networks.convolution import (
    CHUNK,
    NATURE,
    block_convolution,
    convolutions,
    library_convolution,
)
from starling.networks.features import Features, observation_features
from starling.networks.network_parameters import NetworkParameters
from starling.networks.normalization import RunningStatistics
from starling.networks.policy import Policy

CHOICE = spaces.Discrete(3)
IMAGE = spaces.Box(0, 255, (4, 36, 40), np.uint8)


def draw(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.normal(size=shape).astype(np.float32)


# rows x columns, channels, filters, size, stride, channels first, format
SHAPES = [
    ((84, 84), 4, 32, 8, 4, True, np.uint8),  # the three layers of the Nature CNN
    ((20, 20), 32, 64, 4, 2, False, np.float32),
    ((9, 9), 64, 64, 3, 1, False, np.float32),
    ((13, 9), 3, 5, 3, 2, False, np.uint8),  # a kernel that is no multiple of the stride
    ((11, 14), 3, 5, 5, 3, True, np.float32),
    ((10, 12), 4, 5, 4, 4, False, np.uint8),  # rows and columns that no kernel reaches
    ((12, 12), 2, 3, 2, 4, True, np.uint8),  # pixels between the kernels
    ((7, 5), 1, 2, 1, 1, False, np.float32),
    ((6, 6), 3, 4, 6, 1, True, np.float32),  # a single place
]


@pytest.mark.parametrize(
    ("size", "channels", "filters", "kernel_size", "stride", "first", "dtype"), SHAPES
)
def test_convolution_by_blocks_is_the_librarys(
    size, channels, filters, kernel_size, stride, first, dtype
):
    shape = (2, channels, *size) if first else (2, *size, channels)
    images = draw(shape, dtype)
    kernel = draw((kernel_size, kernel_size, channels, filters), np.float32, 1)

    def values_and_gradients(convolution):
        def run(images, kernel):
            return convolution(images, kernel, stride, first)

        out, pull_back = jax.vjp(run, images, kernel)
        gradients = pull_back(jnp.asarray(draw(out.shape, np.float32, 2)))
        return [out, *(g for g in gradients if g.dtype == np.float32)]

    found = jax.jit(functools.partial(values_and_gradients, block_convolution))()
    expected = jax.jit(functools.partial(values_and_gradients, library_convolution))()
    assert len(found) == len(expected) == (2 if dtype == np.uint8 else 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * float(jnp.abs(theirs).max()))


def test_the_layout_matters():
    images, kernel = draw((2, 6, 6, 6), np.float32), draw((3, 3, 6, 2), np.float32, 1)
    last, first = (block_convolution(images, kernel, 1, layout) for layout in (False, True))
    assert np.abs(np.asarray(last - first)).max() > 1
    turned = block_convolution(images.transpose(0, 3, 1, 2), kernel, 1, True)
    np.testing.assert_allclose(last, turned, atol=1e-4)
    mirrored = block_convolution(images, kernel[::-1], 1)
    assert np.abs(np.asarray(last - mirrored)).max() > 1


@pytest.mark.parametrize("rows", [3, CHUNK, 2 * CHUNK + 3])
def test_layers_in_chunks_are_those_of_the_whole_batch(rows):
    """Values and gradients of layers in a row; the last chunk may be filled up."""
    layers = [(5, 4, 2), (6, 3, 1)]
    weights, channels = [], 3
    for filters, size, _ in layers:
        kernel = draw((size, size, channels, filters), np.float32, filters)
        weights.append((kernel / 5, draw((filters,), np.float32)))
        channels = filters
    images = draw((rows, 10, 10, 3), np.float32)

    def loss(weights):
        out = convolutions(weights, images, [2, 1], False, jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    def expected_loss(weights):
        x = images
        for (kernel, bias), (_, _, stride) in zip(weights, layers, strict=True):
            x = jnp.maximum(library_convolution(x, kernel, stride) + bias, 0)
        return (x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum(), x

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(weights)
    expected_gradients, expected = jax.jit(jax.grad(expected_loss, has_aux=True))(weights)
    assert out.shape == (rows, 2, 2, 6)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_other_devices_get_the_librarys_convolution():
    weights = [(np.zeros((4, 4, 3, 5), np.float32), np.zeros(5, np.float32))]
    images = np.zeros((2 * CHUNK, 8, 8, 3), np.uint8)
    traced = jax.jit(lambda w, x: convolutions(w, x, [2], False, jnp.float32)).trace(
        weights, images
    )
    for platform, own in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == own
        assert ("stablehlo.while" in text) != own


# --- policies ------------------------------------------------------------------------------------


def forward(policy: Policy, named: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """Outputs for images `[B, C, H, W]` of 0 to 1, one kernel's place after the other."""
    x = image.astype(float).transpose(0, 2, 3, 1)
    for i, (filters, size, stride) in enumerate(NATURE):
        kernel, bias = (named[f"cnn_0/Convolution_{i}/{n}"] for n in ("kernel", "bias"))
        rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
        out = np.zeros((len(x), rows, columns, filters))
        for r in range(rows):
            for c in range(columns):
                part = x[:, r * stride : r * stride + size, c * stride : c * stride + size]
                out[:, r, c] = np.tensordot(part, kernel.astype(float), 3) + bias
        x = np.maximum(out, 0)
    x = x.reshape(len(x), -1)
    x = np.maximum(x @ named["torso/Dense_0/kernel"] + named["torso/Dense_0/bias"], 0)
    return x @ named["policy/kernel"] + named["policy/bias"]


def random_weights(policy: Policy) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=policy.num_weights) * 0.02
    return (policy.init(0) + noise).astype(np.float32)


@pytest.mark.parametrize("kind", ["bytes, channels first", "bytes, channels last", "0 to 1"])
def test_images_go_through_the_nature_cnn(kind):
    images = draw((2, 4, 36, 40), np.uint8)
    space, observation, network = IMAGE, images, "auto"
    if kind == "bytes, channels last":
        space = spaces.Box(0, 255, (36, 40, 4), np.uint8)
        observation = images.transpose(0, 2, 3, 1)
    elif kind == "0 to 1":
        space, network = spaces.Box(0, 1, (4, 36, 40)), "nature_cnn"
        observation = images.astype(np.float32) / 255
    policy = Policy(space, CHOICE, NetworkParameters(network=network))
    params = random_weights(policy)
    named = policy.named(params)
    assert named["torso/Dense_0/kernel"].shape == (1 * 1 * 64, 512)  # shared, and one layer
    run = jax.jit(lambda p, x: policy(p, policy.features(x), None))
    out = run(params, observation)
    expected = forward(policy, named, images / 255)
    assert np.abs(expected).max() > 0.02
    np.testing.assert_allclose(out.outputs, expected, atol=1e-6)
    one = run(params, observation[0])
    np.testing.assert_allclose(one.outputs, expected[0], atol=1e-6)
    assert one.value.shape == ()
    # twice as bright: neither clipped nor normalised
    assert np.abs(forward(policy, named, images / 127) - expected).max() > 0.005


def test_images_stay_bytes_until_the_network():
    features = observation_features(IMAGE, draw((3, 2, 4, 36, 40), np.uint8), "auto")
    assert isinstance(features, Features)
    assert features.images[0].dtype == np.uint8
    assert features.images[0].shape == (3, 2, 4, 36, 40)
    assert features.vector.shape == (3, 2, 0)


def test_images_beside_vectors():
    space = spaces.Dict({"b": spaces.Discrete(2), "a": IMAGE, "c": spaces.Box(-9, 9, (3,))})
    policy = Policy(space, CHOICE, NetworkParameters(hidden_sizes=(8,)))
    assert policy.num_features == 5
    observation = {
        "a": draw((6, 4, 36, 40), np.uint8),
        "b": np.array([0, 1] * 3),
        "c": draw((6, 3), np.float32),
    }
    features = policy.features(observation)
    assert isinstance(features, Features)
    np.testing.assert_array_equal(features.vector[:, :2], np.eye(2)[observation["b"]])
    np.testing.assert_array_equal(features.vector[:, 2:], observation["c"])
    np.testing.assert_array_equal(features.images[0], observation["a"])

    params = random_weights(policy)
    assert policy.named(params)["torso/Dense_0/kernel"].shape == (5 + 64, 8)
    statistics = RunningStatistics(np.float32(4), np.full(5, 2.0), np.full(5, 16.0))
    run = jax.jit(lambda features, statistics: policy(params, features, statistics).outputs)
    out = run(features, statistics)
    normal = features._replace(vector=(features.vector - 2) / 2)
    np.testing.assert_allclose(out, run(normal, None), atol=1e-6)
    for name in observation:  # all of it is seen
        other = policy.features({**observation, name: observation[name][::-1]})
        assert not np.allclose(run(other, statistics), out, atol=1e-6)


def test_separate_networks_share_the_convolutions_only():
    policy = Policy(IMAGE, CHOICE, NetworkParameters(hidden_sizes=(8,), shared_network=False))
    params = random_weights(policy)
    features = policy.features(draw((4, 4, 36, 40), np.uint8))
    value = jax.jit(jax.grad(lambda p: policy(p, features, None).value.sum()))
    gradient = policy.named(value(params))
    torso = gradient["torso/Dense_0/kernel"]
    assert not torso[0].any()
    assert torso[1].any()
    assert gradient["cnn_0/Convolution_0/kernel"].any()


def test_initial_kernels_are_orthogonal():
    named = (policy := Policy(IMAGE, CHOICE, NetworkParameters())).named(policy.init(0))
    kernels = [named[f"cnn_0/Convolution_{i}/kernel"] for i in range(3)]
    assert [kernel.shape for kernel in kernels] == [(8, 8, 4, 32), (4, 4, 32, 64), (3, 3, 64, 64)]
    for kernel in kernels:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        np.testing.assert_allclose(matrix.T @ matrix, 2 * np.eye(matrix.shape[1]), atol=1e-5)
    params = policy.init(0)
    np.testing.assert_array_equal(policy.ravel(policy.named(params)), params)


def test_bfloat16_is_close_to_float32():
    exact, rough = (
        Policy(IMAGE, CHOICE, NetworkParameters(precision=precision, hidden_sizes=(16,)))
        for precision in ("float32", "bfloat16")
    )
    params = random_weights(exact)
    observation = draw((CHUNK + 2, 4, 36, 40), np.uint8)
    results = []
    for policy in (exact, rough):

        def loss(p, policy=policy):
            out = policy(p, policy.features(observation), None)
            return jnp.square(out.value).mean(), out.value

        gradient, value = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert gradient.dtype == value.dtype == np.float32
        results.append((np.asarray(gradient), np.asarray(value)))
    for ours, theirs in zip(*results, strict=True):
        apart = np.abs(ours - theirs).max() / np.abs(ours).max()
        assert 1e-4 < apart < 0.05


def test_what_counts_as_an_image():
    def num_features(space: spaces.Space, network: Any = "auto") -> int:
        return Policy(space, CHOICE, NetworkParameters(network=network)).num_features

    assert num_features(IMAGE) == 0
    assert num_features(IMAGE, "mlp") == 4 * 36 * 40
    assert num_features(spaces.Box(0, 1, (4, 36, 40))) == 4 * 36 * 40  # no bytes: no image
    assert num_features(spaces.Box(0, 1, (4, 36, 40)), "nature_cnn") == 0
    assert num_features(spaces.Box(0, 255, (36, 40), np.uint8)) == 36 * 40


@pytest.mark.parametrize(
    ("space", "network", "words"),
    [
        (
            spaces.Box(0, 255, (4, 16, 40), np.uint8),
            "auto",
            "images of 16 x 40 pixels are too small .* convolution 2 of 3 is of 4 x 4 and gets "
            "3 x 9; give at least 36 x 36, or use network mlp",
        ),
        (
            spaces.Tuple((CHOICE, spaces.Box(0, 255, (7, 7, 3), np.uint8))),
            "auto",
            "images of 7 x 7 pixels .* convolution 1 of 3 is of 8 x 8 and gets 7 x 7",
        ),
        (spaces.Box(-1, 1, (3,)), "nature_cnn", "takes images, .* has none: use network mlp"),
    ],
)
def test_what_the_cnn_cannot_take_is_refused(space, network, words):
    with pytest.raises(UserError, match=words):
        Policy(space, CHOICE, NetworkParameters(network=network))
    Policy(space, CHOICE, NetworkParameters(network="mlp"))
