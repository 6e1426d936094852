"""Curves of episode returns: runs read back from their folders, moving averages, bands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starling.errors import UserError

Statistic = Literal["mean", "iqm"]

_RESAMPLES = 2000
# What does not decide how a run learns: runs that differ in it only are the same but for chance.
_NOT_COMPARED = {
    *("algo", "env", "seed", "run_name", "log_dir", "preset", "versions"),
    *("device", "backend", "num_workers", "step_timeout"),
    *("on_env_error", "on_invalid_data", "max_restarts", "worker_max_rss"),
    *("tensorboard", "wandb_project", "log_interval", "save_interval", "keep_checkpoints"),
    *("eval_interval", "eval_episodes", "stop_return", "max_time", "exact_resume"),
}


class Run(NamedTuple):
    """What a plot needs of a run; K finished episodes, in the order in which they ended.

    Attributes:
        path: The run folder.
        config: The settings in ``config.json``.
        steps: Environment steps when each episode had ended, int64 ``[K]``.
        returns: Undiscounted episode returns, float64 ``[K]``.
    """

    path: Path
    config: Mapping[str, Any]
    steps: NDArray[np.int64]
    returns: NDArray[np.float64]

    @property
    def settings(self) -> dict[str, str]:
        """The settings that decide how it learns, as they are printed."""
        return {
            name: _text(value)
            for name, value in self.config.items()
            if name not in _NOT_COMPARED and not name.endswith("_version")
        }


def read_run(folder: Path | str) -> Run:
    """Read what a plot needs of a run; episodes whose return is not finite are left out.

    Raises:
        UserError: The folder is no run folder, or no episode has ended in it yet.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (FileNotFoundError, NotADirectoryError):
        what = "is no run folder: it has no config.json" if folder.is_dir() else "does not exist"
        within = len(list(folder.glob("*/config.json"))) if folder.is_dir() else 0
        way_out = f"give the runs in it, {folder}/*" if within else "give a folder that train made"
        raise UserError(f"{folder} {what}; {way_out}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}): restore it") from error
    steps, returns = _read_episodes(folder / "episodes.csv")
    if not steps.size:
        raise UserError(f"no episode has ended in {folder} yet: train it for longer")
    return Run(folder, config, steps, returns)


def _read_episodes(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # Without the header, and without the line that a run under way may be writing.
        lines = text[: text.rfind("\n") + 1].splitlines()[1:]
        if not lines:
            return np.zeros(0, np.int64), np.zeros(0)
        table = np.loadtxt(lines, delimiter=",", ndmin=2)
        steps, returns = table[:, 0].astype(np.int64), table[:, 1]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it") from error
    finite = np.isfinite(returns)
    return steps[finite], returns[finite]


def moving_average(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean of each value and the ``window - 1`` before it, fewer at the beginning."""
    window = min(window, values.size)
    first = np.cumsum(values[: window - 1]) / np.arange(1, window)
    return np.concatenate(
        [first, np.lib.stride_tricks.sliding_window_view(values, window).mean(-1)]
    )


def aggregate(values: NDArray[np.float64], statistic: Statistic) -> NDArray[np.float64]:
    """Return the mean, or the mean of the middle half, over the last axis."""
    if statistic == "iqm":
        cut = values.shape[-1] // 4
        values = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut]
    return values.mean(axis=-1)


def bootstrap_band(
    curves: NDArray[np.float64], statistic: Statistic = "mean"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the 95 % percentile bootstrap interval of a statistic over S curves.

    Whole curves are drawn with replacement, 2,000 times; the same ones each time it is called.

    Args:
        curves: ``[S, G]``.
        statistic: What is taken over the curves.

    Returns:
        Lower and upper end, ``[G]`` each.
    """
    count = len(curves)
    chosen = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    ends = [np.percentile(aggregate(column[chosen], statistic), [2.5, 97.5]) for column in curves.T]
    low, high = np.transpose(ends)
    return low, high


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "-".join(_text(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
