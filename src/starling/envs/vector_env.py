"""The contract that every backend keeps: N copies of an environment, stepped together."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector import VectorEnv as GymnasiumVectorEnv
from gymnasium.vector.utils import batch_space

from starling.errors import StoppedError, UserError


def checked_mask(mask: Any, num_envs: int) -> np.ndarray:
    """Returns `options["reset_mask"]`, bool `[N]`; refuses what is none."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise UserError('options["reset_mask"] must be a NumPy array of bool')
    if mask.shape != (num_envs,) or not mask.any():
        raise UserError(
            f'options["reset_mask"] has shape {mask.shape} and {int(mask.sum())} true values; '
            f"it needs shape ({num_envs},) and at least one"
        )
    return mask


def only_mask(options: dict | None, num_envs: int, whose: str) -> np.ndarray | None:
    """Returns `options["reset_mask"]`, if given; refuses other options of a reset.

    Args:
        options: Of the reset.
        num_envs: N.
        whose: Which environments take no other, for the message.
    """
    options = dict(options or {})
    mask = options.pop("reset_mask", None)
    if options:
        raise UserError(f"{whose} environments take no reset options; {sorted(options)} given")
    return None if mask is None else checked_mask(mask, num_envs)


def check_infos(infos: str) -> None:
    """Refuses what is no choice of infos."""
    if infos not in ("final", "all"):
        raise UserError(f'infos is {infos!r}; it can be "final" or "all"')


def check_count(given: Sequence[Any], num_envs: int, what: str) -> None:
    """Refuses values of which there is not one for each environment."""
    if len(given) != num_envs:
        raise UserError(f"{len(given)} {what} given for {num_envs} environments")


def is_same_step(mode: AutoresetMode | str) -> bool:
    """Whether an autoreset mode, or its name, is `SAME_STEP`."""
    same = AutoresetMode.SAME_STEP
    return mode in (same, same.name, same.value)


def checked_mode(mode: AutoresetMode | str, episode_seeds: bool) -> AutoresetMode:
    """Returns the autoreset mode that a name stands for; refuses what cannot be had."""
    names = {
        name: member
        for member in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)
        for name in (member, member.name, member.value)
    }
    if mode not in names:
        raise UserError(f"autoreset_mode {mode} cannot be had; use SAME_STEP or NEXT_STEP")
    if episode_seeds and names[mode] is AutoresetMode.NEXT_STEP:
        raise UserError("episode_seeds needs autoreset_mode SAME_STEP; leave one of them out")
    return names[mode]


@contextlib.contextmanager
def heeding(envs: VectorEnv, stop: Callable[[], bool]) -> Iterator[None]:
    """Has environments heed `stop`, and ends the `with` block where they do."""
    envs.heed(stop)
    try:
        with contextlib.suppress(StoppedError):
            yield
    finally:
        envs.heed(lambda: False)


class VectorEnv(GymnasiumVectorEnv):
    """N copies of an environment behind one `step`.

    A `gymnasium.vector.VectorEnv` with autoreset mode `SAME_STEP`: where an episode ended,
    `observations` holds the first observation of the next one and `infos["final_obs"]` the true
    last one. `step` is `send` followed by `recv`.

    Observations and actions are batched as Gymnasium batches them: an array `[N, ...]` for a
    plain space, a dict or tuple of such arrays for a nested one, in their native dtype.

    A backend calls `_describe` once it knows its spaces, and implements `reset`, `send`, `recv`
    and `close_extras`.

    Attributes:
        backend: Name of the backend in the registry.
        num_envs: N, the number of environments.
        num_workers: Threads or processes that step them (1 where the caller's own thread does).
        batch_size: Environments that one `recv` returns; `num_envs` unless asked otherwise.
        restorable: Whether `state` and `restore` can be used.
        keeps_timeouts: Whether a `step_timeout` has an effect.
        compiled: The environments for programs that step them themselves; None if there are none.
        faults: What has gone wrong so far and was borne, by kind: `env_errors`, `worker_deaths`,
            `timeouts`, `restarts`, `dropped_envs`, `lost_steps`, `invalid_data`,
            `recycled_workers`.
    """

    backend: ClassVar[str] = ""
    keeps_timeouts: ClassVar[bool] = False
    compiled: Any = None
    num_workers: int = 1
    batch_size: int = 0
    restorable: bool = False

    def _describe(
        self,
        num_envs: int,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        batch_size: int | None = None,
        metadata: dict[str, Any] | None = None,
        spec: Any = None,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    ) -> None:
        """Sets the attributes that Gymnasium and Starling promise, from one environment's."""
        self.num_envs = num_envs
        self.batch_size = num_envs if batch_size is None else batch_size
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.metadata = {**(metadata or {}), "autoreset_mode": autoreset_mode}
        self.spec = spec
        self.render_mode = render_mode
        self.faults: Counter[str] = Counter()

    def _check_open(self) -> None:
        if self.closed:
            raise UserError("the vector environment is closed; make a new one")

    @property
    def busy_seconds(self) -> np.ndarray | None:
        """Seconds that each worker has spent stepping so far, `[W]`; None if nobody counts."""
        return None

    @property
    def worker_memory(self) -> list[float]:
        """Megabytes that each worker process keeps in memory; [] where there is none."""
        return []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts a new episode in every environment.

        Args:
            seed: One integer, from which each environment gets a child seed of its own, or one
                seed per environment. Without it the first reset uses the seed that the vector
                environment was made with, and later ones go on with the random streams.
            options: Passed to each environment. `options["reset_mask"]` (bool `[N]`) resets
                only some of them; the others keep their observation and go on.

        Returns:
            Observations `[N, ...]` and infos.
        """
        raise NotImplementedError

    def send(self, actions: Any, env_ids: Sequence[int] | np.ndarray | None = None) -> None:
        """Starts a step and returns at once.

        Args:
            actions: Batched actions, one row for each of `env_ids`.
            env_ids: Environments to step; all of them where it is left out.
        """
        raise NotImplementedError

    def recv(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Waits for the first `batch_size` environments that have finished their step.

        Returns:
            Observations `[B, ...]`, rewards (float64 `[B]`), terminations and truncations
            (bool `[B]`), infos. Where `batch_size` is below `num_envs`, `infos["env_id"]`
            (int64 `[B]`) says which environments these are.

            `infos["final_obs"]` (object array `[B]`, with the mask `infos["_final_obs"]`) holds
            the last observation of each episode that ended, `infos["final_info"]` its info, and
            `infos["action_mask"]` (bool `[B, K]`) what may be done next, where the environment
            says so. `infos["valid"]` (bool `[B]`), where present, is False for rows that are no
            experience. One that is truncated as well is a step that was lost: its reward is 0,
            and its final observation the last good one.
        """
        raise NotImplementedError

    def step(
        self, actions: Any, env_ids: Sequence[int] | np.ndarray | None = None
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps the environments: `send` followed by `recv`."""
        self.send(actions, env_ids)
        return self.recv()

    def heed(self, stop: Callable[[], bool]) -> None:
        """Has `stop` asked where a step takes long since environments are begun anew.

        If it says so, the step raises `StoppedError`, and a `reset` goes on from there.
        """

    def state(self) -> list[dict[str, Any]]:
        """What `restore` needs to bring every environment back to where it stands now.

        Returns:
            One dictionary per environment, ready for JSON: its `seed`, its `episode` (0 for the
            first) and the `actions` since that episode began.

        Raises:
            UserError: The vector environment was not made with `episode_seeds=True`.
        """
        raise UserError(self._not_restorable())

    def restore(self, states: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """Seeds and resets every environment as `state` recorded it and replays its actions.

        Exact where an environment's seed and actions determine what it does within an episode.

        Returns:
            Observations `[N, ...]` and infos, as from `reset`.
        """
        raise UserError(self._not_restorable())

    def _not_restorable(self) -> str:
        return (
            f"these environments (backend {self.backend}) cannot be restored: make them from "
            "an id or a factory, with episode_seeds=True and the backend serial, thread or process"
        )
