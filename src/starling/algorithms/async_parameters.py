"""What algorithms with actors can be told besides. Imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorParameters:
    """Parameters of actors that collect while the network learns."""

    num_actors: int | None = None
    """Threads that collect while the learner learns, each with num_envs / num_actors environments.
    None: one, or several for environments that spend a step waiting rather than computing."""

    actor_restarts: int = 0
    """Times that actors which failed are started anew, with fresh environments, before the run
    fails."""

    serial: bool = False
    """Actors and learner take turns on one thread: slower, and the same result each time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagParameters:
    """Parameters of the correction for policies that are older than the one that learns."""

    correction: Literal["vtrace", "none"] = "vtrace"
    """How returns are corrected for actions that an older policy chose: by V-trace, or not."""

    rho_clip: float = 1.0
    """V-trace: largest weight of a temporal difference."""

    c_clip: float = 1.0
    """V-trace: largest weight with which later temporal differences are passed on."""

    max_policy_lag: int = 16
    """Rollouts of a policy that is more updates old than this are dropped, and counted."""
