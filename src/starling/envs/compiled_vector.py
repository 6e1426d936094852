"""The compiled backend: a compiled environment stepped from the host, one call a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import AutoresetMode

from starling.envs.compiled import BatchedEnv, BatchState, CompiledStep, Tree, choose_rows, row_keys
from starling.envs.compiled_make import make_compiled
from starling.envs.guards import OwnGuard
from starling.envs.infos import add_final_observations
from starling.envs.safety import Safety
from starling.envs.spaces import flatten, leaves, store_batch, unflatten, zeros
from starling.envs.vector_env import VectorEnv, check_count, check_infos, is_same_step, only_mask
from starling.errors import UserError


class CompiledVectorEnv(VectorEnv):
    """Environments written in JAX, in one compiled program; trainers put the policy into it too.

    From the host, every step is one call of a compiled function. Rollouts are those that a
    program gets from `compiled` with `jax.random.key(seed)`.

    Attributes:
        compiled: The environments, for programs that step them themselves.
    """

    backend = "compiled"
    by_name = True

    def __init__(
        self,
        compiled: BatchedEnv,
        *,
        seed: int | None = None,
        num_workers: int | None = None,
        batch_size: int | None = None,
        infos: str = "final",
        copy: bool = True,
        episode_seeds: bool = False,
        step_timeout: float | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        safety: Safety = Safety(),  # noqa: B008 - immutable
    ):
        """Takes what `make_vec` takes.

        Args:
            compiled: The environments.
            seed: Seed of the first reset that is given none.
            num_workers: Without effect, as one program steps all of them.
            batch_size: `num_envs` only.
            infos: `"final"` or `"all"`; JAX environments have none of their own.
            copy: Return copies. Without it, arrays cannot be written to.
            episode_seeds: Not possible here.
            step_timeout: Without effect, as nothing can interrupt a program.
            autoreset_mode: `SAME_STEP` only.
            safety: Invalid data can be an error or go unseen; a program puts nothing right.

        Raises:
            UserError: What is not possible here was asked for.
        """
        check_infos(infos)
        if batch_size not in (None, compiled.num_envs):
            raise UserError(
                f"batch_size {batch_size} cannot be had, as one program steps all "
                f"{compiled.num_envs} environments; use the backend process, thread or envpool"
            )
        if episode_seeds or not is_same_step(autoreset_mode):
            raise UserError(
                "compiled environments have neither episode_seeds nor autoreset mode NEXT_STEP; "
                "use the backend serial, thread or process"
            )
        safety.require_no_recovery("backend compiled")
        safety.require_no_replacing(self.backend)
        self.compiled = compiled
        self._seed, self._copy = seed, copy
        self._guard = OwnGuard(
            compiled.single_observation_space,
            compiled.single_action_space,
            safety,
            compiled.num_envs,
        )
        space = compiled.single_observation_space
        self._dtypes = [leaf.dtype for leaf in leaves(space)]
        self._describe(compiled.num_envs, space, compiled.single_action_space, spec=compiled.spec)
        self._actions = zeros(compiled.single_action_space, compiled.num_envs)
        self._state: BatchState | None = None
        self._last: Tree = None  # observations, which a partial reset keeps
        self._result: CompiledStep | None = None  # of the step that is under way
        self._start = jax.jit(compiled.reset)
        self._start_rows = jax.jit(compiled.reset_with)
        self._restart_rows = jax.jit(self._restarted)
        self._step = jax.jit(compiled.step)
        self._mask = jax.jit(compiled.action_mask)

    @classmethod
    def of(
        cls, env: Any, num_envs: int, *, env_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> VectorEnv:
        """Makes the environments that `make_compiled` makes, for the host."""
        num_workers = options.get("num_workers")
        compiled = make_compiled(env, num_envs, env_kwargs, num_workers)
        if isinstance(compiled, BatchedEnv):
            return cls(compiled, **options)
        from starling.envs.compiled_envpool import XlaEnvPool, XlaEnvPoolVectorEnv

        if isinstance(compiled, XlaEnvPool):
            return XlaEnvPoolVectorEnv(compiled, env_kwargs, **options)
        raise UserError(
            f"{type(compiled).__name__} can only be stepped by a program; give a single "
            "environment, a JaxEnv, to have it stepped from the host"
        )

    # ---- resets

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See `VectorEnv.reset`; the only option is `reset_mask`."""
        self._check_open()
        mask = only_mask(options, self.num_envs, "compiled")
        if mask is not None:
            self._reset_some(mask, seed)
        else:
            first, self._seed = self._seed, None
            self._reset_all(first if seed is None else seed)
        self._result = None
        return self._observations(self._last), self._masks(self._mask(self._state))

    def start(self, seed: int | Sequence[int | None] | None = None) -> tuple[BatchState, Tree]:
        """Resets for a program: returns the state that `compiled.step` takes, and observations."""
        self.reset(seed=seed)
        assert self._state is not None
        return self._state, self._last

    def _reset_all(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is not None:
            self._guard.seeds = seed
        if seed is None and self._state is not None:
            self._state, self._last = self._start_rows(self._state.keys)
        elif seed is None or isinstance(seed, int | np.integer):
            self._state, self._last = self._start(_key(seed))
        else:
            self._state, self._last = self._start_rows(self._seeded_keys(seed))

    def _seeded_keys(self, seeds: Sequence[int | None]) -> jax.Array:
        check_count(seeds, self.num_envs, "seeds")
        return jnp.stack([_key(seed) for seed in seeds])

    def _reset_some(self, mask: np.ndarray, seed: Any) -> None:
        if self._state is None or self._result is not None:
            raise UserError(
                "options['reset_mask'] wants a first reset without it, and no step under way"
            )
        keys = self._state.keys
        if isinstance(seed, int | np.integer):
            keys = row_keys(_key(seed), self.num_envs)
        elif seed is not None:
            keys = self._seeded_keys(seed)
        self._state, self._last = self._restart_rows(mask, keys, (self._state, self._last))

    def _restarted(self, mask: jax.Array, keys: jax.Array, running: Any) -> Any:
        return choose_rows(mask, self.compiled.reset_with(keys), running)

    # ---- steps

    def send(self, actions: Any, env_ids: Sequence[int] | np.ndarray | None = None) -> None:
        """See `VectorEnv.send`; all environments step at once."""
        self._check_open()
        if self._state is None:
            raise UserError("reset() comes before the first step")
        if self._result is not None:
            raise UserError("a step is under way: recv() its result before the next send()")
        if env_ids is not None and not np.array_equal(env_ids, np.arange(self.num_envs)):
            raise UserError("compiled environments all step at once: leave out env_ids")
        space = self.single_action_space
        store_batch(space, actions, flatten(space, self._actions), "actions")
        self._guard.steps += 1
        self._state, self._result = self._step(self._state, self._actions)

    def recv(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """See `VectorEnv.recv`."""
        self._check_open()
        result, self._result = self._result, None
        if result is None:
            raise UserError("nothing to receive: send() actions first")
        self._last = result.observation
        terminations, truncations = np.array(result.terminated), np.array(result.truncated)
        rewards = np.asarray(result.reward, np.float64)
        infos = self._masks(result.action_mask)
        ended = np.flatnonzero(terminations | truncations)
        if len(ended):
            finals = self._arrays(result.final_observation)
            add_final_observations(infos, self.single_observation_space, finals, ended)
        observed = self._observations(self._last)
        arrays = flatten(self.single_observation_space, observed)
        self._guard.enforce(arrays, rewards, infos.get("action_mask"), self.faults, others="off")
        if len(ended):
            cut = truncations & ~terminations
            self._guard.enforce_finals(infos, cut, self.faults, others="off")
        return observed, rewards, terminations, truncations, infos

    def _masks(self, mask: jax.Array | None) -> dict[str, Any]:
        if mask is None:
            return {}
        return {
            "action_mask": np.array(mask),
            "_action_mask": np.ones(self.num_envs, np.bool_),
        }

    def _arrays(self, observations: Tree) -> list[np.ndarray]:
        values = flatten(self.single_observation_space, observations)
        return [np.asarray(x, dtype) for x, dtype in zip(values, self._dtypes, strict=True)]

    def _observations(self, observations: Tree) -> Any:
        arrays = self._arrays(observations)
        if self._copy:
            arrays = [np.array(array) for array in arrays]
        return unflatten(self.single_observation_space, arrays)

    # ---- the rest

    def close_extras(self, **kwargs: Any) -> None:
        """Forgets the state."""
        self._state = self._result = self._last = None


def _key(seed: int | np.integer | None) -> jax.Array:
    """A random key; of fresh entropy without a seed."""
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed {seed} is not from 0 to {(1 << 32) - 1}, as it must be here")
    return jax.random.key(int(seed))
