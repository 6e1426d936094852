"""What the environments gave in T steps: everything an on-policy update needs, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from starling.errors import UserError
from starling.flags import any_of

Tree = Any
Array = Any  # NumPy's on the host, JAX's inside a compiled program


class Origin(NamedTuple):
    """Where a rollout comes from.

    Attributes:
        version: Of the parameters that chose the actions.
        worker: Who collected it.
        sequence: Its number among that worker's rollouts.
        restarts: How often that worker had failed and begun anew, with other episodes.
    """

    version: int = 0
    worker: int = 0
    sequence: int = 0
    restarts: int = 0


class Rollout(NamedTuple):
    """T steps of N environments. Trees have the structure of the space they belong to.

    Attributes:
        observations: `[T + 1, N, ...]`; row T is what the last step led to.
        actions: `[T, N, ...]`, raw, as the policy's distribution sampled them.
        rewards: `[T, N]` float32.
        terminated: `[T, N]`, the episode ended here, and nothing comes after it.
        truncated: `[T, N]`, the episode was cut here, and would have gone on.
        final_observations: `[K, ...]`, the true last observations of truncated episodes, padded.
        final_index: `[K]` int32, the flat index t * N + n that each belongs to; T * N for padding.
            None where `observations[t + 1]` always is what step t truly led to: of environments
            that reset one step later, in a row that is not `valid`.
        valid: `[T, N]`, False where a row is no experience (the reset rows of some vector
            environments, steps that were lost); None where all are.
        action_masks: `[T, N, choices]`, False where a choice was not allowed; None without masks.
        policy_state: `[N, ...]`, of a recurrent policy before the first step; () for the others.
        origin: Where it comes from.
        log_probs: `[T, N]` float32, of the actions under the policy that chose them; None where
            that is the policy which learns from them.
        reward_sums: `[N]`, discounted sums of the rewards of the episodes under way before the
            first step; None where the learner keeps them itself.
        priorities: `[T, N]`, of the steps in a replay at first, positive where a row is valid; None
            where they are not known.
        outputs: What the networks said of `observations[:-1]` when they acted, `[T, N, A]` and
            values `[T, N]`; None where it was not kept, or is no longer what they say.
    """

    observations: Tree
    actions: Tree
    rewards: Array
    terminated: Array
    truncated: Array
    final_observations: Tree
    final_index: Array  # or None
    valid: Array | None = None
    action_masks: Array | None = None
    policy_state: Tree = ()
    origin: Origin = Origin()
    log_probs: Array | None = None
    reward_sums: Array | None = None
    priorities: Array | None = None
    outputs: tuple[Array, Array] | None = None


class RolloutBuffer:
    """Fills a rollout step by step, in place.

    Arrays are made at the first step, in the native types of what is added, and used again for
    the next rollout: copy what should outlive it. Each observation is copied once.

    Args:
        num_steps: T, steps in a rollout.
        num_envs: N, environments.

    Example:
        >>> buffer.begin(observations)
        >>> for _ in range(num_steps):
        ...     action = agent.act(observations)
        ...     observations, rewards, terminated, truncated, infos = envs.step(action.env)
        ...     buffer.add(action.raw, observations, rewards, terminated, truncated, infos)
        >>> rollout = buffer.finish()
    """

    def __init__(self, num_steps: int, num_envs: int):
        self.num_steps = num_steps
        self.num_envs = num_envs
        try:
            self._rewards = np.zeros((num_steps, num_envs), np.float32)
            self._terminated = np.zeros((num_steps, num_envs), np.bool_)
            self._truncated = np.zeros((num_steps, num_envs), np.bool_)
        except MemoryError as error:
            raise UserError(
                f"a rollout of num_steps x num_envs = {num_steps} x {num_envs} does not fit into "
                f"memory ({error}): lower one of them"
            ) from error
        self._observations: Tree = None
        self._actions: Tree = None
        self._valid: np.ndarray | None = None
        self._masks: np.ndarray | None = None
        self._position = -1

    def begin(self, observations: Tree, policy_state: Tree = ()) -> None:
        """Starts a rollout.

        Args:
            observations: `[N, ...]`, what the first actions are chosen for.
            policy_state: `[N, ...]`, of a recurrent policy; () for the others.
        """
        self._policy_state = policy_state
        if self._observations is None:
            rows = self.num_steps + 1
            self._observations = map_tree(lambda x: _storage(x, rows), observations)
        _write(self._observations, 0, observations)
        self._position = 0
        self._finals: list[Tree] = []
        self._final_index: list[int] = []
        if self._valid is not None:
            self._valid[:] = True

    def add(
        self,
        actions: Tree,
        next_observations: Tree,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: Mapping[str, Any],
        action_masks: np.ndarray | None = None,
    ) -> None:
        """Copies one step in.

        Args:
            actions: `[N, ...]`, raw.
            next_observations: `[N, ...]`, what the step returned.
            rewards: `[N]`.
            terminated: `[N]`.
            truncated: `[N]`.
            infos: As the vector environment gave them; `final_obs` and `valid` are read.
            action_masks: `[N, choices]`, what was allowed when the actions were chosen, or None.
        """
        t = self._position
        if t < 0 or t >= self.num_steps:
            raise IndexError(f"a rollout takes {self.num_steps} steps: call begin() for the next")
        if self._actions is None:
            self._actions = map_tree(lambda x: _storage(x, self.num_steps), actions)
        _write(self._actions, t, actions)
        _write(self._observations, t + 1, next_observations)
        self._rewards[t] = rewards
        self._terminated[t] = terminated
        self._truncated[t] = truncated
        if action_masks is not None and self._masks is None:
            self._masks = np.ones((self.num_steps, *np.shape(action_masks)), np.bool_)
        if self._masks is not None:
            self._masks[t] = True if action_masks is None else action_masks
        if "valid" in infos:
            if self._valid is None:  # from here on every rollout has it: updates compile once more
                self._valid = np.ones((self.num_steps, self.num_envs), np.bool_)
            self._valid[t] = infos["valid"]
        if any_of(self._truncated[t]):
            for n in np.flatnonzero(truncated & ~terminated):
                self._finals.append(map_tree(np.array, infos["final_obs"][n]))
                self._final_index.append(t * self.num_envs + int(n))
        self._position = t + 1

    def finish(self, origin: Origin = Origin()) -> Rollout:  # noqa: B008
        """The rollout, as views of this buffer's arrays, which the next `begin` writes over.

        Args:
            origin: Where the rollout comes from.
        """
        if self._position != self.num_steps:
            raise ValueError(
                f"the rollout has {max(self._position, 0)} of its {self.num_steps} steps"
            )
        finals, index = self._padded_finals()
        self._position = -1
        return Rollout(
            self._observations,
            self._actions,
            self._rewards,
            self._terminated,
            self._truncated,
            finals,
            index,
            self._valid,
            self._masks,
            self._policy_state,
            origin,
        )

    def _padded_finals(self) -> tuple[Tree, np.ndarray]:
        size = _padded_size(len(self._finals))
        index = np.full(size, self.num_steps * self.num_envs, np.int32)
        index[: len(self._finals)] = self._final_index
        finals = map_tree(lambda x: np.zeros((size, *x.shape[2:]), x.dtype), self._observations)
        for row, final in enumerate(self._finals):
            _write(finals, row, final)
        return finals, index


def _padded_size(rows: int) -> int:
    """Rows that final observations are padded to: 16, 64, 256 ..., so that few programs compile."""
    size = 16
    while size < rows:
        size *= 4
    return size


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    """Puts rollouts of equally many steps side by side: those of N environments in all.

    Args:
        rollouts: Of environments that differ; the first one's origin is kept.

    Returns:
        The rollout, in arrays of its own; the only one itself if there is but one.
    """
    first = rollouts[0]
    if len(rollouts) == 1:
        return first
    finals, index = (None, None) if first.final_index is None else _joined_finals(rollouts)

    def beside(name: str, axis: int = 1) -> Any:
        parts = [getattr(rollout, name) for rollout in rollouts]
        some = next((part for part in parts if part is not None), None)
        if some is None:
            return None
        if name in ("valid", "action_masks"):  # where all are valid, or allowed, it may be left out
            parts = [
                _ones(r, some) if p is None else p for p, r in zip(parts, rollouts, strict=True)
            ]
        return map_tree(lambda *leaves: np.concatenate(leaves, axis), *parts)

    return Rollout(
        beside("observations"),
        beside("actions"),
        beside("rewards"),
        beside("terminated"),
        beside("truncated"),
        finals,
        index,
        beside("valid"),
        beside("action_masks"),
        beside("policy_state", 0),
        first.origin,
        beside("log_probs"),
        beside("reward_sums", 0),
        beside("priorities"),
        beside("outputs"),
    )


def _ones(rollout: Rollout, like: Array) -> np.ndarray:
    return np.ones((*rollout.rewards.shape, *like.shape[2:]), np.bool_)


def _joined_finals(rollouts: Sequence[Rollout]) -> tuple[Tree, np.ndarray]:
    """Final observations of all, padded, and their places in the joined rollout."""
    num_steps = rollouts[0].rewards.shape[0]
    width = sum(rollout.rewards.shape[1] for rollout in rollouts)
    finals, places, offset = [], [], 0
    for rollout in rollouts:
        own = rollout.rewards.shape[1]
        index = np.asarray(rollout.final_index)
        real = index < num_steps * own
        finals.append(
            map_tree(lambda x, real=real: np.asarray(x)[real], rollout.final_observations)
        )
        t, n = np.divmod(index[real], own)
        places.append(t * width + offset + n)
        offset += own
    padding = _padded_size(sum(map(len, places))) - sum(map(len, places))
    places.append(np.full(padding, num_steps * width))

    def padded(*parts: np.ndarray) -> np.ndarray:
        rows = np.zeros((padding, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate([*parts, rows])

    return map_tree(padded, *finals), np.concatenate(places).astype(np.int32)


def map_tree(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Applies a function to the leaves of nested dicts, tuples and lists of arrays."""
    if isinstance(tree, Mapping):
        return {k: map_tree(function, tree[k], *(o[k] for o in others)) for k in tree}
    if isinstance(tree, tuple | list):
        return tuple(map_tree(function, *parts) for parts in zip(tree, *others, strict=True))
    return function(tree, *others)


def tree_leaves(tree: Tree) -> list[Any]:
    """The leaves that `map_tree` applies a function to, in its order."""
    leaves: list[Any] = []
    map_tree(leaves.append, tree)
    return leaves


def _storage(leaf: np.ndarray, steps: int) -> np.ndarray:
    leaf = np.asarray(leaf)
    return np.zeros((steps, *leaf.shape), leaf.dtype)


def _write(target: Tree, row: int, value: Tree) -> None:
    if isinstance(target, np.ndarray):  # the common case, without the walk
        target[row] = value
    elif isinstance(target, dict):
        for key, leaf in target.items():
            _write(leaf, row, value[key])
    else:
        for leaf, part in zip(target, value, strict=True):
            _write(leaf, row, part)
