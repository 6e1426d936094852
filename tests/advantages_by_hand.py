"""Advantages that were computed by hand, for every way in which an episode can end or go on."""

from __future__ import annotations

import numpy as np


def table():
    """Four environments whose advantages are in the comments, with gamma = lambda = 1/2."""
    rewards = np.tile(np.array([1, 2, 3, 4, 5], np.float32)[:, None], (1, 4))
    values = np.tile(np.array([2, 4, 6, 8, 10, 12], np.float32)[:, None], (1, 4))
    final_values = np.zeros((5, 4), np.float32)
    terminated, truncated = np.zeros((5, 4), bool), np.zeros((5, 4), bool)
    # 0: truncated at t=1, with value 20 where it was; terminated at t=3 with reward 6.
    #    deltas: 1 + 4/2 - 2 = 1, 2 + 20/2 - 4 = 8, 3 + 8/2 - 6 = 1, 6 - 8 = -2, 5 + 12/2 - 10 = 1
    truncated[1, 0], final_values[1, 0], terminated[3, 0], rewards[3, 0] = True, 20, True, 6
    # 1: terminated and truncated at t=1: nothing follows, whatever the value there.
    truncated[1, 1], terminated[1, 1], final_values[1, 1] = True, True, 20
    # 2: truncated by the last step. Its delta: 5 + 20/2 - 10 = 5
    truncated[4, 2], final_values[4, 2] = True, 20
    # 3: an episode longer than the rollout: all deltas are 1.
    expected = np.array(
        [
            [1 + 8 / 4, 1 - 2 / 4, 1 + 1.390625 / 4, 1 + 1.328125 / 4],
            [8, 2 - 4, 1 + 1.5625 / 4, 1 + 1.3125 / 4],
            [1 - 2 / 4, 1 + 1.25 / 4, 1 + 2.25 / 4, 1 + 1.25 / 4],
            [-2, 1 + 1 / 4, 1 + 5 / 4, 1 + 1 / 4],
            [1, 1, 5, 1],
        ]
    )
    return (rewards, values, final_values, terminated, truncated), expected
