"""The choice of a backend: rules that do not change, and a measurement where it cannot matter."""

from __future__ import annotations

import subprocess
import sys

import envs_for_tests as envs
import gymnasium as gym
import numpy as np
import pytest

from starling.envs import auto, stepping_rate
from starling.envs.auto import choose_backend, choose_by_time, measure_step
from starling.envs.factories import env_factory
from starling.envs.make import BACKENDS, make_vec
from starling.envs.spaces import allowed_actions
from starling.envs.stepping_rate import Rate, compare, rate_of
from starling.errors import UserError

US = 1e-6


@pytest.fixture
def step_takes(monkeypatch):
    """Makes every environment's step take so many seconds, as far as the choice knows."""

    def set_time(seconds):
        monkeypatch.setattr(auto, "measure_step", lambda factory: seconds)

    monkeypatch.setattr(auto, "usable_cores", lambda: 4)
    set_time(5 * US)
    return set_time


@pytest.mark.parametrize(
    ("step_time", "num_envs", "workers", "backend"),
    [
        (5 * US, 8, 4, "serial"),
        (5 * US, 256, 4, "process"),
        (1000 * US, 8, 4, "process"),
        (1000 * US, 2, 2, "process"),
        (1000 * US, 1, 1, "serial"),
        (10 * US, 4, 4, "serial"),
        (20 * US, 64, 4, "process"),
    ],
)
def test_processes_where_they_pay(step_time, num_envs, workers, backend):
    choice = choose_by_time(step_time, num_envs, workers)
    assert choice.backend == backend
    assert f"{step_time * 1e6:.3g} us" in choice.reason
    assert "\n" not in choice.reason


def test_the_measured_time_decides(step_takes):
    assert choose_backend(envs.CountingEnv, 8).backend == "serial"
    step_takes(1.0)
    assert choose_backend(envs.CountingEnv, 8).backend == "process"
    assert choose_backend(envs.CountingEnv, 8, num_workers=1).backend == "serial"
    assert choose_backend(envs.CountingEnv, 1).backend == "serial"


def test_one_core_has_nothing_to_share(step_takes, monkeypatch):
    step_takes(1.0)
    monkeypatch.setattr(auto, "usable_cores", lambda: 1)
    assert choose_backend(envs.CountingEnv, 8).backend == "serial"


# ---- EnvPool


@pytest.fixture
def envpool():
    return pytest.importorskip("envpool")


@pytest.mark.parametrize(
    ("env", "num_envs", "expected"),
    [
        ("CartPole-v1", 15, False),
        ("CartPole-v1", 16, True),
        ("Pendulum-v1", 512, False),  # another task there
        ("HalfCheetah-v5", 1, True),
        ("LunarLander-v3", 1, True),
        ("FrozenLake-v1", 512, False),
        ("Blackjack-v1", 512, False),  # other observations there
        ("Pong-v5", 1, True),
        (gym.spec("CartPole-v1"), 16, True),
    ],
)
@pytest.mark.parametrize("step_time", [1 * US, 1.0])
def test_fixed_rules_decide_about_envpool(envpool, step_takes, env, num_envs, expected, step_time):
    """The speed of the machine must not change which task is trained."""
    step_takes(step_time)
    assert (choose_backend(env, num_envs).backend == "envpool") == expected


def test_not_for_what_the_user_changed(envpool, step_takes, monkeypatch):
    assert choose_backend("CartPole-v1", 64).backend == "envpool"
    assert choose_backend("CartPole-v1", 64, env_kwargs={"max_episode_steps": 9})[0] == "envpool"
    changed = {"sutton_barto_reward": True}
    assert choose_backend("CartPole-v1", 64, env_kwargs=changed).backend != "envpool"
    assert choose_backend("CartPole-v1", 64, restricted=False).backend != "envpool"
    assert choose_backend(gym.make("CartPole-v1"), 64).backend != "envpool"
    assert choose_backend(lambda: gym.make("CartPole-v1"), 64).backend != "envpool"
    own = gym.envs.registration.EnvSpec("CartPole-v1", entry_point=envs.CountingEnv)
    monkeypatch.setitem(gym.registry, "CartPole-v1", own)
    assert choose_backend("CartPole-v1", 64).backend != "envpool"


def test_without_envpool(step_takes, monkeypatch):
    monkeypatch.setattr(auto, "envpool_ids", frozenset)
    assert choose_backend("CartPole-v1", 64).backend in ("serial", "process")


@pytest.mark.parametrize(
    "options",
    [
        {"episode_seeds": True},
        {"infos": "all"},
        {"batch_size": 16},
        {"autoreset_mode": "NextStep"},
    ],
)
def test_not_where_envpool_could_not_do_it(step_takes, options):
    vector = make_vec("CartPole-v1", 32, **options)
    assert vector.backend == "serial"
    vector.close()


def test_what_only_envpool_has_can_be_restored_all_the_same(envpool, step_takes):
    """With episode seeds its environments are stepped one by one."""
    assert choose_backend("LunarLander-v3", 2, restricted=False).backend in ("serial", "process")
    first, second = (
        make_vec("LunarLander-v3", 2, "serial", seed=0, episode_seeds=True) for _ in range(2)
    )
    first.reset()
    for _ in range(20):
        expected = first.step(np.array([2, 3]))[0]
    observations, _ = second.restore(first.state())
    np.testing.assert_array_equal(observations, expected)
    np.testing.assert_array_equal(first.step([1, 1])[0], second.step([1, 1])[0])
    first.close()
    second.close()


# ---- compiled


class JaxEnv:
    """As much of an environment written in JAX as the choice looks at."""

    def reset(self, key):
        raise NotImplementedError

    def step(self, state, action):
        raise NotImplementedError


@pytest.mark.parametrize("env", [JaxEnv, JaxEnv(), "test_auto:JaxEnv"])
def test_what_is_written_in_jax_is_compiled(step_takes, env):
    for compiled in (False, True):
        assert choose_backend(env, 8, compiled=compiled).backend == "compiled"


@pytest.mark.parametrize(
    ("env", "kwargs", "expected"),
    [
        ("CartPole-v1", {}, "compiled"),
        ("CartPole-v1", {"max_episode_steps": 9}, "compiled"),
        (gym.spec("Pendulum-v1"), {}, "compiled"),
        ("CartPole-v1", {"sutton_barto_reward": True}, "serial"),
        ("CartPole-v0", {}, "serial"),
        (gym.make("CartPole-v1"), {}, "serial"),
        (lambda: gym.make("Pendulum-v1"), {}, "serial"),
        ("MountainCar-v0", {}, "serial"),
    ],
)
def test_our_own_versions_only_for_the_very_same_task(step_takes, env, kwargs, expected):
    assert choose_backend(env, 8, env_kwargs=kwargs, compiled=True).backend == expected
    assert choose_backend(env, 8, env_kwargs=kwargs).backend == "serial"
    restricted = choose_backend(env, 8, env_kwargs=kwargs, compiled=True, restricted=False)
    assert restricted.backend == "serial"


def test_not_for_what_the_user_registered(step_takes, monkeypatch):
    own = gym.envs.registration.EnvSpec("CartPole-v1", entry_point=envs.CountingEnv)
    monkeypatch.setitem(gym.registry, "CartPole-v1", own)
    assert choose_backend("CartPole-v1", 8, compiled=True).backend == "serial"


def test_envpool_inside_a_program_where_envpool_pays(envpool, step_takes, monkeypatch):
    for env, num_envs in (("Acrobot-v1", 16), ("HalfCheetah-v5", 1), ("Pong-v5", 1)):
        assert choose_backend(env, num_envs, compiled=True).backend == "compiled"
        assert choose_backend(env, num_envs).backend == "envpool"
    assert choose_backend("Acrobot-v1", 15, compiled=True).backend == "serial"
    monkeypatch.setattr(auto, "_on_cpu", lambda: False)
    assert choose_backend("Acrobot-v1", 16, compiled=True).backend == "envpool"
    assert choose_backend("CartPole-v1", 16, compiled=True).backend == "compiled"


def test_nobody_gets_jax_who_did_not_ask_for_it():
    code = (
        "import sys, starling\n"
        "starling.make_vec('CartPole-v1', 8).close()\n"
        "assert 'jax' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- measuring


class Slow(envs.CountingEnv):
    """Counts what is asked of it."""

    calls: dict = {}  # noqa: RUF012

    def step(self, action):
        self.calls["step"] = self.calls.get("step", 0) + 1
        return super().step(action)

    def close(self):
        self.calls["close"] = True


def test_measuring_steps_through_episodes_and_closes():
    Slow.calls.clear()
    step_time = measure_step(env_factory(Slow))
    assert step_time > 0
    assert Slow.calls["step"] > 20
    assert Slow.calls["close"]


def test_measuring_is_short():
    """By its own clock: it stops at the first step past the budget."""
    now = [0.0]

    class Clocked(envs.CountingEnv):
        def step(self, action):
            now[0] += 0.1
            return super().step(action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto.time, "perf_counter", lambda: now[0])
        assert measure_step(env_factory(Clocked)) == pytest.approx(0.1)
    assert now[0] < 0.4


def test_an_environment_that_fails_is_left_to_who_reports_it():
    class Failing(envs.CountingEnv):
        def step(self, action):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        measure_step(env_factory(Failing))
    choice = choose_backend(Failing, 8, num_workers=2)
    assert choice.backend == "serial"
    assert choice.reason == "Failing failed while its step was timed: RuntimeError: broken"


class Strict(envs.MaskedEnv):
    """Refuses what its mask forbids."""

    def step(self, action):
        if not self._mask()[action]:
            raise ValueError(f"{action} is forbidden")
        return super().step(action)


class StrictPair(envs.CountingEnv):
    """The same with two choices at once, which start at 1; its mask comes in parts."""

    action_space = gym.spaces.MultiDiscrete([2, 3], start=[1, 1])

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], {"action_mask": self._mask()}

    def step(self, action):
        if not all(part[a - 1] for part, a in zip(self._mask(), action, strict=True)):
            raise ValueError(f"{action} is forbidden")
        return *super().step(0)[:4], {"action_mask": self._mask()}

    def _mask(self):
        return np.array([self.steps % 2, 1], np.int8), np.array([0, 1, self.steps % 2], np.int8)


@pytest.mark.parametrize("env", [Strict, StrictPair])
def test_forbidden_actions_are_not_tried(env):
    assert measure_step(env_factory(env)) > 0
    assert rate_of(env, 2, "serial", seconds=0.02).steps_per_second > 0


def test_all_allowed_actions_are_drawn_and_no_others():
    mask = np.tile(np.array([1, 0, 1, 1], np.int8), (200, 1))
    drawn = allowed_actions(gym.spaces.Discrete(4, start=5), mask, np.random.default_rng(0))
    assert set(drawn.tolist()) == {5, 7, 8}


def test_bad_input_is_not_swallowed():
    with pytest.raises(UserError, match="did you mean"):
        choose_backend("CartPole-v9", 8)


def test_the_choice_is_printed_with_its_reason(capsys):
    make_vec(envs.CountingEnv, 1).close()
    captured = capsys.readouterr()
    assert captured.err.startswith("starling: backend serial: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_cheap_environments_are_chosen_for_without_importing_envpool():
    code = (
        "import sys, starling\n"
        "starling.make_vec('CartPole-v1', 8).close()\n"
        "assert 'envpool' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- the rate


def test_the_rate_counts_steps_of_all_environments(monkeypatch):
    """With a clock that goes on by a second at every look, a step of 4 environments is 4/s."""
    ticks = iter(range(1000))
    vector = make_vec(envs.CountingEnv, 4, "serial")
    monkeypatch.setattr("starling.envs.stepping_rate.time.perf_counter", lambda: next(ticks))
    assert rate_of(vector, None, seconds=10.0).steps_per_second == 4.0


def test_the_rate_says_what_it_used():
    rate = rate_of("CartPole-v1", 4, "thread", num_workers=2, seconds=0.01)
    assert (rate.backend, rate.num_workers, rate.problem) == ("thread", 2, "")
    assert rate.steps_per_second > 0


@pytest.mark.timeout(60)
def test_all_backends_side_by_side(no_leaks):
    rates, recommendation = compare(envs.CountingEnv, 4, seconds=0.02, num_workers=2)
    assert [rate.backend for rate in rates] == list(BACKENDS)
    assert [rate.backend for rate in rates if rate.steps_per_second > 0] == [
        *("serial", "thread", "process")
    ]
    problems = {rate.backend: rate.problem for rate in rates}
    assert "from their ids" in problems["envpool"]
    assert "cannot be part of a compiled program" in problems["compiled"]
    best = max(rates, key=lambda rate: rate.steps_per_second)
    assert f"take backend {best.backend}" in recommendation


def test_compiled_is_recommended_for_programs():
    rates = [Rate("compiled", 1, 600.0), Rate("serial", 1, 200.0)]
    assert stepping_rate._recommendation("CartPole-v1", 4, rates) == (
        "CartPole-v1 with 4 environments: take backend compiled inside a program, "
        "3.00 times as fast as serial"
    )


def test_where_nothing_works_the_first_problem_is_told():
    with pytest.raises(UserError, match="did you mean CartPole-v1"):
        compare("CartPole-v9", 2, seconds=0.01)
    with pytest.raises(UserError, match="seconds is 0"):
        rate_of("CartPole-v1", 2, "serial", seconds=0)
