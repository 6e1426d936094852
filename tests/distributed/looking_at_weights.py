"""Compares rollouts with the parameters that they say they were collected with."""

from __future__ import annotations

from typing import Any

import numpy as np
from elastic_cases import Taken

from starling.training.distributed_ppo import DistributedPPO


class LooksAtWeights(Taken):
    """A callback that compares what is learnt from with the parameters of its version.

    Args:
        agent: Whose workers are made now.
    """

    def __init__(self, agent: DistributedPPO):
        super().__init__()
        self.agent = agent
        self.pool = agent.make_collector()
        self.published: dict[int, Any] = {}
        self._publish_really, self.pool.publish = self.pool.publish, self.publish

    def publish(self) -> Any:
        published = self._publish_really()
        self.published[published.version] = published.acting
        return published

    def __call__(self, iteration: Any) -> Any:
        super().__call__(iteration)
        for rollout in [report.rollout for report in self.pool.reports]:
            self._check_weights(rollout)

    def _check_weights(self, rollout: Any) -> None:
        """That the actions were chosen with the parameters that it says, and with no others."""
        version, algorithm = rollout.origin.version, self.agent.algorithm
        rollout = rollout._replace(outputs=None)  # what the worker says that they said
        again = algorithm.describe(self.published[version], rollout, None)[0].log_probs
        np.testing.assert_allclose(again, rollout.log_probs, atol=1e-5)
        if version:
            other = algorithm.describe(self.published[version - 1], rollout, None)[0].log_probs
            assert np.abs(other - rollout.log_probs).max() > 1e-4
