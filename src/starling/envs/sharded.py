"""The vector environment of the backends that step shards: serial, thread and process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode

from starling.envs.buffers import BUSY, NO_SEED, buffer_size, make_buffers
from starling.envs.guards import Guard
from starling.envs.infos import add_final_observations, joined_infos, warn_of_conversions
from starling.envs.messages import Description, ShardOptions
from starling.envs.recovery import Recovery
from starling.envs.requests import Answer, Workers
from starling.envs.safety import Safety
from starling.envs.seeding import child_seeds
from starling.envs.spaces import check_same, leaves, store_batch, unflatten
from starling.envs.vector_env import VectorEnv, check_count, check_infos, checked_mask, checked_mode
from starling.envs.worker_count import choose_workers, usable_cores
from starling.errors import UserError, WorkerError
from starling.flags import any_of


class ShardedVectorEnv(VectorEnv):
    """Base of the backends whose workers have a `Shard` each."""

    keeps_timeouts = True
    _workers_class: ClassVar[type[Workers]]

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
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
        """Makes the environments.

        Args:
            env_fns: One factory per environment.
            seed: Used by the first `reset` that is given none.
            num_workers: Workers that share the environments; by default the usable cores.
            batch_size: Environments that one `recv` returns, all by default. A worker's
                environments come back together, so it is a multiple of `num_envs / num_workers`.
            infos: "final" delivers the infos of resets and of steps that ended an episode,
                "all" those of every step, which costs time.
            copy: Return copies. Without it, arrays are valid until the next `send` or `step`.
            episode_seeds: Seed every episode from the environment's seed and its number, and
                record actions, so that `state` and `restore` can be used.
            step_timeout: Seconds that a step, reset or call may take; no limit by default.
            autoreset_mode: `SAME_STEP`, which Starling's trainers need, or `NEXT_STEP`, for
                Gymnasium's wrappers that accept nothing else, such as `NormalizeObservation`.
            safety: What to do about faults.

        Raises:
            UserError: Arguments that do not go together, or a space that cannot be handled.
            WorkerError: An environment could not be made.
        """
        mode = checked_mode(autoreset_mode, episode_seeds)
        check_infos(infos)
        if step_timeout is not None and not step_timeout > 0:
            raise UserError(f"step_timeout is {step_timeout}; give seconds above 0, or None")
        if self.backend != "process":
            safety.require_process(f"backend {self.backend}")
        safety.require_what_it_takes(mode is AutoresetMode.SAME_STEP, episode_seeds)
        n = len(env_fns)
        self.num_workers = choose_workers(n, num_workers, batch_size, self._default_workers())
        bounds = [round(w * n / self.num_workers) for w in range(self.num_workers + 1)]
        self._rows = [slice(start, stop) for start, stop in pairwise(bounds)]
        self._all = list(range(self.num_workers))
        self.restorable = episode_seeds
        self._masked = False  # whether the environments give action masks
        self._copy, self._seed, self._told = copy, seed, dict[str, bool]()  # see _infos
        self._workers = self._workers_class(self._rows, step_timeout)
        self._workers.first_env = safety.first_env
        self._finalizer = weakref.finalize(self, self._workers.stop)
        options = ShardOptions(
            infos == "all",
            episode_seeds,
            mode is AutoresetMode.NEXT_STEP,
            isolate=safety.on_env_error != "raise",
            saturate=safety.on_invalid_data != "raise",
        )
        try:
            described = self._workers.start([list(env_fns[rows]) for rows in self._rows], options)
            self._check_alike(described)
            self._take_over(described[0], batch_size, mode, safety)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _default_workers() -> int:
        """Workers to have where the user does not say."""
        return usable_cores()

    def _check_alike(self, described: list[Description]) -> None:
        first = described[0]
        for rows, other in zip(self._rows, described, strict=True):
            index = self._workers.first_env + rows.start
            check_same("observation_space", other.observation_space, first[0], index)
            check_same("action_space", other.action_space, first[1], index)

    def _take_over(
        self, first: Description, batch_size: int | None, mode: AutoresetMode, safety: Safety
    ) -> None:
        n = self._rows[-1].stop
        spaces = first.observation_space, first.action_space
        layout = (leaves(spaces[0]), leaves(spaces[1]), n, self.num_workers)
        self._buffers = make_buffers(*layout, self._workers.allocate(buffer_size(*layout)))
        self._observations = unflatten(spaces[0], self._buffers.observations)
        self._workers.bind(self._buffers)
        self._describe(
            n,
            *spaces,
            batch_size=batch_size,
            metadata=first.metadata,
            spec=first.spec,
            render_mode=first.render_mode,
            autoreset_mode=mode,
        )
        guard = Guard(*spaces, safety.on_invalid_data)
        self._recovery = Recovery(
            self._workers, self._buffers, safety, guard, self.faults, self.batch_size
        )

    # ---- stepping

    def send(self, actions: Any, env_ids: Sequence[int] | np.ndarray | None = None) -> None:
        """Starts a step and returns at once; see `VectorEnv.send`.

        `env_ids` names whole workers' environments, as `infos["env_id"]` of a `recv` does.
        """
        workers = self._all if env_ids is None else self._workers_of(env_ids)
        self._check_usable(workers)
        self._check_stepping()
        self._store_actions(actions, workers)
        self._workers.request(self._living(workers), "step")

    def _living(self, workers: list[int]) -> list[int]:
        gone = self._recovery.retired
        return [w for w in workers if w not in gone] if gone else workers

    def _store_actions(self, actions: Any, workers: list[int]) -> None:
        space, stored = self.single_action_space, self._buffers.actions
        if workers is self._all:
            only = stored[0]
            if (  # the way of nearly all steps
                isinstance(actions, np.ndarray)
                and len(stored) == 1
                and (actions.dtype == only.dtype or np.can_cast(actions.dtype, only.dtype))
                and actions.shape == only.shape
            ):
                only[...] = actions
                return
            store_batch(space, actions, stored, "actions")
            return
        ids = self._env_ids(workers)
        given = [np.empty((len(ids), *array.shape[1:]), array.dtype) for array in stored]
        store_batch(space, actions, given, "actions")
        for array, values in zip(stored, given, strict=True):
            array[ids] = values

    def _workers_of(self, env_ids: Sequence[int] | np.ndarray) -> list[int]:
        ids = np.asarray(env_ids)
        starts = {rows.start: w for w, rows in enumerate(self._rows)}
        workers = [starts[i] for i in ids.tolist() if i in starts]
        if not np.array_equal(ids, self._env_ids(workers)) or len(set(workers)) < len(workers):
            raise UserError(
                f"env_ids {ids.tolist()} are not the environments of whole workers: these are "
                f"{[f'{rows.start}..{rows.stop - 1}' for rows in self._rows]}, in any order"
            )
        return self._all if workers == self._all else workers

    def _env_ids(self, workers: Sequence[int]) -> np.ndarray:
        ids = np.arange(self.num_envs)
        return np.concatenate([ids[:0], *(ids[self._rows[w]] for w in workers)])

    def recv(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Waits for the first `batch_size` environments that finished; see `VectorEnv.recv`."""
        self._check_usable()
        whole = self.batch_size == self.num_envs
        gone = [Answer(w, 0, None, False) for w in self._recovery.retired] if whole else []
        needed = self.num_workers * self.batch_size // self.num_envs - len(gone)
        ready = self._workers.ready
        if len(ready) + len(self._workers.awaited) < needed:
            self._check_stepping()
            raise UserError("nothing to receive: send() actions for enough environments first")
        self._workers.gather(needed)
        answers = [ready.popleft() for _ in range(needed)]
        valid = self._recovery.after_step(answers)
        if whole and len(self._all) > 1:
            answers = sorted([*answers, *gone], key=lambda answer: answer.worker)
        workers = [answer.worker for answer in answers]
        buffers = self._buffers
        rewards = self._rows_of(buffers.rewards, workers)
        terminations = self._rows_of(buffers.terminations, workers)
        truncations = self._rows_of(buffers.truncations, workers)
        infos = self._infos(answers, self.batch_size)
        if valid is not None:
            infos["valid"] = self._rows_of(valid, workers)
        same_step = self.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        if same_step and (any_of(terminations) or any_of(truncations)):
            finals = [self._rows_of(array, workers) for array in buffers.final_observations]
            ended = np.flatnonzero(terminations | truncations)
            add_final_observations(infos, self.single_observation_space, finals, ended)
        if not whole:
            infos["env_id"] = self._env_ids(workers)
            infos["_env_id"] = np.ones(self.batch_size, np.bool_)
        return self._observed(workers), rewards, terminations, truncations, infos

    def _rows_of(self, array: np.ndarray, workers: list[int]) -> np.ndarray:
        if len(workers) in (1, self.num_workers):
            part = array if len(workers) == self.num_workers else array[self._rows[workers[0]]]
            return part.copy() if self._copy else part
        return np.concatenate([array[self._rows[w]] for w in workers])

    def _observed(self, workers: list[int]) -> Any:
        if len(workers) == self.num_workers and not self._copy:
            return self._observations
        values = [self._rows_of(array, workers) for array in self._buffers.observations]
        return unflatten(self.single_observation_space, values)

    def _infos(self, answers: list[Answer], count: int) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        workers, given = [a.worker for a in answers], [a.result for a in answers]
        if any(given):
            self._masked = self._masked or any(part.masked for part in given if part)
            sizes = [self._rows[w].stop - self._rows[w].start for w in workers]
            infos = joined_infos(given, sizes, count)
            converted = {one: False for part in given if part for one in part.converted}
            self._told = converted | self._told
        if self._masked:
            masks = self._rows_of(self._buffers.action_masks, workers)
            infos["action_mask"], infos["_action_mask"] = masks, np.ones(count, np.bool_)
            self._recovery.check_masks(masks, workers)
        return infos

    def heed(self, stop: Callable[[], bool]) -> None:
        """See `VectorEnv.heed`."""
        if not self.closed:
            self._recovery.restarts.stop = stop

    # ---- resets and exact resume

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts a new episode in every environment; see `VectorEnv.reset`."""
        self._check_usable()
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if mask is not None:
            mask = checked_mask(mask, self.num_envs)
            self._check_usable(self._all)
            self._check_stepping()
        seeds = self._seeds(seed)
        wanted = [w for w in self._all if mask is None or mask[self._rows[w]].any()]
        chosen = self._living(wanted)
        args = [
            (seeds[rows], options or None, None if mask is None else mask[rows])
            for rows in (self._rows[w] for w in chosen)
        ]
        self._workers.trouble = "the last reset() did not succeed; call reset() again"
        answers = self._workers.complete(chosen, "reset", args)
        return self._begun(answers, mask)

    def _begun(self, answers: list[Answer], mask: np.ndarray | None) -> tuple[Any, dict[str, Any]]:
        self._recovery.after_reset(answers, mask)
        self._workers.trouble = ""
        given = {answer.worker: answer for answer in answers}
        whole = [given.get(w) or Answer(w, 0, None, False) for w in self._all]
        return self._observed(self._all), self._infos(whole, self.num_envs)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        first, self._seed = self._seed, None
        if seed is None:
            seed = first
        if isinstance(seed, int | np.integer):
            seeds: list[int | None] = [*child_seeds(int(seed), self.num_envs)]  # none is negative
            self._np_random, self._np_random_seed = np_random(int(seed))
            return seeds
        if seed is None:
            if self.restorable and (self._buffers.seeds == NO_SEED).any():
                return list(child_seeds(None, self.num_envs))
            return [None] * self.num_envs
        check_count(seed, self.num_envs, "seeds")
        return [None if one is None else int(one) for one in seed]

    def state(self) -> list[dict[str, Any]]:
        """What `restore` needs to bring every environment back; see `VectorEnv.state`."""
        if not self.restorable:
            raise UserError(self._not_restorable())
        self._check_usable(self._all)
        self._check_stepping()
        answers = self._reach("state", [()] * self.num_workers)
        lost = self._recovery.state_of  # of a worker, which the next step will report
        return [s for w, _, states, failed in answers for s in (lost(w) if failed else states)]

    def restore(self, states: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """Brings every environment to where `state` found it; see `VectorEnv.restore`."""
        if not self.restorable:
            raise UserError(self._not_restorable())
        check_count(states, self.num_envs, "states")
        self._check_usable()
        self._workers.trouble = "the last restore() did not succeed; call reset()"
        answers: dict[int, Answer] = {}
        while left := [w for w in self._all if w not in answers]:  # or was lost meanwhile
            self._recovery.revive()
            args = [(states[self._rows[w]],) for w in left]
            given = self._workers.complete(left, "restore", args)
            answers |= {answer.worker: answer for answer in given if not answer.failed}
        return self._begun(list(answers.values()), None)

    # ---- reaching into the environments

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Calls a method of every environment, or reads an attribute; a value for each."""
        self._check_usable(self._all)
        answers = self._reach("call", [(name, args, kwargs)] * self.num_workers)
        given = {answer.worker: answer.result for answer in answers}
        values = []
        for w, rows in enumerate(self._rows):  # None of environments whose worker is gone
            values += given.get(w, [None] * (rows.stop - rows.start))
        return tuple(values)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Reads an attribute of every environment."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Sets an attribute of every environment: a list or tuple of values, or one for all."""
        self._check_usable(self._all)
        if not isinstance(values, list | tuple):
            values = [values] * self.num_envs
        check_count(values, self.num_envs, "values")
        self._reach("set_attr", [(name, values[rows]) for rows in self._rows])

    def render(self) -> tuple[Any, ...]:
        """What each environment renders."""
        return self.call("render")

    def _reach(self, method: str, args: Sequence[tuple]) -> list[Answer]:
        """Has a method done that breaks no episode, not even where it fails."""
        trouble, living = self._workers.trouble, self._living(self._all)
        try:
            return self._workers.complete(living, method, [args[w] for w in living])
        finally:
            self._workers.trouble = trouble

    @property
    def busy_seconds(self) -> np.ndarray | None:
        """Seconds that each worker has spent stepping so far, `[W]`."""
        return None if self.closed else self._buffers.progress[:, BUSY] / 1e9

    @property
    def worker_memory(self) -> list[float]:
        """Megabytes that each worker process keeps in memory; [] where there is none."""
        living = [] if self.closed else self._living(self._all)
        sizes = [self._workers.memory_of(w) for w in living]
        return [size / 2**20 for size in sizes if size]

    # ---- life and death

    def _check_usable(self, idle: Sequence[int] = ()) -> None:
        """Raises unless the workers live, and those named have nothing to do or to deliver."""
        self._check_open()
        self._workers.check_alive()
        warn_of_conversions(self._told)
        awaited, ready = self._workers.awaited, self._workers.ready
        if (awaited or ready) and any(w in idle for w in (*awaited, *(a.worker for a in ready))):
            raise UserError("a step is under way in these environments: recv() its results first")

    def _check_stepping(self) -> None:
        if self._workers.trouble:
            raise WorkerError(f"the environments are not in an episode: {self._workers.trouble}")

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the workers; returns in any case, and whatever state they are in."""
        self._finalizer()
        # Arrays that recv returned without copying keep the memory alive as long as they live.
        for name in ("_buffers", "_observations", "_recovery"):
            self.__dict__.pop(name, None)
