"""The backend `auto`: which one is fastest for an environment, here.

EnvPool's rollouts are not those of Gymnasium's implementation, so between EnvPool and the rest
fixed rules decide: the same call gives the same environments on every run and machine that has
EnvPool. Serial and process rollouts are identical, so between them a short measurement may.

Compiled environments are for those who step them in a program: then they win by far where they
are JAX (CartPole with its policy, 8 at once: 25 times serial's speed), and where EnvPool steps
them, Python is out of the loop (1.5 times the speed of EnvPool stepped from the host).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Discrete, MultiDiscrete

from starling.envs.envpool_registry import envpool_ids
from starling.envs.factories import (
    COLLECTIONS,
    CallableFactory,
    EnvFactory,
    EnvPoolFactory,
    env_factory,
    env_name,
)
from starling.envs.legacy import is_jax_class, is_jax_env
from starling.envs.spaces import allowed_actions, choice_counts, flat_mask
from starling.envs.worker_count import usable_cores
from starling.errors import UserError

# From so many environments on, EnvPool is faster than stepping these families in Python.
# Below, importing it (a second) and handing each step over to its threads cost more.
_ENVPOOL_FROM = {"classic_control": 16, "box2d": 1, "mujoco": 1}
# EnvPool lets the pendulum turn faster than its top speed of 8, by which Gymnasium moves it.
_ANOTHER_TASK = {"Pendulum-v1"}
# Tasks of Gymnasium's whose JAX version here is the same to 1e-5.
_JAX_VERSIONS = {
    "CartPole-v1": "starling.envs.jax_cartpole:CartPole",
    "Pendulum-v1": "starling.envs.jax_pendulum:Pendulum",
}
# Seconds that waking worker processes and gathering their answers takes, on a machine that has
# other things to do as well: once, and for each worker.
_WAKE_UP, _WAKE_UP_WORKER = 50e-6, 30e-6
_WORTHWHILE = 0.8  # processes have to bring the time of a step below this part of serial's
_BUDGET = 0.15  # seconds to measure for
_MOST_STEPS = 500


class Choice(NamedTuple):
    """A backend, and why in one line."""

    backend: str
    reason: str


def choose_backend(
    env: Any,
    num_envs: int,
    *,
    num_workers: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    restricted: bool = True,
    compiled: bool = False,
) -> Choice:
    """Chooses between compiled, envpool, serial and process.

    Threads are never chosen: whether they pay depends on what an environment does inside `step`.

    Args:
        env: As for `make_env`.
        num_envs: Number of environments.
        num_workers: Workers, if they are given.
        env_kwargs: Arguments for making an environment.
        restricted: Whether envpool and compiled may be chosen, which cannot do everything that
            the others can.
        compiled: Whether who asks steps compiled environments inside a program. If not, compiled
            is chosen only for environments that are written in JAX.

    Raises:
        UserError: There is no such environment.
    """
    factory = env_factory(env, env_kwargs)
    name = env_name(env)
    if restricted:
        choice = _by_rule(env, factory, num_envs, env_kwargs or {}, compiled)
        if choice is not None:
            return choice
    workers = min(num_workers or usable_cores(), num_envs)
    if workers == 1:
        return Choice("serial", "there is one core for them, or one environment")
    try:
        step_time = measure_step(factory)
    except UserError:
        raise
    except Exception as error:  # whoever steps it next meets the error, and reports it properly
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        return Choice("serial", f"{name} failed while its step was timed: {cause}")
    return choose_by_time(step_time, num_envs, workers)


def _by_rule(
    env: Any, factory: EnvFactory, num_envs: int, env_kwargs: dict[str, Any], compiled: bool
) -> Choice | None:
    """The choice where no measurement is needed."""
    name = env_name(env)
    if is_jax_env(env) or _makes_jax_env(factory):
        return Choice("compiled", f"{name} is written in JAX")
    same_task = set(env_kwargs) <= {"max_episode_steps"}
    if compiled and same_task and jax_version(env) is not None:
        return Choice("compiled", f"{name} has a JAX version, which steps beside the policy")
    if isinstance(factory, EnvPoolFactory):
        reason = f"Gymnasium cannot make {name} here, and EnvPool can"
    elif _envpool_pays(env, num_envs, env_kwargs):
        reason = f"it steps {num_envs} {name} in C++, faster than Python's can be stepped"
    else:
        return None
    if compiled and _on_cpu():
        return Choice("compiled", f"{reason}, inside a compiled program")
    return Choice("envpool", reason)


def choose_by_time(step_time: float, num_envs: int, workers: int) -> Choice:
    """Chooses between serial and process by how long one step of one environment takes.

    Args:
        step_time: Seconds.
        num_envs: Number of environments.
        workers: Processes that they would be shared among.
    """
    serial = num_envs * step_time
    process = -(-num_envs // workers) * step_time + _WAKE_UP + workers * _WAKE_UP_WORKER
    facts = f"one step takes {step_time * 1e6:.3g} us"
    if process < _WORTHWHILE * serial:
        return Choice("process", f"{facts}, and {num_envs} environments pay for {workers} workers")
    return Choice("serial", f"{facts}, and {num_envs} environments do not pay for processes")


def measure_step(factory: EnvFactory) -> float:
    """Seconds that one step takes with random actions that are allowed."""
    env = factory()
    try:
        return _time_steps(env)
    finally:
        with contextlib.suppress(Exception):
            env.close()


def _time_steps(env: gym.Env) -> float:
    """The median, so that a machine that is busy with other things changes little."""
    env.action_space.seed(0)
    _, info = env.reset(seed=0)
    times = []
    start = time.perf_counter()
    while len(times) <= _MOST_STEPS and time.perf_counter() - start < _BUDGET:
        action = random_action(env.action_space, info)
        before = time.perf_counter()
        _, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            _, info = env.reset()
        times.append(time.perf_counter() - before)
        if len(times) == 1:  # the first step may compile or load things
            start = time.perf_counter()
    return statistics.median(times[1:] or times)


def random_action(space: gym.Space, info: dict[str, Any]) -> Any:
    """An action drawn from `space`, one that `info["action_mask"]` allows where there is one."""
    mask = info.get("action_mask")
    if mask is None or not isinstance(space, Discrete | MultiDiscrete):
        return space.sample()
    mask = flat_mask(space, mask, sum(choice_counts(space)))
    return allowed_actions(space, mask, space.np_random)


def jax_version(env: Any) -> str | None:
    """Where the JAX version of a task of Gymnasium's is, as `module:Class`; None without one."""
    spec = _own_spec(env)
    return None if spec is None else _JAX_VERSIONS.get(spec.id)


def _makes_jax_env(factory: EnvFactory) -> bool:
    """Whether it is known, without making one, that what it makes is written in JAX."""
    if not isinstance(factory, CallableFactory):
        return False
    return factory.name.partition(":")[0] in COLLECTIONS or is_jax_class(factory.function)


def _own_spec(env: Any) -> EnvSpec | None:
    """The spec of one of Gymnasium's own environments, as it is registered; None for others."""
    spec = gym.registry.get(env) if isinstance(env, str) else env
    if not isinstance(spec, EnvSpec) or gym.registry.get(spec.id) is not spec:
        return None
    if spec.additional_wrappers or not str(spec.entry_point).startswith("gymnasium.envs."):
        return None
    return spec


def _envpool_pays(env: Any, num_envs: int, env_kwargs: dict[str, Any]) -> bool:
    least = _envpool_from(env, env_kwargs)
    return least is not None and num_envs >= least and env_name(env) in envpool_ids()


def _on_cpu() -> bool:
    """Whether programs run where EnvPool's arrays are."""
    from starling.envs.compiled import on_cpu

    return on_cpu()


def _envpool_from(env: Any, env_kwargs: dict[str, Any]) -> int | None:
    """The number of environments from which EnvPool pays; None if it would be another task.

    Only Gymnasium's own, as they are registered: EnvPool's arguments are different ones, and it
    knows nothing of a user's changes.
    """
    spec = _own_spec(env)
    if spec is None or spec.id in _ANOTHER_TASK or set(env_kwargs) - {"max_episode_steps"}:
        return None
    entry_point = str(spec.entry_point)
    return next(
        (
            least
            for family, least in _ENVPOOL_FROM.items()
            if entry_point.startswith(f"gymnasium.envs.{family}")
        ),
        None,
    )
