"""DQN's numbers against NumPy, and proof that its usual mistakes would be noticed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from dqn_oracle import forward, loss_of, target
from gymnasium import spaces

from starling.algorithms.acting import Acting
from starling.algorithms.dqn import NUM_SUMS, DQNAlgorithm
from starling.algorithms.dqn_parameters import DQNParameters
from starling.errors import UserError
from starling.networks.network_parameters import LayerParameters
from starling.networks.q_network import QNetwork
from starling.storage.batch import Batch

OBSERVATIONS = spaces.Box(-3, 3, (3,))
CHOICE = spaces.Discrete(4)
BRANCHES = spaces.MultiDiscrete([2, 4, 3])
NETWORK = LayerParameters(hidden_sizes=(5,), activation="tanh")
B = 6


def make(actions: spaces.Space = CHOICE, **settings: Any) -> DQNAlgorithm:
    options = DQNParameters(**{"max_grad_norm": None, **settings})
    return DQNAlgorithm(OBSERVATIONS, actions, options, NETWORK)


def sizes_of(actions: spaces.Space) -> list[int]:
    return [int(actions.n)] if isinstance(actions, spaces.Discrete) else actions.nvec.tolist()


def batch_of(actions: spaces.Space, seed: int = 0, k: int = 1, masks: bool = False) -> Batch:
    """Random transitions `[k, B, ...]`: the first of each terminated, the second cut short."""
    rng = np.random.default_rng(seed)
    shape = (k, B)
    sizes = sizes_of(actions)
    raw = np.stack([rng.integers(0, n, shape) for n in sizes], -1).astype(np.int32)
    discounts = np.full(shape, 0.9**3, np.float32)
    discounts[:, 0], discounts[:, 1] = 0.0, 0.9
    mask = None
    if masks:
        mask = rng.random((*shape, sum(sizes))) < 0.5
        for first in np.cumsum([0, *sizes[:-1]]):
            mask[..., first] |= ~mask[..., first + 1]
    return Batch(
        rng.normal(size=(*shape, 3)).astype(np.float32),
        raw if len(sizes) > 1 else raw[..., 0],
        (3 * rng.normal(size=shape)).astype(np.float32),
        discounts,
        rng.normal(size=(*shape, 3)).astype(np.float32),
        mask,
        rng.uniform(0.1, 1.0, shape).astype(np.float32),
        None,  # type: ignore[arg-type]
    )


def row(batch: Batch, k: int) -> Batch:
    return jax.tree.map(lambda x: x[k], batch)


def expected_loss(
    algorithm: DQNAlgorithm, params: np.ndarray, target_params: np.ndarray, batch: Batch, **how: Any
) -> tuple[float, np.ndarray]:
    """The oracle's loss, and the absolute TD errors `[B]`."""
    options, named = algorithm.options, algorithm.policy.named
    sizes = how.pop("sizes")
    how = {"double": options.double, "weights": batch.weights, "masked": True, **how}
    total, errors = 0.0, []
    for i in range(B):

        def q(which: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
            return forward(named(which), x[i], sizes, options.dueling)  # noqa: B023

        masks = batch.next_action_masks
        y = target(
            q(params, batch.next_observations),
            q(target_params, batch.next_observations),
            float(batch.returns[i]),
            float(batch.discounts[i]),
            double=how["double"],
            mask=masks[i] if masks is not None and how["masked"] else None,
        )
        chosen = np.atleast_1d(batch.actions[i])
        own = [v[a] for v, a in zip(q(params, batch.observations), chosen, strict=True)]
        differences = y - np.array(own)
        total += how["weights"][i] * np.mean([loss_of(x, options.loss) for x in differences])
        errors.append(np.abs(differences).mean())
    return total / B, np.array(errors)


CASES = [
    (actions, dueling, double, loss, masks)
    for actions in (CHOICE, BRANCHES)
    for dueling, double, loss, masks in (
        (False, True, "huber", True),
        (True, True, "mse", True),
        (True, False, "huber", False),
        (False, False, "mse", True),
    )
]


@pytest.mark.parametrize(("actions", "dueling", "double", "loss", "masks"), CASES)
def test_loss_and_errors_are_the_oracles(actions, dueling, double, loss, masks):
    algorithm = make(actions, dueling=dueling, double=double, loss=loss)
    params, other = (np.asarray(algorithm.policy.init(seed)) * 3 for seed in (1, 2))
    batch = row(batch_of(actions, masks=masks), 0)
    sizes = sizes_of(actions)
    found, (errors, numbers) = jax.jit(algorithm.loss)(params, other, None, batch)
    expected, expected_errors = expected_loss(algorithm, params, other, batch, sizes=sizes)
    assert found == pytest.approx(expected, rel=1e-5)
    assert errors == pytest.approx(expected_errors, rel=1e-4)
    assert numbers[0] == pytest.approx(expected, rel=1e-5)
    assert numbers[2] == pytest.approx(expected_errors.mean(), rel=1e-4)


@pytest.mark.parametrize("actions", [CHOICE, BRANCHES], ids=["one", "several"])
@pytest.mark.parametrize(
    "mistake", ["not double", "through termination", "truncation ends", "no weights", "no target",
                "no masks"]
)  # fmt: skip
def test_a_wrong_variant_has_another_loss(actions, mistake):
    algorithm = make(actions, loss="mse")
    params, other = (np.asarray(algorithm.policy.init(seed)) * 8 for seed in (1, 2))
    batch, how = row(batch_of(actions, seed=3, masks=True), 0), {}
    given, target_params = batch, other
    if mistake == "not double":
        how = {"double": False}
    elif mistake == "no weights":
        how = {"weights": np.ones(B)}
    elif mistake == "no masks":
        how = {"masked": False}
    elif mistake == "no target":
        target_params = params
    elif mistake == "through termination":
        given = batch._replace(discounts=np.where(batch.discounts == 0, 0.9, batch.discounts))
    else:
        given = batch._replace(
            discounts=np.where(batch.discounts == np.float32(0.9), 0.0, batch.discounts)
        )
    found, _ = algorithm.loss(params, other, None, batch)
    wrong, _ = expected_loss(
        algorithm, params, target_params, given, sizes=sizes_of(actions), **how
    )
    assert abs(float(found) - wrong) > 1e-3 * abs(wrong)


def test_the_gradient_leaves_the_target_alone():
    algorithm = make(dueling=True)
    params, other = (np.asarray(algorithm.policy.init(seed)) * 3 for seed in (1, 2))
    batch, sizes = row(batch_of(CHOICE), 0), sizes_of(CHOICE)
    gradient = np.asarray(jax.grad(algorithm.loss, has_aux=True)(params, other, None, batch)[0])
    y = np.asarray(algorithm.targets(params, other, None, batch))

    def loss(params: np.ndarray) -> float:  # with y held fast
        total = 0.0
        for i in range(B):
            q = forward(algorithm.policy.named(params), batch.observations[i], sizes, True)
            error = float(y[i]) - float(q[0][batch.actions[i]])
            total += float(batch.weights[i]) * loss_of(error, "huber")
        return total / B

    params = params.astype(np.float64)
    for place in np.random.default_rng(0).choice(len(params), 12, replace=False):
        step = np.zeros_like(params)
        step[place] = 1e-5
        slope = (loss(params + step) - loss(params - step)) / 2e-5
        assert gradient[place] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def learn(algorithm: DQNAlgorithm, state: Any, batches: Batch, count: int, progress: float = 0.0):
    return algorithm.update(
        state, np.zeros(NUM_SUMS, np.float32), batches, np.int32(count), np.float32(progress)
    )


def test_several_steps_in_a_program_are_the_steps_one_by_one():
    algorithm = make(target_update_interval=2, lr=0.01)
    batches = batch_of(CHOICE, k=4)
    together, _, errors, metrics = learn(algorithm, algorithm.init(0), batches, 3)
    state, each, losses = algorithm.init(0), [], []
    for k in range(3):
        one = jax.tree.map(lambda x, k=k: x[k : k + 1], batches)
        state, _, error, logged = learn(algorithm, state, one, 1)
        each.append(np.asarray(error)[0])
        losses.append(float(logged["train/loss"]))
    np.testing.assert_allclose(together.params, state.params, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(together.target_params, state.target_params, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(errors[:3], each, rtol=1e-4)
    assert not np.asarray(errors[3]).any(), "the fourth was not asked for"
    assert metrics["train/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert int(together.updates) == 3


def test_a_hard_target_is_copied_when_it_is_due():
    algorithm = make(target_update_interval=3)
    state = algorithm.init(0)
    first = np.asarray(state.params)
    batches = batch_of(CHOICE, k=1)
    for step in range(1, 7):
        state = learn(algorithm, state, batches, 1)[0]
        if step % 3 == 0:
            np.testing.assert_array_equal(state.target_params, state.params)
        elif step < 3:
            np.testing.assert_array_equal(state.target_params, first)
        else:
            assert not np.array_equal(state.target_params, state.params)


def test_a_soft_target_follows_by_tau():
    algorithm = make(tau=0.25, target_update_interval=None)
    state = algorithm.init(0)
    before = np.asarray(state.target_params)
    state = learn(algorithm, state, batch_of(CHOICE), 1)[0]
    expected = 0.75 * before + 0.25 * np.asarray(state.params)
    np.testing.assert_allclose(state.target_params, expected, rtol=1e-6, atol=1e-7)
    assert not np.allclose(state.target_params, before, atol=1e-7)


def test_the_learning_rate_falls_where_it_is_to():
    logged = {}
    for schedule in ("constant", "linear"):
        algorithm = make(lr=0.1, lr_schedule=schedule)
        metrics = learn(algorithm, algorithm.init(0), batch_of(CHOICE), 1, progress=0.75)[3]
        logged[schedule] = float(metrics["train/learning_rate"])
    assert logged == pytest.approx({"constant": 0.1, "linear": 0.025})


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    algorithm = make()
    state = algorithm.init(0)
    before = np.asarray(state.params)
    batches = batch_of(CHOICE, k=2)
    spoilt = batches._replace(returns=np.full_like(batches.returns, np.nan))
    state = learn(algorithm, state, spoilt, 2)[0]
    np.testing.assert_array_equal(state.params, before)
    assert (int(state.updates), int(state.skipped), int(state.skipped_in_a_row)) == (0, 1, 1)
    state = learn(algorithm, state, batches, 2)[0]
    assert not np.array_equal(state.params, before)
    assert (int(state.updates), int(state.skipped), int(state.skipped_in_a_row)) == (2, 1, 0)


def test_programs_compile_once():
    algorithm = make(BRANCHES)
    state = algorithm.init(0)
    for count in (2, 1, 2):
        state = learn(algorithm, state, batch_of(BRANCHES, k=2, masks=True), count)[0]
    assert algorithm.update._cache_size() == 1


def act(algorithm: DQNAlgorithm, epsilon: Any, steps: int, n: int, mask: Any = None) -> np.ndarray:
    """Actions `[steps, n, ...]` for one observation, over and over."""
    params = algorithm.policy.init(0)
    acting = Acting(params, None, np.full(n, epsilon, np.float32))
    noise = algorithm.draw_noise(np.uint32(0), np.uint32(0), (steps, n))
    observation = np.ones((n, 3), np.float32)
    return np.stack(
        [algorithm.act(acting, observation, noise, np.uint32(t), mask)[0] for t in range(steps)]
    )


@pytest.mark.parametrize("actions", [CHOICE, BRANCHES], ids=["one", "several"])
def test_epsilon_is_the_share_of_random_actions(actions):
    algorithm = make(actions)
    n, steps = 200, 40
    best = act(algorithm, 0.0, 1, n)[0]
    assert (best == best[0]).all()
    greedy = algorithm.predict(
        algorithm.policy.init(0), None, np.ones((n, 3), np.float32), np.uint32(0), np.uint32(0)
    )
    np.testing.assert_array_equal(greedy, best)
    made = act(algorithm, 0.4, steps, n).reshape(steps, n, -1)
    sizes = sizes_of(actions)
    same = (made == best.reshape(n, -1)).all(-1).mean()
    # Explored is the whole action; at random it is the best one by luck.
    expected = 0.6 + 0.4 / np.prod(sizes)
    assert same == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(n * steps))
    for d, size in enumerate(sizes):
        counts = np.bincount(act(algorithm, 1.0, steps, n).reshape(-1, len(sizes))[:, d])
        assert len(counts) == size
        assert counts / (n * steps) == pytest.approx(1 / size, abs=5 * 0.5 / np.sqrt(n * steps))


def test_each_environment_has_its_own_epsilon():
    algorithm = make()
    made = act(algorithm, np.array([0.0, 1.0, 0.0, 1.0]), 60, 4)
    explored = (made != act(algorithm, 0.0, 1, 4)).any(0)
    assert explored.tolist() == [False, True, False, True]


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_what_a_mask_forbids_is_never_done(epsilon):
    algorithm = make(BRANCHES)
    n = 50
    mask = np.random.default_rng(0).random((n, 9)) < 0.4
    mask[:, [1, 3, 8]] = True
    made = act(algorithm, epsilon, 20, n, mask)
    for d, first in enumerate((0, 2, 6)):
        allowed = mask[np.arange(n)[None], first + made[..., d]]
        assert allowed.all()
    for deterministic in (True, False):
        used = algorithm.predict(
            algorithm.policy.init(0), None, np.ones((n, 3), np.float32), np.uint32(0),
            np.uint32(1), mask, deterministic=deterministic,
        )  # fmt: skip
        assert mask[np.arange(n)[:, None], np.array([0, 2, 6]) + np.asarray(used)].all()


def test_actions_are_counted_from_where_the_space_begins():
    algorithm = make(spaces.Discrete(3, start=-1))
    acting = Acting(algorithm.policy.init(0), None, np.zeros(2, np.float32))
    noise = algorithm.draw_noise(np.uint32(0), np.uint32(0), (1, 2))
    raw, env, _ = algorithm.act(acting, np.ones((2, 3), np.float32), noise, np.uint32(0))
    np.testing.assert_array_equal(env, np.asarray(raw) - 1)


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,)), spaces.MultiBinary(3)], ids=str)
def test_actions_that_cannot_be_counted_are_refused(space):
    with pytest.raises(UserError, match="use algo ppo, or wrap the environment"):
        QNetwork(OBSERVATIONS, space, NETWORK, dueling=False)


def test_statistics_of_observations_change_what_is_seen():
    algorithm = make(normalize_observations=True)
    state = algorithm.init(0)
    seen = 5 + 2 * np.random.default_rng(0).normal(size=(7, 3, 3)).astype(np.float32)
    valid = np.ones((7, 3), bool)
    valid[2] = False
    state = algorithm.observe(state, algorithm.seen(seen, valid))
    rows = seen[valid]
    np.testing.assert_allclose(state.observation_statistics.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.observation_statistics.std, rows.std(0), rtol=1e-4)
    batch = row(batch_of(CHOICE), 0)
    scaled = batch._replace(
        **{
            name: (getattr(batch, name) - rows.mean(0)) / rows.std(0)
            for name in ("observations", "next_observations")
        }
    )
    params, other = state.params, algorithm.policy.init(2)
    found = algorithm.loss(params, other, state.observation_statistics, batch)[0]
    assert found == pytest.approx(float(algorithm.loss(params, other, None, scaled)[0]), rel=1e-4)


def test_images_alone_have_no_statistics():
    images = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    options = DQNParameters(normalize_observations=True)
    algorithm = DQNAlgorithm(images, CHOICE, options, NETWORK)
    seen = algorithm.seen(np.zeros((3, 2, *images.shape), np.uint8), None)
    state = algorithm.observe(algorithm.init(0), seen)
    assert (state.observation_statistics.seen, state.observation_statistics.mean.shape) == (6, (0,))
