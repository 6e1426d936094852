"""How many workers to have."""

from __future__ import annotations

import os
from pathlib import Path

from starling.errors import UserError

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, or a container's share of them."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return cores


def choose_workers(
    num_envs: int, num_workers: int | None, batch_size: int | None, cores: int
) -> int:
    """Number of workers, each with the same number of environments if batches are partial.

    Raises:
        UserError: The three numbers do not go together; the message shows the arithmetic.
    """
    batch = num_envs if batch_size is None else batch_size
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}; at least one environment is needed")
    if not 1 <= batch <= num_envs:
        raise UserError(f"batch_size {batch} must lie between 1 and num_envs ({num_envs})")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}; at least one worker is needed")

    def fits(workers: int) -> bool:
        whole = num_envs % workers == 0
        return batch == num_envs or (whole and batch % (num_envs // workers) == 0)

    if num_workers is None:
        fewer = range(min(cores, num_envs), 0, -1)
        more = range(min(cores, num_envs) + 1, num_envs + 1)
        return next(workers for workers in (*fewer, *more) if fits(workers))
    workers = min(num_workers, num_envs)
    if not fits(workers):
        raise UserError(
            f"batch_size {batch} does not fit: {num_envs} environments in {workers} workers make "
            f"{num_envs / workers:g} environments per worker, and a batch is made of whole "
            f"workers; leave num_workers out, or take num_workers={num_envs}"
        )
    return workers
