"""Numbers that are NaN or infinite: where a rollout has them, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starling.errors import StarlingError, WorkerError
from starling.storage.checkpoint import flatten_tree
from starling.storage.checkpoint_format import write_arrays
from starling.storage.rollout import Rollout
from starling.training.fused import Ends, Learnt
from starling.training.ray_pool import Pool

MOST_SKIPPED = 5
"""Updates that are skipped in a row before a run stops."""


def looks_skipped(metrics: Mapping[str, Any]) -> bool:
    """Whether an update that has ended was skipped, as far as its gradient tells.

    Waits for nothing: what is under way does not look like it.

    Args:
        metrics: That the update returned.
    """
    norm = metrics.get("train/grad_norm")
    if not isinstance(norm, jax.Array) or not norm.is_ready():  # pyright: ignore
        return False
    return not math.isfinite(norm)


def check_rewards(collector: Any, learnt: Sequence[Learnt], iteration: int) -> None:
    """Checks the rewards of environments that are part of a program.

    Args:
        collector: That collected them.
        learnt: The last iterations.
        iteration: Number of the very last.

    Raises:
        WorkerError: A reward of a row that is experience is not finite.
    """
    if isinstance(collector, Pool):
        parts = [(part, iteration, part.origin.worker) for part in collector.taken]
    else:
        first = iteration - len(learnt) + 1
        parts = [(rollout, first + i, 0) for i, (rollout, _) in enumerate(learnt)]
    for rollout, number, actor in parts:
        rewards = np.asarray(rollout.rewards)
        bad = ~np.isfinite(rewards)
        if rollout.valid is not None:
            bad &= np.asarray(rollout.valid)
        if bad.any():
            t, n = np.argwhere(bad)[0].tolist()
            env = actor * rewards.shape[1] + n
            raise WorkerError(
                f"environment {env} gave the reward {rewards[t, n]} in step {t} of rollout "
                f"{number}: mend the environment, or set on_invalid_data to off",
                env_index=env,
            )


def first_not_finite(rollout: Rollout | Ends) -> str | None:
    """Where a rollout holds something that is not finite, in words; None if all of it is.

    Environments are numbered as they lie in it: those of several actors in the order of arrival.
    """
    steps, num_envs = rollout.rewards.shape
    names = ("observations", "final_observations", "rewards")
    for name, array in flatten_tree({n: getattr(rollout, n, None) for n in names}).items():
        if array.dtype.kind != "f":
            continue
        bad = ~np.isfinite(array)
        if isinstance(rollout, Rollout) and name.startswith("final_observations"):
            index = np.asarray(rollout.final_index)
            at = np.zeros((steps * num_envs + 1), bool)  # the last is where padding belongs
            at[index] = bad.reshape(len(index), -1).any(1)
            bad = at[:-1].reshape(steps, num_envs)
        if bad.any():
            t, n = np.argwhere(bad)[0, :2].tolist()
            return f"its {name} are not finite, first in step {t} of environment {n}"
    return None


def not_learning(rollout: Rollout | Ends, run: Path, skipped: int, lr: float) -> StarlingError:
    """What to raise after several updates in a row whose results were not finite.

    Args:
        rollout: The last one, which is written into the run's folder.
        run: The run's folder.
        skipped: Updates skipped in a row.
        lr: Learning rate at the start.
    """
    file = run / "debug" / "rollout.safetensors"
    try:
        file.parent.mkdir(exist_ok=True)
        write_arrays(file, flatten_tree(rollout))
        kept = f"the last rollout is in {file}"
    except (OSError, TypeError) as error:
        kept = f"the last rollout could not be written to {file} ({error})"
    where = first_not_finite(rollout)
    advice = (
        f"{where}: mend the environment"
        if where
        else f"its content is finite: lower lr (now {lr:g}), or normalise observations and rewards"
    )
    return StarlingError(
        f"the results of the last {skipped} updates were not finite, so that the policy has stayed "
        f"as it was before them, and is saved like that; {kept}, and {advice}"
    )
