"""Environments that make up rollouts, and what a replay of them has to give, in plain lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from starling.storage.replay import Batch, Replay
from starling.storage.rollout import Rollout

CHOICES = 3


class Step(NamedTuple):
    row: int
    observation: int
    action: int
    reward: float


@dataclass
class Episode:
    """Steps that follow one another; how it ended, and what the last one led to."""

    steps: list[Step] = field(default_factory=list)
    ended: str = ""
    last_observation: int = -1
    last_mask: Any = None


class Expected(NamedTuple):
    observation: int
    action: int
    returns: float
    discount: float
    next_observation: int
    next_mask: Any


class Environments:
    """N environments whose observations are numbers that never come twice.

    Args:
        num_envs: N.
        seed: Of what happens.
        next_step: Whether they reset one step later, in a row that is not valid.
        masks: Whether there are action masks.
        faults: Whether steps are lost, and rows missing.
    """

    def __init__(self, num_envs: int, seed: int, next_step=False, masks=False, faults=True):
        self.random = np.random.default_rng(seed)
        self.num_envs, self.next_step, self.masks, self.faults = num_envs, next_step, masks, faults
        self.number = 0
        self.rows = 0  # made so far, by each environment
        self.episodes: list[list[Episode]] = [[] for _ in range(num_envs)]
        self.observations: list[int] = []
        self.mask_at: list[dict[int, Any]] = [{} for _ in range(num_envs)]
        self.resets = [False] * num_envs
        self.begin_anew()

    def new(self, after: int | None = None) -> int:
        """The next observation, which follows another of its episode or begins one."""
        self.number += 1
        return self.number

    def begin_anew(self) -> None:
        """All are reset; the replay has to be told."""
        if self.observations:
            for n in range(self.num_envs):
                episode = self.episodes[n][-1]
                if not episode.ended:
                    episode.ended, episode.last_observation = "truncated", self.observations[n]
                if episode.last_mask is None:
                    episode.last_mask = np.ones(CHOICES, bool)  # it never comes
            self.rows += 1  # the row that has an observation only
        self.observations = [self.new() for _ in range(self.num_envs)]
        for n in range(self.num_envs):
            self.episodes[n].append(Episode())
            self.resets[n] = False

    def rollout(self, steps: int) -> Rollout:
        shape = (steps, self.num_envs)
        observations = np.zeros((steps + 1, self.num_envs), np.int64)
        observations[0] = self.observations
        actions = self.random.integers(0, CHOICES, shape)
        rewards = self.random.normal(size=shape).astype(np.float32)
        ends = self.random.choice(5, shape, p=[0.7, 0.1, 0.1, 0.05, 0.05])
        masks = self.random.random((*shape, CHOICES)) < 0.6
        terminated, truncated, finals = np.zeros(shape, bool), np.zeros(shape, bool), {}
        valid = np.ones(shape, bool)
        for t in range(steps):
            for n in range(self.num_envs):
                step = Step(self.rows, self.observations[n], actions[t, n], rewards[t, n])
                self.mask_at[n][self.rows] = masks[t, n]
                kind = ends[t, n] if self.faults or ends[t, n] < 3 else 0
                valid[t, n], terminated[t, n], truncated[t, n], final = self._step(n, step, kind)
                if final is not None:
                    finals[t * self.num_envs + n] = final
            self.rows += 1
            observations[t + 1] = self.observations
        index = np.full(len(finals) + 2, steps * self.num_envs, np.int32)
        index[: len(finals)] = list(finals)
        rows = np.zeros((len(index), *self.shown(observations).shape[2:]))
        if finals:
            rows[: len(finals)] = self.shown(np.array(list(finals.values())))
        return Rollout(
            self.shown(observations),
            actions,
            rewards,
            terminated,
            truncated,
            None if self.next_step else rows.astype(self.shown(observations).dtype),
            None if self.next_step else index,
            None if valid.all() else valid,
            masks if self.masks else None,
        )

    def shown(self, numbers: np.ndarray) -> np.ndarray:
        """Observations as arrays; what is expected has their numbers."""
        return np.asarray(numbers)

    def oldest_needed(self, row: int, first: int) -> int:
        """The oldest row without which this row of an episode cannot be read."""
        return row

    def _step(self, n: int, step: Step, kind: int) -> tuple[bool, bool, bool, int | None]:
        """One step of one environment: valid, terminated, truncated, final observation."""
        episode = self.episodes[n][-1]
        if self.resets[n]:  # the reset that comes one step later; its reward is rubbish
            self.resets[n] = False
            episode.last_mask = self.mask_at[n][step.row]
            self._begin(n)
            return False, False, False, None
        if kind in (3, 4):  # a step is lost, or a row says nothing at all
            episode.ended, episode.last_observation = "truncated", step.observation
            episode.last_mask = self.mask_at[n][step.row]
            self._begin(n)
            return False, False, kind == 3, step.observation if kind == 3 else None
        episode.steps.append(step)
        if kind == 0:
            self.observations[n] = self.new(step.observation)
            return True, False, False, None
        episode.ended = "terminated" if kind == 1 else "truncated"
        episode.last_observation = self.new(step.observation)
        if self.next_step:
            self.observations[n], self.resets[n] = episode.last_observation, True
        else:
            episode.last_mask = np.ones(CHOICES, bool)
            self._begin(n)
        both = kind == 1 and self.random.random() < 0.3
        return True, kind == 1, kind == 2 or both, episode.last_observation if kind == 2 else None

    def _begin(self, n: int) -> None:
        self.observations[n] = self.new()
        self.episodes[n].append(Episode())

    def expected(self, n_step: int, gamma: float, rows_kept: int) -> dict[int, Expected]:
        """Every transition that can be sampled, by its index."""
        return {
            step.row * self.num_envs + n: found
            for n, episodes in enumerate(self.episodes)
            for episode in episodes
            for i, step in enumerate(episode.steps)
            if self.oldest_needed(step.row, episode.steps[0].row) >= self.rows - rows_kept
            and (found := self._transition(n, episode, i, n_step, gamma)) is not None
        }

    def _transition(
        self, n: int, episode: Episode, i: int, n_step: int, gamma: float
    ) -> Expected | None:
        steps = episode.steps[i : i + n_step]
        to_the_end = i + len(steps) == len(episode.steps)
        if to_the_end and episode.ended:
            discount = 0.0 if episode.ended == "terminated" else gamma ** len(steps)
            following, mask = episode.last_observation, episode.last_mask
            if episode.ended == "terminated":
                mask = np.ones(CHOICES, bool)
            elif mask is None and self.masks:
                return None  # it comes with the row that resets
        elif len(steps) < n_step:
            return None
        else:
            discount = gamma**n_step
            row = steps[-1].row + 1
            following = episode.steps[i + n_step].observation if not to_the_end else None
            if following is None:
                following = self.observations[n]
            mask = self.mask_at[n].get(row)
            if mask is None and self.masks:
                return None
        returns = sum(gamma**k * step.reward for k, step in enumerate(steps))
        first = episode.steps[i]
        return Expected(first.observation, first.action, returns, discount, following, mask)


class StackedEnvironments(Environments):
    """Environments whose observations are stacks of frames, begun with whatever padding.

    Args:
        depth: Frames in a stack.
        shape: Of a frame.
        others: As for `Environments`.
    """

    def __init__(self, depth: int, shape: tuple[int, ...], *others, **options):
        self.depth = depth
        self.stacks = np.zeros((10_000, depth, *shape), np.uint8)
        super().__init__(*others, **options)

    def new(self, after: int | None = None) -> int:
        number = super().new(after)
        stack = self.stacks[number]
        if after is None:
            padding = number % 3  # frames of another episode, zeros, or the first frame repeated
            stack[:] = self.random.integers(0, 256, stack.shape) * (padding != 1)
            stack[:-1] = stack[-1] if padding == 2 else stack[:-1]
        else:
            stack[:-1] = self.stacks[after][1:]
        stack[-1] = self.random.integers(0, 256, stack.shape[1:])
        return number

    def shown(self, numbers: np.ndarray) -> np.ndarray:
        return self.stacks[numbers]

    def oldest_needed(self, row: int, first: int) -> int:
        return max(row - self.depth + 1, first)


def check(batch: Batch, expected: dict[int, Expected], environments: Environments) -> None:
    """Compares every field of every row with what it has to be."""
    rows = [expected.get(index) for index in batch.indices.ravel().tolist()]
    assert None not in rows, "a transition that cannot be sampled"
    assert batch.indices.dtype == np.int64
    shape = batch.indices.shape

    def all_of(name: str) -> np.ndarray:
        values = np.array([getattr(row, name) for row in rows])
        return values.reshape(*shape, *values.shape[1:])

    observations = environments.shown(all_of("observation"))
    np.testing.assert_array_equal(batch.observations, observations)
    assert batch.observations.dtype == observations.dtype
    np.testing.assert_array_equal(batch.actions, all_of("action"))
    np.testing.assert_allclose(batch.returns, all_of("returns"), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(batch.discounts, all_of("discount"), rtol=1e-6)
    for array in (batch.returns, batch.discounts, batch.weights):
        assert array.dtype == np.float32
        assert array.shape == shape
    goes_on = batch.discounts > 0
    following = environments.shown(all_of("next_observation"))
    np.testing.assert_array_equal(batch.next_observations[goes_on], following[goes_on])
    if environments.masks:
        np.testing.assert_array_equal(batch.next_action_masks, all_of("next_mask"))
    else:
        assert batch.next_action_masks is None


def check_all(replay: Replay, expected: dict[int, Expected], environments: Environments) -> None:
    """Compares what is drawn, and how much there is to draw from."""
    assert len(replay) == len(expected)
    if not expected:
        return
    batch = replay.sample(len(expected), 12)
    check(batch, expected, environments)
    seen = len(set(batch.indices.ravel().tolist()))
    assert seen >= len(expected) - 3  # one in 160,000 is missed by chance
