"""Networks against a forward pass written in NumPy; observations as feature vectors."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from gymnasium import spaces

from starling.errors import UserError
from starling.networks.features import normalize, observation_features
from starling.networks.network_parameters import NetworkParameters
from starling.networks.normalization import RunningStatistics
from starling.networks.policy import Policy

BOX = spaces.Box(-np.inf, np.inf, (5,))

ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def forward(weights: dict[str, np.ndarray], x: np.ndarray, activation, layers: int):
    """Outputs and values, computed in float64, of separate or shared networks."""

    def hidden(net):
        h = x
        for layer in range(layers):
            kernel, bias = (weights[f"torso/Dense_{layer}/{n}"] for n in ("kernel", "bias"))
            if net is not None:
                kernel, bias = kernel[net], bias[net]
            h = activation(h @ kernel.astype(float) + bias)
        return h

    shared = weights["torso/Dense_0/bias"].ndim == 1 if layers else False
    policy, value = hidden(None if shared else 0), hidden(None if shared else 1)
    outputs = policy @ weights["policy/kernel"] + weights["policy/bias"]
    return outputs, (value @ weights["value/kernel"] + weights["value/bias"])[..., 0]


def random_weights(policy: Policy, scale: float = 0.7) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=policy.num_weights) * scale).astype(np.float32)


@pytest.mark.parametrize(
    ("activation", "shared"), [("tanh", True), *((name, False) for name in ACTIVATIONS)]
)
def test_networks_equal_a_forward_pass_in_numpy(activation, shared):
    options = NetworkParameters(hidden_sizes=(7, 4), activation=activation, shared_network=shared)
    policy = Policy(BOX, spaces.Discrete(3), options)
    params = random_weights(policy)
    x = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    out = jax.jit(policy, static_argnums=2)(params, x, None)
    outputs, value = forward(policy.named(params), x, ACTIVATIONS[activation], 2)
    np.testing.assert_allclose(out.outputs, outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.value, value, rtol=1e-4, atol=1e-5)
    single = jax.jit(policy, static_argnums=2)(params, x[0, 0], None)
    np.testing.assert_allclose(single.outputs, outputs[0, 0], rtol=1e-4, atol=1e-5)
    assert single.value.shape == ()


def test_networks_without_hidden_layers_are_linear():
    policy = Policy(BOX, spaces.Discrete(3), NetworkParameters(hidden_sizes=()))
    params = random_weights(policy)
    x = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    out = policy(params, x, None)
    outputs, value = forward(policy.named(params), x, None, 0)
    np.testing.assert_allclose(out.outputs, outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.value, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_separate_networks_share_nothing(shared):
    options = NetworkParameters(hidden_sizes=(7,), shared_network=shared)
    policy = Policy(BOX, spaces.Discrete(3), options)
    x = np.ones((4, 5), np.float32)
    params = random_weights(policy)
    gradient = policy.named(jax.grad(lambda p: policy(p, x, None).value.sum())(params))
    torso = gradient["torso/Dense_0/kernel"]
    assert not gradient["policy/kernel"].any()
    assert gradient["value/kernel"].all()
    if shared:
        assert torso.all()
    else:
        assert not torso[0].any()
        assert torso[1].all()


@pytest.mark.parametrize("shared", [False, True])
def test_initial_weights_are_orthogonal(shared):
    options = NetworkParameters(hidden_sizes=(8, 3), log_std_init=-0.7, shared_network=shared)
    policy = Policy(BOX, spaces.Box(-1, 1, (2,)), options)
    params = policy.init(0)
    assert params.dtype == np.float32
    assert params.shape == (policy.num_weights,)
    named = policy.named(params)
    gains = {"torso": np.sqrt(2), "policy": 0.01, "value": 1.0}
    kernels = [name for name in named if name.endswith("kernel")]
    assert len(kernels) == 4
    for name in kernels:
        matrices = named[name].reshape(-1, *named[name].shape[-2:])
        assert len(matrices) == (2 if name.startswith("torso") and not shared else 1)
        for matrix in matrices:
            small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            gain = gains[name.split("/")[0]]
            expected = gain**2 * np.eye(len(small))
            np.testing.assert_allclose(small @ small.T, expected, atol=1e-5 * gain**2)
    if not shared:  # two different draws
        assert np.abs(np.subtract(*named["torso/Dense_0/kernel"])).max() > 0.1
    assert all(not value.any() for name, value in named.items() if name.endswith("bias"))
    np.testing.assert_allclose(named["log_std"], [-0.7, -0.7])
    np.testing.assert_array_equal(params, policy.init(0))
    assert np.abs(params - policy.init(1)).max() > 0.1


def test_parameters_go_by_name_and_back():
    policy = Policy(BOX, spaces.Box(-1, 1, (2,)), NetworkParameters(hidden_sizes=(4,)))
    params = random_weights(policy)
    named = policy.named(params)
    assert sum(value.size for value in named.values()) == policy.num_weights
    np.testing.assert_array_equal(policy.ravel(dict(reversed(named.items()))), params)
    tree = policy.unravel(params)
    np.testing.assert_array_equal(tree["torso"]["Dense_0"]["kernel"], named["torso/Dense_0/kernel"])


def test_bfloat16_stays_inside_the_networks():
    kinds = [
        Policy(BOX, spaces.Discrete(3), NetworkParameters(hidden_sizes=(16,), precision=precision))
        for precision in ("float32", "bfloat16")
    ]
    params = random_weights(kinds[0], 0.3)
    x = np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)
    exact, rough = (policy(params, x, None) for policy in kinds)
    assert rough.outputs.dtype == rough.value.dtype == np.float32
    assert kinds[1].init(0).dtype == np.float32
    difference = np.abs(exact.outputs - rough.outputs).max()
    assert 1e-5 < difference < 0.05  # computed in bfloat16, and right


# --- observations ------------------------------------------------------------------------------


def one_hot(index: int, size: int) -> list[float]:
    return [float(i == index) for i in range(size)]


DISCRETE = spaces.Discrete(3, start=5)
MULTI = spaces.MultiDiscrete([2, 3], start=[1, -1])
NESTED = spaces.Dict(
    {"z": DISCRETE, "a": spaces.Tuple((spaces.Box(0, 255, (2, 2), np.uint8), MULTI))}
)
EXAMPLES = [
    (spaces.Box(-1, 1, (3,)), np.array([0.5, -1, 1], np.float32), [0.5, -1, 1]),
    (spaces.Box(-1, 1, (), np.float64), np.array(0.25), [0.25]),
    (spaces.Box(0, 255, (2, 2), np.uint8), np.array([[0, 1], [2, 255]], np.uint8), [0, 1, 2, 255]),
    (DISCRETE, np.int64(6), one_hot(1, 3)),
    (MULTI, np.array([2, -1]), one_hot(1, 2) + one_hot(0, 3)),
    (spaces.MultiDiscrete([[2], [2]]), np.array([[0], [1]]), [1, 0, 0, 1]),
    (spaces.MultiBinary((2, 2)), np.array([[1, 0], [1, 1]], np.int8), [1, 0, 1, 1]),
    (
        NESTED,
        {"z": np.int64(7), "a": (np.array([[9, 8], [7, 6]], np.uint8), np.array([1, 1]))},
        [9, 8, 7, 6, *one_hot(0, 2), *one_hot(2, 3), *one_hot(2, 3)],  # "a" comes before "z"
    ),
]


@pytest.mark.parametrize(("space", "observation", "expected"), EXAMPLES, ids=str)
def test_observations_as_vectors(space, observation, expected):
    assert space.contains(observation)
    one = observation_features(space, jax.tree.map(np.asarray, observation))
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, np.array(expected, np.float32))
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (2, 3, *np.shape(x))), observation)
    many = observation_features(space, batch)
    np.testing.assert_array_equal(many, np.broadcast_to(one, (2, 3, len(expected))))
    policy = Policy(space, spaces.Discrete(2), NetworkParameters(hidden_sizes=(4,)))
    assert policy.num_features == len(expected)


def test_keys_of_a_dict_follow_the_space_not_the_observation():
    observation = EXAMPLES[-1][1]
    turned = dict(reversed(observation.items()))
    np.testing.assert_array_equal(
        observation_features(NESTED, turned), observation_features(NESTED, observation)
    )


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(4),
        spaces.Tuple((spaces.Discrete(2), spaces.Text(4))),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Dict({}),
    ],
    ids=["Text", "Text in Tuple", "Sequence", "empty Dict"],
)
def test_observation_spaces_that_cannot_be_handled_are_named(space):
    with pytest.raises(UserError, match=r"observation space .* cannot be handled"):
        Policy(space, spaces.Discrete(2), NetworkParameters())


def test_an_observation_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"observation space Box.* holds no number: observe"):
        Policy(spaces.Box(-1, 1, (2, 0)), spaces.Discrete(2), NetworkParameters())


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (0,)), spaces.MultiDiscrete([])])
def test_actions_without_a_choice_are_refused(space):
    with pytest.raises(UserError, match=r"action space .* leaves nothing to choose"):
        Policy(spaces.Discrete(2), space, NetworkParameters())


def test_normalised_features():
    statistics = RunningStatistics(np.float32(4), np.array([1.0, 0]), np.array([16.0, 4.0]))
    features = np.array([[3.0, -0.5], [1000, -1000]], np.float32)
    expected = [[(3 - 1) / 2, -0.5], [10, -10]]  # standard deviations 2 and 1
    np.testing.assert_allclose(normalize(features, statistics), expected, rtol=1e-6)
    np.testing.assert_array_equal(normalize(features, None), features)
