"""Densities, entropies and samples against numerical integration and formulas of their own."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from starling.envs.spaces import choice_counts
from starling.errors import UserError
from starling.networks.distributions import make_distribution

SAMPLES = 40_000
NOTHING = jnp.zeros(0)


def run(function, *args):
    """One compiled program (the single operations would be compiled one by one), in NumPy."""
    return jax.tree.map(np.asarray, jax.jit(function)(*args))


def draw(distribution, outputs, parameters=NOTHING, mask=None, samples=SAMPLES):
    """Raw actions `[samples, ...]` for one row of outputs."""

    def program(outputs, parameters, mask):
        noise = distribution.noise(jax.random.key(0), (samples,))
        rows = jnp.broadcast_to(outputs, (samples, outputs.size))
        return distribution.sample(rows, parameters, noise, mask)

    return run(program, jnp.asarray(outputs), jnp.asarray(parameters), mask)


def log_probs(distribution, outputs, parameters, raw, mask=None):
    """Log-probabilities of many raw actions under one row of outputs."""
    count = len(jax.tree.leaves(raw)[0])
    rows = np.broadcast_to(np.asarray(outputs, np.float32), (count, len(outputs)))
    parameters = np.asarray(parameters, np.float32)
    return run(distribution.log_prob, rows, parameters, raw, mask).astype(np.float64)


def entropy_of(distribution, outputs, parameters=NOTHING, mask=None):
    """Entropy under one row of outputs."""
    outputs, parameters = np.asarray(outputs, np.float32), np.asarray(parameters, np.float32)
    return float(run(distribution.entropy, outputs, parameters, mask))


def assert_frequencies(counts, probabilities):
    """Every count is within 4.5 standard errors of what its probability predicts."""
    counts, probabilities = np.asarray(counts), np.asarray(probabilities)
    total = counts.sum()
    error = np.sqrt(probabilities * (1 - probabilities) * total)
    assert (np.abs(counts - probabilities * total) <= 4.5 * error + 1e-9).all()


def normal_density(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


# --- choices -----------------------------------------------------------------------------------

LOGITS = np.array([0.3, -1.2, 2.0, 0.5, 0.0], np.float32)


def test_categorical_is_a_softmax():
    distribution = make_distribution(spaces.Discrete(5))
    got = log_probs(distribution, LOGITS, NOTHING, jnp.arange(5))
    np.testing.assert_allclose(got, np.log(softmax(LOGITS)), rtol=1e-5)


def test_categorical_samples_by_its_probabilities():
    distribution = make_distribution(spaces.Discrete(5))
    raw = draw(distribution, LOGITS)
    assert raw.dtype == jnp.int32
    assert raw.shape == (SAMPLES,)
    assert_frequencies(np.bincount(raw, minlength=5), softmax(LOGITS))
    with pytest.raises(AssertionError):  # the test tells other probabilities
        assert_frequencies(np.bincount(raw, minlength=5), softmax(LOGITS * 1.1))


def test_multi_discrete_is_a_product_of_choices():
    space = spaces.MultiDiscrete([[2, 3], [4, 2]])
    outputs = np.random.default_rng(0).normal(size=11).astype(np.float32)
    distribution = make_distribution(space)
    parts = [softmax(part) for part in np.split(outputs, [2, 5, 9])]
    choices = list(itertools.product(range(2), range(3), range(4), range(2)))
    raw = np.array(choices).reshape(-1, 2, 2)
    expected = [math.prod(p[c] for p, c in zip(parts, choice, strict=True)) for choice in choices]
    got = np.exp(log_probs(distribution, outputs, NOTHING, raw))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got.sum() == pytest.approx(1, abs=1e-5)

    sampled = draw(distribution, outputs).reshape(-1, 4)
    numbers = np.ravel_multi_index(sampled.T, (2, 3, 4, 2))
    assert_frequencies(np.bincount(numbers, minlength=48), expected)

    assert entropy_of(distribution, outputs) == pytest.approx(
        -np.sum(expected * np.log(expected)), rel=1e-5
    )
    mode = distribution.mode(jnp.asarray(outputs), NOTHING, None)
    np.testing.assert_array_equal(mode.reshape(-1), choices[int(np.argmax(expected))])


def test_multi_binary_is_a_product_of_coins():
    outputs = np.array([0.5, -2.0, 0.0, 3.0], np.float32)
    distribution = make_distribution(spaces.MultiBinary((2, 2)))
    one = 1 / (1 + np.exp(-outputs.astype(np.float64)))
    choices = np.array(list(itertools.product([0, 1], repeat=4)))
    expected = np.where(choices == 1, one, 1 - one).prod(1)
    raw = choices.astype(np.int8).reshape(-1, 2, 2)
    got = np.exp(log_probs(distribution, outputs, NOTHING, raw))
    np.testing.assert_allclose(got, expected, rtol=1e-5)

    sampled = draw(distribution, outputs).reshape(-1, 4)
    assert_frequencies(
        np.bincount(np.ravel_multi_index(sampled.T, [2] * 4), minlength=16), expected
    )
    assert entropy_of(distribution, outputs) == pytest.approx(
        -np.sum(expected * np.log(expected)), rel=1e-5
    )
    np.testing.assert_array_equal(
        distribution.mode(jnp.asarray([1.0, -1, 2, -3]), NOTHING, None), [[1, 0], [1, 0]]
    )


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_certain_coins_have_finite_numbers(logit):
    distribution = make_distribution(spaces.MultiBinary(1))
    outputs = jnp.full((1, 1), logit)
    assert entropy_of(distribution, outputs[0]) == pytest.approx(0, abs=1e-6)
    likely = jnp.full((1, 1), int(logit > 0))
    assert distribution.log_prob(outputs, NOTHING, likely, None)[0] == 0
    assert distribution.log_prob(outputs, NOTHING, 1 - likely, None)[0] == -200


# --- Gaussians ---------------------------------------------------------------------------------


@pytest.mark.parametrize("log_std", [-1.5, 0.0, 0.7])
def test_clipped_gaussian_has_the_density_of_a_gaussian(log_std):
    distribution = make_distribution(spaces.Box(-2, 5, (1,)))
    u = np.linspace(-12, 12, 20_001)
    got = np.exp(log_probs(distribution, [0.4], [log_std], u[:, None]))
    np.testing.assert_allclose(got, normal_density(u, 0.4, math.exp(log_std)), atol=1e-5)
    assert np.trapezoid(got, u) == pytest.approx(1, abs=1e-4)
    entropy = entropy_of(distribution, [0.4], [log_std])
    terms = np.where(got > 0, got * np.log(np.maximum(got, 1e-300)), 0)
    assert entropy == pytest.approx(-np.trapezoid(terms, u), abs=1e-3)


def test_gaussian_log_probs_of_dimensions_add_up():
    distribution = make_distribution(spaces.Box(-1, 1, (2, 2)))
    rng = np.random.default_rng(0)
    mean, log_std, u = rng.normal(size=(3, 4))
    expected = np.log(normal_density(u, mean, np.exp(log_std))).sum()
    got = log_probs(distribution, mean, log_std, u.reshape(1, 2, 2))
    assert got[0] == pytest.approx(expected, rel=1e-4)


def squashed_density(a, mean, std, low, high, jacobian=True):
    """Density of low + (high - low) (1 + tanh u) / 2 at a, for Gaussian u: a formula for a."""
    unit = 2 * (a - low) / (high - low) - 1
    u = 0.5 * np.log((1 + unit) / (1 - unit))
    du_da = 2 / (high - low) / (1 - unit**2)
    return normal_density(u, mean, std) * (du_da if jacobian else 1)


SQUASHED = [(0.0, 0.0), (1.3, -0.5), (-0.7, -1.5), (0.5, 0.4)]


@pytest.mark.parametrize(("mean", "log_std"), SQUASHED)
def test_squashed_gaussian_has_a_density_over_the_environments_actions(mean, log_std):
    low, high = -2.0, 5.0
    distribution = make_distribution(spaces.Box(low, high, (1,)), squash=True)
    # Even in u is dense near the bounds, where the density rises steeply.
    u = np.linspace(mean - 8 * math.exp(log_std), mean + 8 * math.exp(log_std), 20_001)
    u = u[np.abs(u) < 8]
    a = (low + high) / 2 + (high - low) / 2 * np.tanh(u)
    got = np.exp(log_probs(distribution, [mean], [log_std], u[:, None]))
    expected = squashed_density(a, mean, math.exp(log_std), low, high)
    np.testing.assert_allclose(got, expected, rtol=2e-3)
    assert np.trapezoid(got, a) == pytest.approx(1, abs=2e-3)
    # Without the Jacobian, and with that of tanh alone, it would be no density.
    without = squashed_density(a, mean, math.exp(log_std), low, high, jacobian=False)
    assert abs(np.trapezoid(without, a) - 1) > 0.1
    assert abs(np.trapezoid(expected * (high - low) / 2, a) - 1) > 0.3


@pytest.mark.parametrize(("mean", "log_std"), SQUASHED)
def test_squashed_entropy_is_the_integral(mean, log_std):
    low, high = -2.0, 5.0
    distribution = make_distribution(spaces.Box(low, high, (2,)), squash=True)
    std = math.exp(log_std)
    u = np.linspace(mean - 10 * std, mean + 10 * std, 40_001)
    log_jacobian = math.log((high - low) / 2) + 2 * (math.log(2) - u - np.log1p(np.exp(-2 * u)))
    log_density = np.log(normal_density(u, mean, std)) - log_jacobian
    expected = -np.trapezoid(normal_density(u, mean, std) * log_density, u)
    entropy = entropy_of(distribution, [mean, mean], [log_std, log_std])
    assert entropy == pytest.approx(2 * expected, abs=5e-3)


def test_squashed_samples_fill_the_histogram_of_their_density():
    low, high, mean, log_std = -2.0, 5.0, 0.4, -0.3
    distribution = make_distribution(spaces.Box(low, high, (1,)), squash=True)
    raw = draw(distribution, np.array([mean], np.float32), np.array([log_std], np.float32))
    actions = np.asarray(distribution.to_env(raw))[:, 0]
    edges = np.linspace(low, high, 21)
    fine = np.linspace(low + 1e-9, high - 1e-9, 200_001)
    cumulative = np.cumsum(squashed_density(fine, mean, math.exp(log_std), low, high))
    cumulative /= cumulative[-1]
    probabilities = np.diff(np.interp(edges, fine, cumulative, left=0, right=1))
    assert_frequencies(np.histogram(actions, edges)[0], probabilities)


@pytest.mark.parametrize("squash", [False, True])
def test_gaussian_samples_have_their_moments(squash):
    space = spaces.Box(-1, 1, (2,))
    distribution = make_distribution(space, squash)
    mean, std = np.array([0.5, -1.0], np.float32), np.array([0.2, 3.0], np.float32)
    raw = draw(distribution, mean, np.log(std))
    z = (raw - mean) / std
    assert np.abs(z.mean(0)).max() < 4.5 / math.sqrt(SAMPLES)
    assert np.abs(z.var(0) - 1).max() < 4.5 * math.sqrt(2 / SAMPLES)
    assert abs((z[:, 0] * z[:, 1]).mean()) < 4.5 / math.sqrt(SAMPLES)  # independent of each other
    np.testing.assert_array_equal(distribution.mode(jnp.asarray(mean), NOTHING, None), mean)


@pytest.mark.parametrize("u", [-40.0, -9.0, 9.0, 40.0])
def test_squashed_log_prob_is_finite_far_out(u):
    """log(1 - tanh(u)^2) written plainly is -inf from |u| = 9 on."""
    distribution = make_distribution(spaces.Box(-1, 1, (1,)), squash=True)

    def log_prob(mean):
        return distribution.log_prob(mean, jnp.zeros(1), jnp.array([[u]]), None)[0]

    mean = jnp.array([[u - 1]])
    expected = math.log(normal_density(1.0, 0, 1)) - (math.log(4) - 2 * abs(u))
    assert log_prob(mean) == pytest.approx(expected, rel=1e-5)
    assert jax.grad(log_prob)(mean)[0, 0] == pytest.approx(1, rel=1e-4)


# --- masks -------------------------------------------------------------------------------------


def test_masked_choices_have_renormalised_probabilities():
    distribution = make_distribution(spaces.Discrete(5))
    mask = jnp.array([1, 1, 0, 1, 0], jnp.int8)  # without the most probable
    allowed = [0, 1, 3]
    expected = softmax(LOGITS[allowed])
    got = log_probs(distribution, LOGITS, NOTHING, jnp.array(allowed), mask)
    np.testing.assert_allclose(np.exp(got), expected, rtol=1e-5)
    raw = draw(distribution, LOGITS, mask=mask)
    counts = np.bincount(raw, minlength=5)
    assert counts[2] == counts[4] == 0
    assert_frequencies(counts[allowed], expected)
    assert distribution.mode(jnp.asarray(LOGITS), NOTHING, mask) == 3
    entropy = entropy_of(distribution, LOGITS, mask=mask)
    assert entropy == pytest.approx(-np.sum(expected * np.log(expected)), rel=1e-5)


def test_masks_differ_by_row_and_by_choice():
    distribution = make_distribution(spaces.MultiDiscrete([2, 3]))
    mask = jnp.array([[1, 0, 1, 1, 1], [1, 1, 0, 0, 1]], bool)
    outputs = jnp.array([[0.0, 50, 1, 2, 3], [0, 50, 9, 9, 3]])
    np.testing.assert_array_equal(distribution.mode(outputs, NOTHING, mask), [[0, 2], [1, 2]])

    def sample(outputs, mask):
        noise = distribution.noise(jax.random.key(0), (500, 2))
        return distribution.sample(outputs + jnp.zeros((500, 1, 1)), NOTHING, noise, mask)

    raw = run(sample, outputs, mask)
    assert set(np.unique(raw[:, 0, 0])) == {0}
    assert set(np.unique(raw[:, 1, 1])) == {2}
    assert set(np.unique(raw[:, 0, 1])) == {0, 1, 2}


def test_gradients_with_a_mask_are_finite_and_leave_forbidden_logits_alone():
    distribution = make_distribution(spaces.Discrete(5))
    mask = jnp.array([True, False, True, True, False])

    def objective(logits):
        log_prob = distribution.log_prob(logits, NOTHING, jnp.array([3]), mask)
        return (log_prob + distribution.entropy(logits, NOTHING, mask)).sum()

    gradient = np.asarray(jax.grad(objective)(jnp.asarray(LOGITS)[None]))[0]
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[[1, 4]], 0)
    assert np.abs(gradient[[0, 2, 3]]).min() > 1e-3


# --- nested spaces -----------------------------------------------------------------------------

NESTED = spaces.Dict(
    {
        "which": spaces.Discrete(3),
        "inner": spaces.Tuple((spaces.Box(-1, 3, (2,)), spaces.MultiBinary(2))),
        "axes": spaces.MultiDiscrete([2, 2]),
    }
)


def nested_parts():
    """In the order of the space: outputs, parameters and mask of each leaf."""
    rng = np.random.default_rng(3)
    widths = {"axes": 4, "box": 2, "bits": 2, "which": 3}
    names = []
    for key in NESTED.spaces:
        names += ["box", "bits"] if key == "inner" else [key]
    outputs = {name: rng.normal(size=widths[name]).astype(np.float32) for name in names}
    return names, outputs, np.array([-0.4, 0.3], np.float32)


@pytest.mark.parametrize("squash", [False, True])
def test_nested_log_prob_and_entropy_are_the_sums_of_the_parts(squash):
    names, outputs, log_std = nested_parts()
    masks = {"axes": np.array([1, 0, 1, 1]), "which": np.array([1, 0, 1])}
    mask = jnp.asarray(np.concatenate([masks[name] for name in names if name in masks]))
    distribution = make_distribution(NESTED, squash)
    assert distribution.num_outputs == 11
    assert distribution.num_logits == 7
    assert distribution.num_parameters == 2
    raw = {
        "which": np.array([2]),
        "inner": (np.array([[0.2, -0.9]]), np.array([[1, 0]])),
        "axes": np.array([[0, 1]]),
    }
    which = softmax(outputs["which"][[0, 2]])
    axes = softmax(outputs["axes"][2:])
    coins = 1 / (1 + np.exp(-outputs["bits"].astype(float)))
    u = np.array([0.2, -0.9])
    density = normal_density(u, outputs["box"], np.exp(log_std))
    if squash:
        a = 1 + 2 * np.tanh(u)
        density = squashed_density(a, outputs["box"], np.exp(log_std), -1, 3)
    expected = np.log(which[1] * axes[1] * coins[0] * (1 - coins[1]) * density.prod())
    flat = np.concatenate([outputs[name] for name in names])
    got = log_probs(distribution, flat, log_std, raw, mask)
    assert got[0] == pytest.approx(expected, rel=1e-4)

    entropy = entropy_of(distribution, flat, log_std, mask)
    discrete = -sum((p * np.log(p)).sum() for p in (which, axes, coins, 1 - coins))
    box = make_distribution(NESTED["inner"][0], squash)
    continuous = entropy_of(box, outputs["box"], log_std)
    assert entropy == pytest.approx(discrete + continuous, rel=1e-4)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4),
        spaces.MultiDiscrete([[2, 3]]),
        spaces.MultiBinary(3),
        spaces.Box(0, 1),
        NESTED,
    ],
    ids=str,
)
def test_environments_give_masks_of_this_width(space):
    assert make_distribution(space).num_logits == sum(choice_counts(space))


def test_nested_samples_have_the_structure_and_the_masks_of_the_space():
    names, outputs, log_std = nested_parts()
    distribution = make_distribution(NESTED)
    masks = {"axes": np.array([0, 1, 1, 1]), "which": np.array([1, 1, 0])}
    mask = jnp.asarray(np.concatenate([masks[name] for name in names if name in masks]))
    flat = np.concatenate([outputs[name] for name in names])
    raw = draw(distribution, flat, log_std, mask, samples=2000)
    assert set(raw) == {"which", "inner", "axes"}
    assert isinstance(raw["inner"], tuple)
    assert set(np.unique(raw["which"])) == {0, 1}
    assert set(np.unique(raw["axes"][:, 0])) == {1}
    assert set(np.unique(raw["axes"][:, 1])) == {0, 1}
    # Leaves draw from noise of their own: nothing goes along with anything else.
    columns = [raw["which"], raw["axes"][:, 1], *raw["inner"][0].T, *raw["inner"][1].T]
    correlations = np.corrcoef(np.array(columns, np.float64)) - np.eye(6)
    assert np.abs(correlations).max() < 4.5 / math.sqrt(2000)


# --- what the environment gets -----------------------------------------------------------------

ALL_KINDS = [
    spaces.Discrete(4),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([2, 5], start=[3, -1]),
    spaces.MultiDiscrete([[2, 5], [3, 1]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary((2, 3)),
    spaces.Box(-1, 1, (3,)),
    spaces.Box(np.array([-1.0, 0.1]), np.array([0.7, 0.3]), dtype=np.float64),
    spaces.Box(-2, 7, (), np.float32),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Box(-3, 5, (2,), np.int64),
    spaces.Box(-1, 1, (2,), np.float16),
    spaces.Box(np.array([-1, 2], np.float32), np.array([1, 2], np.float32)),
    spaces.Box(-np.inf, np.inf, (2,)),
    spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([np.inf, 1.0], np.float32)),
    NESTED,
]


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("space", ALL_KINDS, ids=str)
def test_actions_lie_in_the_space(space, squash):
    if squash and isinstance(space, spaces.Box) and not space.is_bounded():
        with pytest.raises(UserError, match="squash_actions needs finite action bounds"):
            make_distribution(space, squash)
        return
    distribution = make_distribution(space, squash)
    rng = np.random.default_rng(0)
    # Wide noise, drawn here since to compile JAX's takes a second for each space.
    shapes = jax.eval_shape(lambda: distribution.noise(jax.random.key(0), (300,)))
    noise = jax.tree.map(lambda x: rng.normal(0, 5, x.shape).astype(np.float32), shapes)
    outputs = np.zeros((300, distribution.num_outputs), np.float32)
    parameters = np.zeros(distribution.num_parameters, np.float32)

    def actions_from(noise):
        raw = distribution.sample(outputs, parameters, noise, None)
        return distribution.to_env(raw), distribution.log_prob(outputs, parameters, raw, None)

    actions, log_prob = run(actions_from, noise)
    assert np.isfinite(log_prob).all()
    for i in range(300):
        action = jax.tree.map(lambda x, i=i: np.asarray(x[i]), actions)
        assert space.contains(action), action


def test_starts_are_added():
    distribution = make_distribution(spaces.Discrete(4, start=-2))
    np.testing.assert_array_equal(distribution.to_env(jnp.arange(4)), [-2, -1, 0, 1])
    distribution = make_distribution(spaces.MultiDiscrete([2, 5], start=[3, -1]))
    np.testing.assert_array_equal(distribution.to_env(jnp.array([[1, 4]])), [[4, 3]])


def test_actions_are_scaled_to_the_bounds():
    space = spaces.Box(np.array([-2, 0], np.float32), np.array([5, 1], np.float32))
    plain, squashed = make_distribution(space), make_distribution(space, squash=True)
    raw = jnp.array([[0.0, 0.0], [-1.0, 1.0], [0.5, -0.5], [3.0, -7.0]])
    expected = [[1.5, 0.5], [-2, 1], [1.5 + 3.5 / 2, 0.25], [5, 0]]
    np.testing.assert_allclose(plain.to_env(raw), expected, rtol=1e-6)
    expected = np.array([1.5, 0.5]) + np.array([3.5, 0.5]) * np.tanh(np.asarray(raw, float))
    np.testing.assert_allclose(squashed.to_env(raw), expected, rtol=1e-5, atol=1e-6)


def test_unbounded_actions_are_the_raw_ones_clipped():
    low, high = np.array([-np.inf, 0, -np.inf]), np.array([np.inf, np.inf, 1])
    distribution = make_distribution(spaces.Box(low, high, dtype=np.float64))
    raw = jnp.array([[-70.0, -1.0, 2.5], [70.0, 1.0, 0.5]])
    np.testing.assert_array_equal(distribution.to_env(raw), [[-70, 0, 1], [70, 1, 0.5]])


def test_integer_boxes_get_every_integer():
    distribution = make_distribution(spaces.Box(-3, 5, (1,), np.int64))
    actions = distribution.to_env(jnp.linspace(-1, 1, 1000)[:, None])
    np.testing.assert_array_equal(np.unique(actions), np.arange(-3, 6))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Text(5)}),
        spaces.Tuple(()),
        spaces.Dict({}),
    ],
    ids=str,
)
def test_spaces_that_cannot_be_handled_are_named(space):
    with pytest.raises(UserError, match=r"action space .* cannot be handled"):
        make_distribution(space)
