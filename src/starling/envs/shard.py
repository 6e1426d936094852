"""The environments of one worker: the only place where an environment is stepped.

Every backend drives shards and nothing else, so that serial, threaded and process stepping
give bit-identical rollouts by construction.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from starling.envs.buffers import BUSY, ENVIRONMENT, NO_SEED, STEPS, Buffers
from starling.envs.messages import Description, Infos, ShardOptions
from starling.envs.observations import ObservationWriter
from starling.envs.seeding import episode_seed
from starling.envs.spaces import check_same, flat_mask, flatten, leaves, samples, unflatten
from starling.errors import UserError, WorkerError, is_interrupt, said, traceback_of

_SPACES = ("observation_space", "action_space")


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
            first: Index of the first of them in the run, for messages.
            options: See `ShardOptions`.

        Raises:
            WorkerError: A factory raised.
            UserError: The environments do not belong together.
        """
        self._first, self._options = first, options
        self._buffers: Buffers | None = None
        self._progress = memoryview(bytearray(64)).cast("q")  # until there are buffers
        self._env_fns = list(env_fns)
        self.envs: list[gym.Env] = []
        try:
            for i in range(len(env_fns)):
                self.envs.append(self._make(i))
            self._spaces = {kind: getattr(self.envs[0], kind) for kind in _SPACES}
            self._check_alike()
        except BaseException:
            self.close()
            raise
        self._steps = [env.step for env in self.envs]
        self._going = range(len(self.envs))  # those that were not dropped
        observation_space, self._action_space = (self._spaces[kind] for kind in _SPACES)
        self._writer = ObservationWriter(observation_space, options.saturate)
        self._child_seeds: list[int | None] = [None] * len(self.envs)
        self._episodes = [-1] * len(self.envs)
        self._actions: list[list] = [[] for _ in self.envs]
        self._masked = False  # whether an environment has ever given an action mask
        self._ended = [False] * len(self.envs)  # NEXT_STEP only

    def _make(self, i: int) -> gym.Env:
        self._progress[ENVIRONMENT] = i
        try:
            return self._env_fns[i]()
        except UserError:
            raise
        except BaseException as error:
            raise self._failure("could not be made", error) from error

    def _check_alike(self) -> None:
        if len({id(env) for env in self.envs}) < len(self.envs):
            raise UserError(
                "the environment factory returned the same environment twice; "
                "it must make a new one at every call"
            )
        for i, env in enumerate(self.envs):
            for kind, first in self._spaces.items():
                check_same(kind, getattr(env, kind), first, self._first + i)

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
        self._progress[STEPS] = 0
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
        infos = Infos([], [], [])
        for i in self._going:
            if mask is None or mask[i]:
                self._progress[ENVIRONMENT] = i
                with self._blamed("failed in reset()", infos):
                    self._reset_one(i, seeds[i], options, infos)
        return self._worth_sending(infos, self._masked)

    def rebuild(self, indices: Sequence[int], seeds: Sequence[int]) -> Infos | None:
        """Makes some environments anew, and resets them.

        Raises:
            UserError: One of them has other spaces than before.
        """
        infos = Infos([], [], [])
        for i, seed in zip(indices, seeds, strict=True):
            self._close(self.envs[i])
            try:
                self.envs[i] = self._make(i)
            except WorkerError as failure:
                infos.failed.append((i, failure))
                continue
            self._check_alike()
            with self._blamed("failed in reset()", infos):
                self._reset_one(i, seed, None, infos)
        return self._worth_sending(infos, self._masked)

    def drop(self, indices: Sequence[int]) -> None:
        """Closes some environments, and goes on without them; their rows stay as they are."""
        self._going = [i for i in self._going if i not in indices]
        for i in indices:
            self._close(self.envs[i])

    def _reset_one(self, i: int, seed: int | None, options: dict | None, infos: Infos) -> None:
        if self._options.episode_seeds:
            seed = self._next_episode_seed(i, seed)
        buffers = self._bound()
        if seed is not None:
            buffers.seeds[i] = seed
        self._steps[i] = self.envs[i].step  # another one, once `legacy` has looked at it
        observation, info = self.envs[i].reset(seed=seed, options=options)
        self._writer.write(buffers.observations, i, observation)
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
        started = time.perf_counter_ns()
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
        infos = Infos([], [], [])
        going_on = iter(self._reset_ended(infos) if self._options.next_step else self._going)
        while True:
            try:
                self._step_each(going_on, actions, infos)
                break
            except BaseException as error:
                failure = self._failure("failed in step()", error)
                if not self._options.isolate:
                    raise failure from error
                infos.failed.append((self._progress[ENVIRONMENT], failure))  # the rest goes on
        self._progress[BUSY] += time.perf_counter_ns() - started
        return self._worth_sending(infos, self._masked and not masked)

    def _worth_sending(self, infos: Infos, news: bool) -> Infos | None:
        converted = self._writer.conversions()
        worth = infos.current or infos.final or infos.failed or news or converted
        return infos._replace(masked=self._masked, converted=converted) if worth else None

    def _step_each(self, indices: Iterable[int], actions: list, infos: Infos) -> None:
        # The hot loop: a few look-ups here are per cents of a fast environment's step.
        buffers, progress, steps = self._bound(), self._progress, self._steps
        observations, rewards = buffers.observations[0], buffers.rewards
        first = self._writer.leaves[0]
        plain = len(self._writer.leaves) == 1 and not first.path
        shape, dtype = (first.shape, first.dtype) if plain else (None, None)
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
                self._writer.write(buffers.observations, i, observation)
            if info:
                info = self._take_mask(i, info)
                if info and all_infos:
                    infos.current.append((i, info))

    def _end(
        self, i: int, observation: Any, terminated: Any, truncated: Any, info: dict, infos: Infos
    ) -> None:
        buffers = self._bound()
        if self._options.next_step:
            buffers.terminations[i], buffers.truncations[i] = terminated, truncated
            self._writer.write(buffers.observations, i, observation)
            info = self._take_mask(i, info)
            if info:
                infos.current.append((i, info))
            self._ended[i] = True
            return
        self._writer.write(buffers.final_observations, i, observation)
        # Set once all of the step is stored: should the reset fail, the step still counts.
        buffers.terminations[i], buffers.truncations[i] = terminated, truncated
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
                with self._blamed("failed in reset()"):
                    self._reset_one(i, None, None, infos)
        return going_on

    # ---- what environments return

    def _take_mask(self, i: int, info: dict) -> dict:
        """Moves `info["action_mask"]` into the buffers and returns the rest of the info."""
        masks = self._bound().action_masks
        if "action_mask" not in info or not masks.shape[1]:
            return info
        info = dict(info)
        masks[i] = flat_mask(self._action_space, info.pop("action_mask"), masks.shape[1])
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
        infos = Infos([], [], [])
        with self._blamed("failed in restore()"):
            for i, state in enumerate(states):
                self._progress[ENVIRONMENT] = i
                self._child_seeds[i], self._episodes[i] = state["seed"], state["episode"] - 1
                own = Infos([], [], [])
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
                    "is not determined by its seed and actions, so it cannot be restored: resume "
                    "with exact_resume False"
                )
            self._writer.write(buffers.observations, i, observation)
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
            self._close(env)

    def _close(self, env: gym.Env) -> None:
        with contextlib.suppress(WorkerError), self._blamed("failed in close()"):
            env.close()

    def _bound(self) -> Buffers:
        assert self._buffers is not None, "bind() comes first"
        return self._buffers

    @contextlib.contextmanager
    def _blamed(self, what: str, infos: Infos | None = None):
        """Turns what an environment raises into a `WorkerError` that names it.

        With `infos`, and where each environment is on its own, it is noted there.
        """
        try:
            yield
        except BaseException as error:
            failure = self._failure(what, error)
            if infos is None or not self._options.isolate:
                raise failure from error
            infos.failed.append((self._progress[ENVIRONMENT], failure))

    def _failure(self, what: str, error: BaseException) -> WorkerError:
        if is_interrupt(error):
            raise error  # the user's, not the environment's
        i, step = self._progress[ENVIRONMENT], self._progress[STEPS]
        seed = NO_SEED if self._buffers is None else int(self._buffers.seeds[i])
        seed = None if seed == NO_SEED else seed
        index = self._first + i
        trace, message = traceback_of(error), said(error)
        cause = f"{type(error).__name__}: {message}" if message else type(error).__name__
        return WorkerError(
            f"environment {index} {what} (worker pid {os.getpid()}, seed {seed}, step {step}): "
            f"{cause}\n\nThe environment's own traceback:\n{trace}",
            env_index=index,
            pid=os.getpid(),
            seed=seed,
            step=step,
            original_traceback=trace,
        )
