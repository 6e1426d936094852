"""Where everything lies in the list of arrays that EnvPool exchanges."""

from __future__ import annotations

from typing import Any

from starling.envs.envpool_registry import Task
from starling.envs.spaces import leaves

FIRST = 0  # step_type of an episode's first observation
_MASKS = ("info:action_mask", "info:legal_action_mask")


class Layout:
    """The arrays of one task, by what they are. They may be NumPy's or a program's.

    Attributes:
        leaves: Leaves of the observation space.
        observed: For each leaf, the index of its array.
        at: Index of each array by EnvPool's name for it.
        infos: Index of each info that is worth passing on, by its name.
        mask: Index of the action masks, or None.
        env_id: Index of the environments' numbers.
    """

    def __init__(self, task: Task):
        """Reads the names that EnvPool gives its arrays."""
        keys = task.state_keys
        self._task = task
        self.leaves = leaves(task.observation_space)
        observed = [i for i, key in enumerate(keys) if key.startswith("obs")]
        by_key = {keys[i]: i for i in observed}
        self.observed = [
            by_key["obs:" + ".".join(map(str, leaf.path))] if leaf.path else observed[0]
            for leaf in self.leaves
        ]
        self.at = {key: i for i, key in enumerate(keys)}
        skipped = ("info:env_id", "info:players.env_id", *_MASKS)
        self.infos = {
            key.removeprefix("info:"): i
            for key, i in self.at.items()
            if key.startswith("info:") and key not in skipped
        }
        self.mask = next((self.at[key] for key in _MASKS if key in self.at), None)
        self.env_id = self.at["info:env_id"]

    def ends(self, state: Any) -> tuple[Any, Any]:
        """Which episodes terminated, and which were truncated, bool `[B]` each."""
        done = state[self.at["done"]]
        if self._task.counts_steps:
            return done, state[self.at["elapsed_step"]] >= self._task.limit
        truncated = state[self.at["trunc"]]
        return done & ~truncated, truncated
