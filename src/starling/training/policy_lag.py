"""How many updates old rollouts are when they are learnt from, as it is logged."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

_LAG_CLASSES = {  # up to each of these numbers, by logged names
    0: "async/policy_lag_0",
    1: "async/policy_lag_1",
    2: "async/policy_lag_2",
    4: "async/policy_lag_3_to_4",
    8: "async/policy_lag_5_to_8",
    16: "async/policy_lag_9_to_16",
    math.inf: "async/policy_lag_above_16",
}


def lag_class(lag: int) -> str:
    """The logged name that a lag is counted by."""
    return next(name for most, name in _LAG_CLASSES.items() if lag <= most)


def lag_metrics(lags: list[int], lag_counts: Counter[str], dropped: int) -> dict[str, Any]:
    """How old the parts of a rollout and of all so far are, and how many were too old."""
    return {
        **lag_counts,
        "async/policy_lag_min": min(lags),
        "async/policy_lag_mean": sum(lags) / len(lags),
        "async/policy_lag_max": max(lags),
        "async/dropped": dropped,
    }
