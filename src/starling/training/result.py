"""What comes out of a run."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What came out of a run: the content of `result.json`."""

    env: str
    algo: str
    seed: int
    backend: str
    num_envs: int
    preset: str | None
    steps: int
    """Environment steps in all."""
    episodes: int
    wall_time_s: float
    """Seconds that this call took."""
    steps_per_second: float
    """Steps of this call / its seconds."""
    steady_steps_per_second: float
    """The same after the first iteration, which compiles."""
    episode_return_mean: float | None
    """Over the last 100 episodes; None without any, or where it is not finite."""
    status: str
    """completed, stop_return, stop_iterations, max_time, callback, or stopped (by a signal)."""
    run: str
    """The run's folder."""
