"""How a run fares: faults that it survived, and how its environments' workers keep up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from starling.envs.vector_env import VectorEnv
from starling.errors import StarlingError
from starling.storage.rollout import Rollout
from starling.training.collector import HostCollector
from starling.training.compiled_collector import CompiledCollector
from starling.training.fused import Ends
from starling.training.ray_pool import Pool, RayPool

_MOST_LOST = 1000  # environment steps in a row of which none is experience


class Health:
    """Watches the environments of a run, from one call of `train` to the next.

    Args:
        collector: That steps them.
        evaluations: Faults of the environments that it is evaluated on, kept up to date.

    Attributes:
        past: Faults of the run that the environments do not count, or no longer.
    """

    def __init__(
        self,
        collector: HostCollector | CompiledCollector | Pool,
        evaluations: Mapping[str, int] | None = None,
    ):
        self.collector = collector
        self.past: Counter[str] = Counter()
        self._evaluations = {} if evaluations is None else evaluations
        self._busy = self._busy_seconds()
        self._lost = 0  # environment steps since the last that was experience

    def made(self, rollout: Rollout | Ends) -> int:
        """The environment steps of a rollout that are experience.

        Raises:
            StarlingError: For long there was none, so that the run would never end.
        """
        rows = rollout.rewards.size
        made = rows if rollout.valid is None else int(rollout.valid.sum())
        self._lost = 0 if made else self._lost + rows
        if self._lost >= _MOST_LOST:
            told = ", ".join(f"{name} {n:,}" for name, n in sorted(self.faults().items()))
            raise StarlingError(
                f"none of the last {self._lost:,} environment steps can be learnt from, as all "
                f"were lost or cut off for invalid data ({told}): mend the environment (`starling "
                "check` looks for what is wrong with it)"
            )
        return made

    def faults(self) -> Counter[str]:
        """What went wrong in the whole run and was survived: counts above 0, by name."""
        collector = self.collector
        counted = collector if isinstance(collector, Pool) else collector.envs
        return self.past + Counter(dict(counted.faults)) + Counter(self._evaluations)

    def counts(self) -> dict[str, float]:
        """The faults by logged names."""
        return {f"faults/{name}": n for name, n in self.faults().items()}

    def metrics(self) -> dict[str, float]:
        """The faults, and how the workers have fared since the last call, by logged names."""
        logged = self.counts()
        before, self._busy = self._busy, self._busy_seconds()
        if len(self._busy) > 1 and len(self._busy) == len(before):
            # The clock of a worker that was begun anew has started again.
            seconds = np.where(self._busy >= before, self._busy - before, self._busy)
            if seconds.any():
                logged["perf/straggler"] = float(seconds.max() / seconds.mean())
        memory = [megabytes for envs in self._vector_envs() for megabytes in envs.worker_memory]
        if memory:
            logged["perf/worker_memory_max"] = max(memory)
        return logged

    def _busy_seconds(self) -> np.ndarray:
        parts = [envs.busy_seconds for envs in self._vector_envs()]
        return np.concatenate([np.zeros(0), *(part for part in parts if part is not None)])

    def _vector_envs(self) -> list[VectorEnv]:
        collector = self.collector
        if isinstance(collector, RayPool):
            return []
        if isinstance(collector, Pool):
            return [actor.envs for actor in collector.actors]
        return [collector.envs]


def frame_skip(envs: VectorEnv) -> int:
    """Frames in a step, where the environment was made with a number of them; else 1."""
    kwargs = getattr(envs.spec, "kwargs", None) or {}
    skip = kwargs.get("frame_skip", kwargs.get("frameskip", 1))
    return skip if isinstance(skip, int) else 1
