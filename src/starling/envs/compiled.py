"""Environments whose step is part of a compiled program: the contract, and how one becomes many.

Imports JAX, as the other modules of compiled environments do (their names begin with `compiled`
or `jax_`); whoever may run without JAX imports them inside functions.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import jax
import jax.numpy as jnp
from gymnasium.envs.registration import EnvSpec

from starling.envs.spaces import flatten, leaves, unflatten

Tree = Any  # of arrays, nested as the space is
State = Any  # of arrays; only the environment knows what they mean

# Rows that are reset at once where episodes ended: at least so many, or this part of all rows.
_LEAST_RESET, _PART_RESET = 4, 8


class CompiledStep(NamedTuple):
    """What N environments' step gives, as arrays of a program.

    Attributes:
        observation: `[N, ...]`, what the next action is chosen for.
        reward: `[N]`, float32.
        terminated: `[N]`, bool.
        truncated: `[N]`, bool.
        final_observation: `[N, ...]`, what the step truly led to, which differs from
            `observation` where an episode ended (`SAME_STEP`). None where `observation` always
            is that, as rows that only reset follow an end (`NEXT_STEP`).
        valid: `[N]`, bool, False for rows that are no experience; None where all are.
        action_mask: `[N, K]`, bool, what may be done next; None without masks.
    """

    observation: Tree
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_observation: Tree | None = None
    valid: jax.Array | None = None
    action_mask: jax.Array | None = None


class CompiledEnv(Protocol):
    """A batch of N environments, stepped inside a compiled program.

    Attributes:
        num_envs: N.
        single_observation_space: Space of one observation.
        single_action_space: Space of one action.
        spec: Gymnasium's `EnvSpec`, or None.
        pure: Whether it is JAX and nothing else: then it can be vmapped, and reset inside a
            program. If not, `reset` is called outside of programs, and `step` belongs to what the
            last seeded `reset` made.
    """

    num_envs: int
    single_observation_space: gym.Space
    single_action_space: gym.Space
    spec: Any
    pure: bool

    def reset(self, key: jax.Array) -> tuple[State, Tree]:
        """Starts an episode in every environment.

        Args:
            key: Environment i gets a key of its own from it, which does not depend on N.

        Returns:
            The state, and observations `[N, ...]`.
        """
        ...

    def step(self, state: State, action: Tree) -> tuple[State, CompiledStep]:
        """Steps; where an episode ends, the next one starts.

        Args:
            state: What `reset` or `step` returned.
            action: `[N, ...]`, in the form that the space names.
        """
        ...

    def action_mask(self, state: State) -> jax.Array | None:
        """What may be done now, bool `[N, K]`; None without masks."""
        ...


class JaxEnv(Protocol):
    """One environment, written in JAX: `BatchedEnv` makes it a `CompiledEnv`.

    It may also have `spec`, a Gymnasium `EnvSpec`, and `action_mask(state)`, bool `[K]`.

    Attributes:
        observation_space: Space of an observation.
        action_space: Space of an action.
    """

    observation_space: gym.Space
    action_space: gym.Space

    def reset(self, key: jax.Array) -> tuple[State, Tree]:
        """Starts an episode: the state (a pytree of arrays), and the observation."""
        ...

    def step(self, state: State, action: Tree) -> tuple[State, Tree, Any, Any, Any]:
        """Steps: state, observation, reward, terminated, truncated. It need not reset itself."""
        ...


class BatchState(NamedTuple):
    """State of a `BatchedEnv`.

    Attributes:
        envs: The environments' states, `[N, ...]`.
        keys: Random keys of their next episodes, `[N]`.
    """

    envs: State
    keys: jax.Array


class BatchedEnv:
    """N copies of a `JaxEnv`, with `SAME_STEP` autoreset. See `CompiledEnv`.

    Args:
        env: One environment.
        num_envs: N.
    """

    pure = True

    def __init__(self, env: JaxEnv, num_envs: int):
        self.env = env
        self.num_envs = num_envs
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.spec = getattr(env, "spec", None)
        self._masked = hasattr(env, "action_mask")
        leaves(env.action_space)  # refuses spaces without arrays of fixed size
        self._dtypes = [
            jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves(env.observation_space)
        ]

    def reset(self, key: jax.Array) -> tuple[BatchState, Tree]:
        """Starts an episode in every environment; environment i's key is `fold_in(key, i)`."""
        return self.reset_with(row_keys(key, self.num_envs))

    def reset_with(self, keys: jax.Array) -> tuple[BatchState, Tree]:
        """Starts an episode in as many environments as there are `keys`, `[n]`."""
        next_keys, first_keys = _split(keys)
        states, observations = jax.vmap(self._first)(first_keys)
        return BatchState(states, next_keys), observations

    def step(self, state: BatchState, action: Tree) -> tuple[BatchState, CompiledStep]:
        """Steps, and resets what ended. See `CompiledEnv.step`."""
        envs, final, reward, terminated, truncated = jax.vmap(self._next)(state.envs, action)
        after = BatchState(envs, state.keys)
        after, observation = self._restarted(after, final, terminated | truncated)
        step = CompiledStep(observation, reward, terminated, truncated, final)
        return after, step._replace(action_mask=self.action_mask(after))

    def action_mask(self, state: BatchState) -> jax.Array | None:
        """What may be done now, bool `[N, K]`; None without masks."""
        if not self._masked:
            return None
        return jax.vmap(self.env.action_mask)(state.envs).astype(bool)  # type: ignore[attr-defined]

    def _first(self, key: jax.Array) -> tuple[State, Tree]:
        state, observation = self.env.reset(key)
        return jax.tree.map(_strong, state), self._observation(observation)

    def _next(self, state: State, action: Tree) -> tuple[State, Tree, Any, Any, Any]:
        # What a program carries from step to step has to keep its types. They are read before the
        # step, as Brax writes into the state that it is given.
        dtypes = jax.tree.map(lambda x: x.dtype, state)
        after, observation, reward, terminated, truncated = self.env.step(state, action)
        after = jax.tree.map(_strong, after, dtypes)
        reward = jnp.asarray(reward, jnp.float32)
        ends = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
        return after, self._observation(observation), reward, *ends

    def _observation(self, observation: Tree) -> Tree:
        values = flatten(self.single_observation_space, observation)
        arrays = [jnp.asarray(x, dtype) for x, dtype in zip(values, self._dtypes, strict=True)]
        return unflatten(self.single_observation_space, arrays)

    def _restarted(
        self, state: BatchState, observation: Tree, ended: jax.Array
    ) -> tuple[BatchState, Tree]:
        """Resets the rows that ended.

        A reset costs more than a step of a small environment, and few rows end in a step: on a
        CPU they are reset in groups of a fixed size, in as many as it takes. Elsewhere all rows
        are, at once, and the others' are thrown away: asking how many ended would cost more.
        """
        return jax.lax.platform_dependent(
            (state, observation),
            ended,
            cpu=self._restart_in_groups,
            default=self._restart_at_once,
        )

    def _restart_at_once(self, running: Any, ended: jax.Array) -> Any:
        return choose_rows(ended, self.reset_with(running[0].keys), running)

    def _restart_in_groups(self, running: Any, ended: jax.Array) -> Any:
        size = min(self.num_envs, max(_LEAST_RESET, self.num_envs // _PART_RESET))

        def restart_group(carry: Any) -> Any:
            running, left = carry
            nth = jnp.cumsum(left) - 1
            now = left & (nth < size)
            place = jnp.where(now, nth, size)  # in the group; `size` for rows that are not in it
            rows = jnp.zeros(size + 1, jnp.int32).at[place].set(jnp.arange(self.num_envs))
            fresh = self.reset_with(running[0].keys[rows[:size]])
            spread = jax.tree.map(lambda x: x.at[place].get(mode="clip"), fresh)
            return choose_rows(now, spread, running), left & ~now

        def some_left(carry: Any) -> jax.Array:
            return carry[1].any()

        return jax.lax.while_loop(some_left, restart_group, (running, ended))[0]


def row_keys(key: jax.Array, n: int) -> jax.Array:
    """A key for each of n environments; environment i's does not depend on n."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def _split(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys for each of `keys`, `[n]`."""
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def choose_rows(rows: jax.Array, new: Tree, old: Tree) -> Tree:
    """Rows `[N]` of `new` where `rows` is true, else of `old`."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *(1,) * (b.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def _strong(value: Any, dtype: Any = None) -> jax.Array:
    """An array of that type, or of its own; JAX treats one without a definite type differently."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    return jnp.asarray(array, dtype or array.dtype)


def on_cpu() -> bool:
    """Whether JAX runs programs on the CPU unless it is told otherwise."""
    return jax.default_backend() == "cpu"


def limited_spec(env_id: str, max_episode_steps: int) -> EnvSpec:
    """Gymnasium's spec of a task, with the limit of an environment that repeats the task."""
    spec = copy.deepcopy(gym.spec(env_id))
    spec.max_episode_steps = max_episode_steps
    return spec
