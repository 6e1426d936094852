"""EnvPool inside a compiled program: its XLA interface, made to keep the contract.

EnvPool resets in the step after an episode's end and ignores that step's action: such rows are
not valid. Where Starling counts the steps (see `Task.counts_steps`), EnvPool's own limit lies one
step later, so a truncated episode is followed by two rows that are not valid: the step beyond
the limit, and the reset.

EnvPool's `xla()` declares its 64-bit arrays as JAX's default of 32 bits and then writes 64, over
whatever lies behind them. Here they are declared as they are, and converted inside the program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starling.envs.compiled import CompiledStep, Tree
from starling.envs.envpool import EnvPoolVectorEnv
from starling.envs.envpool_layout import FIRST, Layout
from starling.envs.envpool_registry import Task, make_pool
from starling.envs.factories import env_name
from starling.envs.seeding import child_seeds
from starling.envs.spaces import unflatten
from starling.envs.worker_count import choose_workers


class PoolState(NamedTuple):
    """State of an `XlaEnvPool`; the environments' own stays in EnvPool's memory.

    Attributes:
        handle: uint8 `[8]`, passed from step to step, so that they keep their order.
        mask: What may be done now, bool `[N, K]`, or None.
    """

    handle: jax.Array
    mask: jax.Array | None


class XlaEnvPool:
    """N of EnvPool's environments, stepped inside a program, without Python. See `CompiledEnv`.

    There is one set of environments behind it, whatever becomes of the state: a program that
    takes an older state again steps them on from where they are.
    """

    pure = False

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        env_kwargs: dict[str, Any] | None = None,
        num_workers: int | None = None,
    ):
        """Reads the environment's description; the first reset makes the pool.

        Args:
            env_id: An id of `envpool.list_all_envs()`.
            num_envs: N.
            env_kwargs: As for `EnvPoolVectorEnv`.
            num_workers: EnvPool's threads; by default as many as pay.

        Raises:
            UserError: EnvPool does not have the environment, or cannot make it this way.
        """
        self._task = task = Task(env_id, env_kwargs)
        self._layout = Layout(task)
        self._workers = choose_workers(num_envs, num_workers, None, task.default_threads(num_envs))
        self._ids = np.arange(num_envs, dtype=np.int32)
        self._pool: Any = None
        self.num_envs = num_envs
        self.single_observation_space = task.observation_space
        self.single_action_space = task.action_space
        self.spec = task.spec

    def reset(self, key: jax.Array) -> tuple[PoolState, Tree]:
        """Starts an episode in every environment; not inside a program.

        `jax.random.key(seed)` seeds them as `seed` does `EnvPoolVectorEnv`; see `start`.
        """
        words = np.atleast_1d(np.asarray(jax.random.key_data(key), np.uint64))
        seed = int(words[-1]) + (int(words[-2]) << 32 if len(words) > 1 else 0)
        return self.start(child_seeds(seed, self.num_envs))

    def start(self, seeds: Sequence[int]) -> tuple[PoolState, Tree]:
        """Starts an episode in every environment; not inside a program.

        The first call makes the pool, with a seed for each environment. Later calls start the
        next episodes, whatever the seeds, as programs are bound to the pool that they were
        compiled with.
        """
        if self._pool is None:
            self._pool = make_pool(self._task, self.num_envs, self.num_envs, self._workers, seeds)
            self._handle, self._send, self._recv = _programs(self._pool)
        self._pool._reset(self._ids)
        arrays = self._pool._recv()
        state = PoolState(jnp.array(self._handle), self._mask(arrays))
        return state, self._observation(arrays)

    def step(self, state: PoolState, action: Tree) -> tuple[PoolState, CompiledStep]:
        """Steps. See `CompiledEnv.step`."""
        assert self._pool is not None, "reset() comes before the first step"
        with jax.enable_x64(True):
            sent = jax.lax.convert_element_type(jnp.asarray(action), self._task.action_dtype)
            handle = self._send(state.handle, self._ids, self._ids, sent)
            handle, *arrays = self._recv(handle)
            arrays = [jax.lax.convert_element_type(x, _narrow(x.dtype)) for x in arrays]
        at = self._layout.at
        valid = arrays[at["step_type"]] != FIRST
        limit = self._task.limit
        if self._task.counts_steps and limit is not None:
            valid &= arrays[at["elapsed_step"]] <= limit
        terminated, truncated = self._layout.ends(arrays)
        after = PoolState(handle, self._mask(arrays))
        return after, CompiledStep(
            observation=self._observation(arrays),
            reward=jnp.asarray(arrays[at["reward"]], jnp.float32).reshape(self.num_envs),
            terminated=terminated & valid,
            truncated=truncated & valid,
            valid=valid,
            action_mask=after.mask,
        )

    def action_mask(self, state: PoolState) -> jax.Array | None:
        """What may be done now, bool `[N, K]`; None without masks."""
        return state.mask

    def _observation(self, arrays: list[Any]) -> Tree:
        leaves = [
            jnp.asarray(arrays[at], _narrow(leaf.dtype)).reshape(self.num_envs, *leaf.shape)
            for at, leaf in zip(self._layout.observed, self._layout.leaves, strict=True)
        ]
        return unflatten(self.single_observation_space, leaves)

    def _mask(self, arrays: list[Any]) -> jax.Array | None:
        if self._layout.mask is None:
            return None
        return jnp.asarray(arrays[self._layout.mask] != 0).reshape(self.num_envs, -1)


def _narrow(dtype: Any) -> np.dtype:
    """The type that stands for it where JAX has 32 bits, as it has by default."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def _programs(pool: Any) -> tuple[np.ndarray, Callable[..., Any], Callable[..., Any]]:
    """The pool's handle, and its `send` and `recv` as functions of a program."""
    native = dict(pool._xla())
    handle = np.frombuffer(native["recv"][0], np.uint8)
    return handle, _program(pool, "send", *native["send"]), _program(pool, "recv", *native["recv"])


def _program(
    pool: Any, name: str, handle: bytes, specs: tuple, capsules: tuple
) -> Callable[..., Any]:
    target = f"starling_{type(pool).__name__}_{id(pool)}_{name}"
    for platform, capsule in zip(("cpu", "gpu"), capsules, strict=True):
        if capsule is not None:
            jax.ffi.register_ffi_target(target, capsule, platform=platform, api_version=1)
    with jax.enable_x64(True):
        results = [jax.ShapeDtypeStruct(tuple(shape), dtype) for dtype, shape in specs[1]]
    call = jax.ffi.ffi_call(
        target,
        results if len(results) > 1 else results[0],
        has_side_effect=True,
        input_output_aliases={0: 0},
    )
    address = int.from_bytes(handle, sys.byteorder)
    return lambda *arguments: call(*arguments, handle=address)


class XlaEnvPoolVectorEnv(EnvPoolVectorEnv):
    """EnvPool's environments for the host, as `EnvPoolVectorEnv`, and for programs.

    The two are pools of their own, of which only those that are reset are made.

    Attributes:
        compiled: The environments for programs.
    """

    backend = "compiled"

    def __init__(
        self, compiled: XlaEnvPool, env_kwargs: dict[str, Any] | None = None, **options: Any
    ):
        """Takes the environments for programs, and the options of `EnvPoolVectorEnv`."""
        safety = options.get("safety")
        if safety is not None:
            safety.require_no_replacing(self.backend)
        name = env_name(compiled.spec)
        super().__init__(name, compiled.num_envs, env_kwargs=env_kwargs, **options)
        self.compiled = compiled

    def start(self, seed: int | Sequence[int | None] | None = None) -> tuple[PoolState, Tree]:
        """Resets for a program: returns the state that `compiled.step` takes, and observations."""
        self._check_open()
        return self.compiled.start(self._seeds(self._seed if seed is None else seed))
