"""Whether trees of arrays are the same to the bit, and runs that were stopped like whole ones."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from counters import metrics_of


def same(a: Any, b: Any) -> None:
    """Fails if the arrays of two trees differ."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, durations and speeds apart."""
    timed = ("time/fps", "time/time_elapsed", "perf/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics]


def assert_like_one_run(agent: Any, whole: Any) -> None:
    """Everything is as if the agent's run had never stopped."""
    same(agent.arrays(), whole.arrays())
    assert (agent.step, agent.iteration) == (whole.step, whole.iteration)
    assert without_times(metrics_of(agent.run)) == without_times(metrics_of(whole.run))
    episodes = [(one.run / "episodes.csv").read_text() for one in (agent, whole)]
    assert episodes[0] == episodes[1]
    assert episodes[0].count("\n") > 3
