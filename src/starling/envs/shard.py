"""The environments of one worker: the only place where an environment is stepped.

Every backend drives shards and nothing else, so that serial, threaded and process stepping
give bit-identical rollouts by construction.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from starling.envs.buffers import ENVIRONMENT, NO_SEED, STEPS, Buffers
from starling.envs.messages import Description, Infos, ShardOptions
from starling.envs.seeding import episode_seed
from starling.envs.spaces import Leaf, cast, flatten, flattener, leaves, samples, unflatten
from starling.errors import StarlingError, UserError, WorkerError


class Shard:
    """M environments whose results are written in place into `Buffers`."""

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        first: int = 0,
        options: ShardOptions = ShardOptions(),  # noqa: B008 - immutable
    ):
        """Makes the environments.

        Args:
            env_fns: One factory per environment.
            first: Index of the first of them in the whole vector environment.
            options: See `ShardOptions`.

        Raises:
            WorkerError: A factory raised.
            UserError: The environments do not belong together.
        """
        self._first = first
        self._options = options
        self._buffers: Buffers | None = None
        self._progress = memoryview(bytearray(64)).cast("q")  # until there are buffers
        self.envs: list[gym.Env] = []
        try:
            for i, make in enumerate(env_fns):
                self._progress[ENVIRONMENT] = i
                self._make(make)
            self._check_alike()
        except StarlingError:
            self.close()
            raise
        self._steps = [env.step for env in self.envs]
        self._observation_space = self.envs[0].observation_space
        self._action_space = self.envs[0].action_space
        self._leaves = leaves(self._observation_space)
        self._flatten = flattener(self._observation_space)
        self._child_seeds: list[int | None] = [None] * len(self.envs)
        self._episodes = [-1] * len(self.envs)
        self._actions: list[list] = [[] for _ in self.envs]
        self._masked = False  # whether an environment has ever given an action mask
        self._ended = [False] * len(self.envs)  # NEXT_STEP only
        self._warned_of_dtype = first > 0  # the first shard speaks for all

    def _make(self, make: Callable[[], gym.Env]) -> None:
        try:
            self.envs.append(make())
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failure("could not be made", error) from error

    def _check_alike(self) -> None:
        if len({id(env) for env in self.envs}) < len(self.envs):
            raise UserError(
                "the environment factory returned the same environment twice; "
                "it must make a new one at every call"
            )
        first = self.envs[0]
        for i, env in enumerate(self.envs):
            for kind in ("observation_space", "action_space"):
                if getattr(env, kind) != getattr(first, kind):
                    raise UserError(
                        f"all environments need the same {kind}: environment "
                        f"{self._first + i} has {getattr(env, kind)}, environment "
                        f"{self._first} has {getattr(first, kind)}"
                    )

    def describe(self) -> Description:
        """What the vector environment takes over from the first environment."""
        env = self.envs[0]
        return Description(
            env.observation_space, env.action_space, dict(env.metadata), env.spec, env.render_mode
        )

    def bind(self, buffers: Buffers) -> None:
        """Sets the arrays `[M, ...]` that actions are read from and results written to."""
        self._buffers = buffers
        self._progress = buffers.progress.data
        buffers.seeds[:] = NO_SEED
        buffers.action_masks[:] = True

    # ---- resets

    def reset(
        self,
        seeds: Sequence[int | None],
        options: dict[str, Any] | None = None,
        mask: np.ndarray | None = None,
    ) -> Infos | None:
        """Resets the environments, or those where `mask` (bool `[M]`) is true.

        Returns:
            The infos of the resets; None if all of them are empty.
        """
        infos = Infos([], [])
        with self._blamed("failed in reset()"):
            for i, seed in enumerate(seeds):
                if mask is None or mask[i]:
                    self._progress[ENVIRONMENT] = i
                    self._reset_one(i, seed, options, infos)
        return self._worth_sending(infos, self._masked)

    def _reset_one(self, i: int, seed: int | None, options: dict | None, infos: Infos) -> None:
        if self._options.episode_seeds:
            seed = self._next_episode_seed(i, seed)
        buffers = self._bound()
        if seed is not None:
            buffers.seeds[i] = seed
        observation, info = self.envs[i].reset(seed=seed, options=options)
        self._store(buffers.observations, i, observation)
        self._ended[i] = False
        if info:
            info = self._take_mask(i, info)
        if info:
            infos.current.append((i, info))

    def _next_episode_seed(self, i: int, seed: int | None) -> int:
        if seed is not None:
            self._child_seeds[i], self._episodes[i] = seed, -1
        child = self._child_seeds[i]
        assert child is not None, "the first reset is seeded"
        self._episodes[i] += 1
        self._actions[i] = []
        return episode_seed(child, self._episodes[i])

    # ---- steps

    def step(self) -> Infos | None:
        """Steps every environment by the actions in the buffers, resetting those that end.

        Returns:
            Infos worth sending; None if there are none.
        """
        buffers, space = self._bound(), self._action_space
        actions = samples(space, unflatten(space, buffers.actions))
        if self._options.episode_seeds:
            # of their own: an environment may write into the action that it is given
            copies = samples(space, unflatten(space, buffers.actions))
            for log, action in zip(self._actions, copies, strict=True):
                log.append(action)
        buffers.terminations[:] = False
        buffers.truncations[:] = False
        if masked := self._masked:
            buffers.action_masks[:] = True
        self._progress[STEPS] += 1
        infos = Infos([], [])
        try:
            everyone = range(len(self.envs))
            going_on = self._reset_ended(infos) if self._options.next_step else everyone
            self._step_each(going_on, actions, infos)
        except (Exception, SystemExit) as error:
            raise self._failure("failed in step()", error) from error
        return self._worth_sending(infos, self._masked and not masked)

    def _worth_sending(self, infos: Infos, news: bool) -> Infos | None:
        if infos.current or infos.final or news:
            return infos._replace(masked=self._masked)
        return None

    def _step_each(self, indices: Sequence[int], actions: list, infos: Infos) -> None:
        # The hot loop: a few look-ups here are per cents of a fast environment's step.
        buffers, progress, steps = self._bound(), self._progress, self._steps
        observations, rewards = buffers.observations[0], buffers.rewards
        plain = len(self._leaves) == 1 and not self._leaves[0].path
        shape, dtype = (self._leaves[0].shape, self._leaves[0].dtype) if plain else (None, None)
        ndarray, all_infos = np.ndarray, self._options.all_infos
        for i in indices:
            progress[ENVIRONMENT] = i
            observation, rewards[i], terminated, truncated, info = steps[i](actions[i])
            if terminated or truncated:
                self._end(i, observation, terminated, truncated, info, infos)
                continue
            if (
                observation.__class__ is ndarray
                and observation.dtype == dtype
                and observation.shape == shape
            ):
                observations[i] = observation
            else:
                self._store(buffers.observations, i, observation)
            if info:
                info = self._take_mask(i, info)
                if info and all_infos:
                    infos.current.append((i, info))

    def _end(
        self, i: int, observation: Any, terminated: Any, truncated: Any, info: dict, infos: Infos
    ) -> None:
        buffers = self._bound()
        buffers.terminations[i] = terminated
        buffers.truncations[i] = truncated
        if self._options.next_step:
            self._store(buffers.observations, i, observation)
            info = self._take_mask(i, info)
            if info:
                infos.current.append((i, info))
            self._ended[i] = True
            return
        self._store(buffers.final_observations, i, observation)
        if info:
            infos.final.append((i, info))
        self._reset_one(i, None, None, infos)

    def _reset_ended(self, infos: Infos) -> list[int]:
        """With `NEXT_STEP` an ended environment is reset, and its action ignored."""
        going_on = [i for i, ended in enumerate(self._ended) if not ended]
        for i, ended in enumerate(self._ended):
            if ended:
                self._progress[ENVIRONMENT] = i
                self._bound().rewards[i] = 0.0
                self._reset_one(i, None, None, infos)
        return going_on

    # ---- what environments return

    def _store(self, arrays: list[np.ndarray], i: int, observation: Any) -> None:
        """Copies an observation into row i of one array per leaf, checking what it is."""
        try:
            values = self._flatten(observation)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TypeError(
                f"the observation is not nested like {self._observation_space}: {error!r}"
            ) from None
        for leaf, array, value in zip(self._leaves, arrays, values, strict=True):
            kind, shape = value.__class__, leaf.shape
            if (kind is int and not shape) or (
                kind is np.ndarray and value.dtype == leaf.dtype and value.shape == shape
            ):
                array[i] = value
            else:
                self._store_converted(leaf, array, i, np.asarray(value))

    def _store_converted(self, leaf: Leaf, array: np.ndarray, i: int, value: np.ndarray) -> None:
        name = f"observation {leaf.name!r}" if leaf.path else "observation"
        if value.shape != leaf.shape:
            raise ValueError(f"{name}: shape {value.shape} given, {leaf.shape} expected")
        if value.dtype != leaf.dtype:
            self._warn_of_dtype(name, value.dtype, leaf.dtype)
        if value.dtype.kind == leaf.dtype.kind == "f":  # fast, because it is frequent
            with contextlib.suppress(FloatingPointError), np.errstate(over="raise"):
                array[i] = value
                return
        array[i] = cast(value, leaf.dtype, name)

    def _warn_of_dtype(self, name: str, given: np.dtype, expected: np.dtype) -> None:
        if not self._warned_of_dtype:
            self._warned_of_dtype = True
            warnings.warn(
                f"{name}: {given} given where the space says {expected}; it is converted",
                stacklevel=2,
            )

    def _take_mask(self, i: int, info: dict) -> dict:
        """Moves `info["action_mask"]` into the buffers and returns the rest of the info."""
        masks = self._bound().action_masks
        if "action_mask" not in info or not masks.shape[1]:
            return info
        info = dict(info)
        given = info.pop("action_mask")
        if isinstance(given, dict | tuple | list):
            parts = flatten(self._action_space, given) if isinstance(given, dict) else given
            given = np.concatenate([np.ravel(part) for part in parts])
        given = np.ravel(given)
        if given.shape != masks.shape[1:]:
            raise ValueError(
                f'info["action_mask"]: {given.size} values given, {masks.shape[1]} expected, '
                f"one for each choice in {self._action_space}"
            )
        masks[i] = given != 0
        self._masked = True
        return info

    # ---- exact resume

    def state(self) -> list[dict[str, Any]]:
        """Per environment its seed, episode and actions since that began, ready for JSON."""
        space = self._action_space
        histories = zip(self._child_seeds, self._episodes, self._actions, strict=True)
        return [
            {
                "seed": seed,
                "episode": episode,
                "actions": [[np.asarray(x).tolist() for x in flatten(space, a)] for a in actions],
            }
            for seed, episode, actions in histories
        ]

    def restore(self, states: Sequence[dict[str, Any]]) -> Infos | None:
        """Brings every environment to where `state` found it."""
        infos = Infos([], [])
        with self._blamed("failed in restore()"):
            for i, state in enumerate(states):
                self._progress[ENVIRONMENT] = i
                self._child_seeds[i], self._episodes[i] = state["seed"], state["episode"] - 1
                own = Infos([], [])
                self._reset_one(i, None, None, own)
                infos.current.extend(self._replay(i, state["actions"]) or own.current)
        return self._worth_sending(infos, self._masked)

    def _replay(self, i: int, recorded: list[list]) -> list[tuple[int, dict]]:
        if not recorded:
            return []
        buffers, space = self._bound(), self._action_space
        batch = [
            np.array(values, leaf.dtype).reshape(-1, *leaf.shape)
            for leaf, values in zip(leaves(space), zip(*recorded, strict=True), strict=True)
        ]
        self._actions[i] = samples(space, unflatten(space, batch))
        info: dict = {}
        for action in samples(space, unflatten(space, batch)):
            observation, _, terminated, truncated, info = self.envs[i].step(action)
            if terminated or truncated:
                raise RuntimeError(
                    "the episode ended while its recorded actions were replayed; the environment "
                    "is not determined by its seed and actions, so it cannot be restored"
                )
            self._store(buffers.observations, i, observation)
            info = self._take_mask(i, info)
        return [(i, info)] if info and self._options.all_infos else []

    # ---- the rest

    def call(self, name: str, args: tuple, kwargs: dict) -> list[Any]:
        """Calls a method of every environment, or reads an attribute."""
        results = []
        with self._blamed(f"failed in {name}()"):
            for i, env in enumerate(self.envs):
                self._progress[ENVIRONMENT] = i
                attribute = env.get_wrapper_attr(name)
                results.append(attribute(*args, **kwargs) if callable(attribute) else attribute)
        return results

    def set_attr(self, name: str, values: Sequence[Any]) -> None:
        """Sets an attribute of every environment, one value each."""
        with self._blamed(f"failed in set_attr({name!r})"):
            for i, env in enumerate(self.envs):
                self._progress[ENVIRONMENT] = i
                env.set_wrapper_attr(name, values[i])

    def close(self) -> None:
        """Closes the environments; what they raise while doing so concerns nobody any more."""
        for env in self.envs:
            with contextlib.suppress(Exception, SystemExit):
                env.close()

    def _bound(self) -> Buffers:
        assert self._buffers is not None, "bind() comes first"
        return self._buffers

    @contextlib.contextmanager
    def _blamed(self, what: str):
        """Turns what an environment raises into a `WorkerError` that names it."""
        try:
            yield
        except (Exception, SystemExit) as error:
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: BaseException) -> WorkerError:
        i, step = self._progress[ENVIRONMENT], self._progress[STEPS]
        seed = NO_SEED if self._buffers is None else int(self._buffers.seeds[i])
        seed = None if seed == NO_SEED else seed
        index = self._first + i
        trace = "".join(traceback.format_exception(error)).rstrip()
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return WorkerError(
            f"environment {index} {what} (worker pid {os.getpid()}, seed {seed}, step {step}): "
            f"{cause}\n\nThe environment's own traceback:\n{trace}",
            env_index=index,
            pid=os.getpid(),
            seed=seed,
            step=step,
            original_traceback=trace,
        )
