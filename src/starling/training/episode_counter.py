"""Counts the episodes of a run, whoever collected them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from starling.reporting.episodes import Episodes, EpisodeStatistics, joined
from starling.storage.rollout import Rollout
from starling.training.fused import Ends


class EpisodeCounter(EpisodeStatistics):
    """`EpisodeStatistics`, of the rollouts that a run takes."""

    def __init__(self, num_envs: int):
        super().__init__(num_envs)
        self._restarts: dict[int, int] = {}  # of each actor

    def count(
        self,
        rollout: Rollout | Ends,
        first_step: int,
        envs: slice = slice(None),
        together: int | None = None,
    ) -> Episodes:
        """Counts a rollout of some environments; see `update`."""
        return self.update(
            rollout.rewards,
            rollout.terminated,
            rollout.truncated,
            rollout.valid,
            first_step=first_step,
            envs=envs,
            together=together,
        )

    def count_parts(self, parts: Sequence[Rollout], first_step: int, together: int) -> Episodes:
        """Counts rollouts of actors with environments of their own, which may have begun anew.

        Args:
            parts: Of the actors, also those that are not learnt from.
            first_step: Environment steps that the run had made before.
            together: Environments whose steps the run counts at the same time.
        """
        return joined([self._count_part(part, first_step, together) for part in parts])

    def _count_part(self, rollout: Rollout, first_step: int, together: int) -> Episodes:
        worker, restarts = rollout.origin.worker, rollout.origin.restarts
        width = rollout.rewards.shape[1]
        envs = slice(worker * width, (worker + 1) * width)
        self.make_room(envs.stop)
        if restarts != self._restarts.get(worker, 0):
            self._restarts[worker] = restarts
            self.forget(envs)
        return self.count(rollout, first_step, envs, together)


def only_counted(rollout: Rollout) -> Rollout:
    """What counting episodes takes of a rollout whose buffer is given back."""
    valid = None if rollout.valid is None else np.array(rollout.valid)
    return rollout._replace(
        observations=(),
        actions=(),
        final_observations=(),
        rewards=np.array(rollout.rewards),
        terminated=np.array(rollout.terminated),
        truncated=np.array(rollout.truncated),
        valid=valid,
    )
