"""The EnvPool backend: environments written in C++, stepped by a pool of its threads.

EnvPool starts the next episode one step after an episode's end and ignores that step's action.
Here the environments that ended are reset at once, as a subset, so that the contract's
`SAME_STEP` holds.

EnvPool's rollouts are its own, and do not repeat those of Gymnasium's implementation for the same
seed. From the same state, a step of its classic-control and MuJoCo tasks is Gymnasium's, up to
the precision of float32; but Pendulum moves by its speed before that is limited to 8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from starling.envs.envpool_layout import FIRST, Layout
from starling.envs.envpool_registry import Task, make_pool
from starling.envs.guards import OwnGuard
from starling.envs.infos import add_final_observations
from starling.envs.safety import Safety
from starling.envs.seeding import child_seeds
from starling.envs.spaces import cast, leaves, unflatten
from starling.envs.vector_env import VectorEnv, check_count, check_infos, is_same_step, only_mask
from starling.envs.worker_count import choose_workers
from starling.errors import UserError


class EnvPoolVectorEnv(VectorEnv):
    """EnvPool's environments in C++, on its own threads: fastest for MuJoCo, Box2D and Atari.

    Every array returned is fresh. With `batch_size` below `num_envs` the pool is asynchronous:
    the order of answers depends on timing, and an ended episode is followed by a row with
    `infos["valid"]` False, which holds the first observation of the next one and whose action
    was ignored.

    A seed given to `reset` builds the pool anew: that is how EnvPool is seeded.
    """

    backend = "envpool"
    by_id = True

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        env_kwargs: dict[str, Any] | None = None,
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
        """Reads the environment's description; the pool itself is built by the first reset.

        Args:
            env_id: An id of `envpool.list_all_envs()`.
            num_envs: N.
            env_kwargs: Further arguments for `envpool.make`, such as `max_episode_steps`; and
                `render_mode="rgb_array"`.
            seed: Seed of the first reset that is given none.
            num_workers: Threads; by default as many as pay, at most one per usable core.
            batch_size: Environments that one `recv` returns; a divisor of `num_envs`.
            infos: `"final"` or `"all"`, as for `make_vec`.
            copy: Without effect, as every array is fresh.
            episode_seeds: Not possible here.
            step_timeout: Without effect, as nothing can interrupt EnvPool's threads.
            autoreset_mode: `SAME_STEP` only.
            safety: What to do about invalid data; EnvPool's environments do not fail on their own.

        Raises:
            UserError: EnvPool does not have the environment, or cannot make it this way.
        """
        _check_batch_size(num_envs, batch_size)
        check_infos(infos)
        if episode_seeds or not is_same_step(autoreset_mode):
            raise UserError(
                "EnvPool has neither episode_seeds nor autoreset mode NEXT_STEP; "
                "use the backend serial, thread or process"
            )
        safety.require_no_recovery("backend envpool")
        task = self._task = Task(env_id, env_kwargs)
        self._guard = OwnGuard(task.observation_space, task.action_space, safety, num_envs)
        self._all_infos = infos == "all"
        self._seed = seed
        threads = task.default_threads(num_envs)
        self.num_workers = choose_workers(num_envs, num_workers, None, threads)
        self._describe(
            num_envs,
            task.observation_space,
            task.action_space,
            batch_size=batch_size,
            metadata={"render_modes": ["rgb_array"], "render_fps": 30},
            spec=task.spec,
            render_mode=task.render_mode,
        )
        self._is_async = self.batch_size < num_envs
        self._layout = Layout(task)
        self._action_shape = leaves(task.action_space)[0].shape
        self._pool: Any = None
        self._last: list[np.ndarray] = []
        self._ids = np.arange(num_envs, dtype=np.int32)
        self._under_way = 0  # environments whose results are still to be received
        self._busy = np.zeros(num_envs, bool)  # which ones; kept up where asynchronous only
        self._ended = np.zeros(num_envs, bool)

    # ---- resets

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See `VectorEnv.reset`; the only option is `reset_mask`."""
        self._check_open()
        mask = only_mask(options, self.num_envs, "EnvPool's")
        if mask is not None:
            return self._reset_some(mask, seed)
        if self._pool is None or seed is not None:
            self._pool = None  # the old pool's threads end before new ones start
            self._guard.seeds = seeds = self._seeds(self._seed if seed is None else seed)
            self._pool = make_pool(
                self._task, self.num_envs, self.batch_size, self.num_workers, seeds
            )
            self._under_way = 0
            self._busy[:] = False
        self._settle()
        self._pool._reset(self._ids)
        parts = [self._pool._recv() for _ in range(self.num_envs // self.batch_size)]
        self._ended[:] = False
        self._last = self._joined(parts)
        return self._observations(self._last), self._current_infos(self._last)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int]:
        if seed is None or isinstance(seed, int | np.integer):
            return child_seeds(None if seed is None else int(seed), self.num_envs)
        check_count(seed, self.num_envs, "seeds")
        fresh = child_seeds(None, self.num_envs)
        return [new if s is None else int(s) for s, new in zip(seed, fresh, strict=True)]

    def _settle(self) -> None:
        """Lets every environment finish what it does; the results are dropped."""
        if not self._under_way:
            return
        if self._is_async:  # answers come in whole batches only: give the idle ones work too
            self._pool._reset(self._ids[~self._busy])
            for _ in range(self.num_envs // self.batch_size):
                self._pool._recv()
        else:
            self._pool._recv()
        self._under_way = 0
        self._busy[:] = False

    def _reset_some(self, mask: np.ndarray, seed: Any) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            raise UserError("EnvPool cannot seed some environments only: leave out seed or mask")
        if self._is_async or self._pool is None or self._under_way:
            raise UserError(
                "options['reset_mask'] wants a first reset without it, no step under way, "
                "and a batch_size equal to num_envs"
            )
        state = [array.copy() for array in self._last]
        self._put_first_rows(state, self._ids[mask])
        self._last = state
        return self._observations(state), self._current_infos(state)

    def _put_first_rows(self, state: list[np.ndarray], ids: np.ndarray) -> None:
        """Resets environments and writes their first observations over their rows."""
        self._pool._reset(ids)
        first = self._pool._recv()
        rows = first[self._layout.env_id]
        for at in self._layout.observed:
            state[at][rows] = first[at]
        if self._layout.mask is not None:
            state[self._layout.mask][rows] = first[self._layout.mask]

    # ---- steps

    def send(self, actions: Any, env_ids: Sequence[int] | np.ndarray | None = None) -> None:
        """See `VectorEnv.send`."""
        self._check_open()
        if self._pool is None:
            raise UserError("reset() comes before the first step")
        if not self._is_async:
            if self._under_way:
                raise UserError("a step is under way: recv() its result before the next send()")
            batch = self._to_pool(actions, self.num_envs)
            if env_ids is not None:
                batch = batch[np.argsort(self._checked_ids(env_ids))]
            self._pool._send([self._ids, self._ids, batch])
            self._guard.steps += 1
            self._under_way = self.num_envs
            return
        ids = self._checked_ids(env_ids)
        batch = self._to_pool(actions, len(ids))
        self._busy[ids] = True
        self._under_way += len(ids)
        again = self._ended[ids]
        if again.any():  # their next episode starts, whatever the action
            self._pool._reset(ids[again])
            ids, batch = ids[~again], batch[~again]
        if len(ids):
            self._guard.steps[ids] += 1
            self._pool._send([ids, ids, batch])

    def _checked_ids(self, env_ids: Sequence[int] | np.ndarray | None) -> np.ndarray:
        if env_ids is None:
            ids = self._ids
        else:
            ids = np.asarray(env_ids).astype(np.int32, casting="same_kind")
        known = ids.ndim == 1 and np.all((ids >= 0) & (ids < self.num_envs))
        if not known or len(np.unique(ids)) < len(ids):
            raise UserError(
                f"env_ids {np.asarray(env_ids).tolist()} must be different numbers "
                f"from 0 to {self.num_envs - 1}"
            )
        if self._busy[ids].any():
            busy = ids[self._busy[ids]].tolist()
            raise UserError(f"environments {busy} are under way: recv() their results first")
        if not self._is_async and len(ids) < self.num_envs:
            raise UserError(
                f"{len(ids)} of {self.num_envs} environments given; make the environments with "
                "a smaller batch_size to step some of them"
            )
        return ids

    def _to_pool(self, actions: Any, n: int) -> np.ndarray:
        """Actions in the type and shape that EnvPool reads without checking."""
        given = np.asarray(actions)
        space, dtype = self.single_action_space, self._task.action_dtype
        if given.shape != (n, *self._action_shape):
            expected = (n, *self._action_shape)
            raise UserError(f"actions: shape {given.shape} given, {expected} expected")
        if isinstance(space, spaces.Discrete):
            low, high = given.min(), given.max()
            if low < space.start or high >= space.start + space.n:
                raise UserError(f"actions from {low} to {high} given, which are not in {space}")
        if given.dtype == dtype or np.can_cast(given.dtype, dtype, "same_kind"):
            return given.astype(dtype, order="C")  # a copy: EnvPool keeps the array
        return cast(given, dtype, "actions")

    def recv(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """See `VectorEnv.recv`."""
        state, rewards, terminations, truncations = self._receive()
        ended = terminations | truncations
        infos: dict[str, Any] = {}
        if self._is_async:
            ids = state[self._layout.env_id]
            self._busy[ids], self._ended[ids] = False, ended
            infos["env_id"] = ids.astype(np.int64)
            infos["_env_id"] = np.ones(len(ids), bool)
            infos["valid"] = state[self._layout.at["step_type"]] != FIRST
        if self._all_infos:
            self._add_infos(infos, state, np.ones(len(ended), bool))
        if np.count_nonzero(ended):
            if self._layout.infos:
                infos["final_info"] = self._add_infos({}, state, ended)
            rows = np.flatnonzero(ended)
            space = self.single_observation_space
            add_final_observations(infos, space, self._arrays(state), rows)
            if not self._is_async:
                self._put_first_rows(state, self._ids[ended])
        self._add_mask(infos, state)
        self._last = state
        arrays = self._arrays(state)
        ids = state[self._layout.env_id] if self._is_async else None
        self._guard.enforce(arrays, rewards, infos.get("action_mask"), self.faults, ids)
        if np.count_nonzero(ended):
            # Asynchronous, they are observations as well, and counted as such.
            faults = Counter[str]() if self._is_async else self.faults
            self._guard.enforce_finals(infos, truncations & ~terminations, faults, ids)
        observations = unflatten(self.single_observation_space, arrays)
        return observations, rewards, terminations, truncations, infos

    def recv_unreset(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Like `recv`, but starts no episode: what ended stays until `reset`."""
        state, rewards, terminations, truncations = self._receive()
        infos = self._current_infos(state)
        return self._observations(state), rewards, terminations, truncations, infos

    def _receive(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """The next batch as EnvPool gives it: ended environments stand at their last state."""
        self._check_open()
        if self._under_way < self.batch_size:
            raise UserError(
                f"recv() would wait for ever: {self._under_way} environments are under way and "
                f"batch_size is {self.batch_size}; send() actions first"
            )
        state = self._pool._recv()
        self._under_way -= self.batch_size
        terminations, truncations = self._layout.ends(state)
        rewards = state[self._layout.at["reward"]].astype(np.float64).reshape(len(terminations))
        return state, rewards, terminations, truncations

    # ---- EnvPool's arrays as the contract's

    def _arrays(self, state: list[np.ndarray]) -> list[np.ndarray]:
        """One array `[B, ...]` per leaf, in the type and shape that the space names."""
        arrays = []
        for at, leaf in zip(self._layout.observed, self._layout.leaves, strict=True):
            array = state[at]
            if array.dtype != leaf.dtype:
                array = array.astype(leaf.dtype)
            if array.shape[1:] != leaf.shape:
                array = array.reshape(len(array), *leaf.shape)
            arrays.append(array)
        return arrays

    def _observations(self, state: list[np.ndarray]) -> Any:
        return unflatten(self.single_observation_space, self._arrays(state))

    def _joined(self, parts: list[list[np.ndarray]]) -> list[np.ndarray]:
        """Joins batches and puts their rows in the order of the environments."""
        if not self._is_async:
            return parts[0]
        order = np.argsort(np.concatenate([part[self._layout.env_id] for part in parts]))
        return [np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)]

    def _add_infos(
        self, infos: dict[str, Any], state: list[np.ndarray], which: np.ndarray
    ) -> dict[str, Any]:
        for name, at in self._layout.infos.items():
            infos[name] = state[at].copy()
            infos["_" + name] = which.copy()
        return infos

    def _add_mask(self, infos: dict[str, Any], state: list[np.ndarray]) -> dict[str, Any]:
        if self._layout.mask is not None:
            mask = state[self._layout.mask] != 0
            infos["action_mask"] = mask.reshape(len(mask), -1)
            infos["_action_mask"] = np.ones(len(mask), bool)
        return infos

    def _current_infos(self, state: list[np.ndarray]) -> dict[str, Any]:
        infos = self._add_infos({}, state, np.ones(self.num_envs, bool))
        return self._add_mask(infos, state)

    # ---- the rest

    def render(self) -> tuple[np.ndarray, ...]:
        """One RGB frame `[H, W, 3]` (uint8) per environment.

        Raises:
            UserError: Made without `render_mode="rgb_array"`, or never reset.
        """
        self._check_open()
        if self.render_mode is None or self._pool is None:
            raise UserError("render() wants render_mode='rgb_array' and a reset() before it")
        return tuple(self._pool.render(env_ids=self._ids))

    def close_extras(self, **kwargs: Any) -> None:
        """Ends EnvPool's threads."""
        self._pool = None


def _check_batch_size(num_envs: int, batch_size: int | None) -> None:
    if batch_size is not None and not 1 <= batch_size <= num_envs:
        raise UserError(f"batch_size {batch_size} must lie between 1 and num_envs ({num_envs})")
    if batch_size is not None and num_envs % batch_size:
        raise UserError(
            f"batch_size {batch_size} does not divide num_envs {num_envs}; EnvPool answers in "
            "whole batches only, so take one that does"
        )
