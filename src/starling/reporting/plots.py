"""Learning curves of runs, from the ``config.json`` and ``episodes.csv`` in their folders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from starling.errors import UserError
from starling.reporting.curves import (
    Run,
    Statistic,
    aggregate,
    bootstrap_band,
    moving_average,
    read_run,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STATISTIC_NAMES = {"mean": "mean", "iqm": "interquartile mean"}
_GRID_POINTS = 300
_MOST_DOTS = 20_000  # more of them are a solid block, in a large file
# Okabe and Ito's colours, told apart with every kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#666666",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
}


def plot_runs(
    runs: Sequence[Path | str],
    save_fig: Path | str | None = None,
    show: bool = False,
    window: int | None = None,
    statistic: Statistic = "mean",
) -> Path:
    """Draw the learning curves of runs: one panel per environment, one curve per setting.

    A single run is drawn as its raw episodes and a moving average over them. Runs that differ in
    nothing but the seed become one curve with a 95 % bootstrap band.

    Args:
        runs: Run folders.
        save_fig: Image to write; by its ending PNG, PDF, SVG or whatever else Matplotlib writes.
            None: ``plots/learning_curve.png`` in the run folder, or ``learning_curves.png`` beside
            the first run where there are several.
        show: Whether to open a window too, and wait until it is closed.
        window: Episodes that the moving average reaches back. None: a twentieth of the episodes
            of the panel's shortest run, but 5 to 100.
        statistic: What several seeds are made into, their mean or their interquartile mean.

    Returns:
        Path of the image.

    Raises:
        UserError: A run folder that is none or has no episodes yet, or a file that cannot be
            written.
    """
    if not runs:
        raise UserError("there is nothing to plot: give at least one run folder")
    if window is not None and window < 1:
        raise UserError(f"window must be at least 1 episode, not {window}")
    if statistic not in _STATISTIC_NAMES:
        raise UserError(f"unknown statistic {statistic!r}: use mean or iqm")
    folders = list(dict.fromkeys(Path(run) for run in runs))
    loaded = [read_run(folder) for folder in folders]
    path = _target(folders, save_fig)
    figure = _draw(loaded, window, statistic, show)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): choose another file"
        ) from error
    if show:
        _show(figure, path)
    return path


def _target(folders: list[Path], save_fig: Path | str | None) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if save_fig is None:
        if len(folders) == 1:
            return folders[0] / "plots" / "learning_curve.png"
        return folders[0].parent / "learning_curves.png"
    path = Path(save_fig)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file name, such as {path / 'curve.png'}")
    kinds = FigureCanvasAgg.get_supported_filetypes()
    ending = path.suffix.lower().removeprefix(".")
    if ending not in kinds:
        raise UserError(f"{path} has no ending of an image: use one of {', '.join(sorted(kinds))}")
    return path


def _draw(runs: list[Run], window: int | None, statistic: Statistic, show: bool) -> Figure:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        names = list(dict.fromkeys(str(run.config.get("env", "")) for run in runs))
        columns = 1 if len(names) == 1 else 2 if len(names) in (2, 4) else 3
        rows = -(-len(names) // columns)
        size = (7.5, 4.6) if len(names) == 1 else (4.6 * columns, 3.6 * rows)
        if show:
            from matplotlib import pyplot

            figure = pyplot.figure(figsize=size, layout="constrained")
        else:
            from matplotlib.figure import Figure

            figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        colors: dict[str, str] = {}
        cycle = itertools.cycle(_COLORS)
        for name, panel in itertools.zip_longest(names, panels.flat):
            if name is None:
                panel.set_visible(False)
                continue
            members = [run for run in runs if str(run.config.get("env", "")) == name]
            groups = _groups(members)
            for label in groups:
                colors[label] = colors.get(label) or next(cycle)
            reach = window or max(5, min(100, min(run.steps.size for run in members) // 20))
            _draw_panel(panel, groups, colors, reach, statistic)
            panel.set_xlim(0, 1.02 * max(run.steps[-1] for run in members))
            panel.set_title(name, loc="left", fontweight="bold")
        _draw_box(panels[0, -1], runs)
    return figure


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Put the runs of one environment that differ only by chance together, under a name."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = (str(run.config.get("algo", "")), str(sorted(run.settings.items())))
        groups.setdefault(key, []).append(run)
    named: dict[str, list[Run]] = {}
    for (algo, _), members in groups.items():
        rivals = [others[0].settings for (name, _), others in groups.items() if name == algo]
        own = members[0].settings
        differ = [name for name in own if len({rival.get(name) for rival in rivals}) > 1]
        label = ", ".join([algo, *(f"{name} {own[name]}" for name in differ[:4])])
        named[label if label not in named else f"{label}, {members[0].path.name}"] = members
    return named


def _draw_panel(
    panel: Axes,
    groups: dict[str, list[Run]],
    colors: dict[str, str],
    window: int,
    statistic: Statistic,
) -> None:
    from matplotlib.ticker import EngFormatter
    from matplotlib.transforms import ScaledTranslation

    over = f"over {window} episode{'s' * (window > 1)}"
    alone = len(groups) == 1
    for label, members in groups.items():
        color = colors[label]
        if len(members) == 1:
            name = f"moving average {over}" if alone else label
            _draw_run(panel, members[0], color, window, name, alone)
        else:
            distinct = len({str(run.config.get("seed")) for run in members}) == len(members)
            what = "seeds" if distinct else "runs"
            seeds = f"{_STATISTIC_NAMES[statistic]} of {len(members)} {what}"
            name = (
                f"{seeds}, each a moving average {over}"
                if alone
                else f"{label}: {seeds}, 95 % band"
            )
            _draw_seeds(panel, members, color, window, statistic, name, alone)
    panel.set_xlabel("environment steps")
    panel.set_ylabel("episode return")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    below = ScaledTranslation(0, -0.55, panel.figure.dpi_scale_trans)  # inches, under the label
    panel.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=panel.transAxes + below,
        borderaxespad=0.0,
        alignment="left",
        title=None if alone else f"moving averages {over}",
        title_fontsize=9,
    )


def _draw_run(panel: Axes, run: Run, color: str, window: int, name: str, alone: bool) -> None:
    thin = slice(None, None, -(-run.steps.size // _MOST_DOTS))
    alpha = float(np.clip(8 / np.sqrt(run.steps[thin].size), 0.06, 0.5))
    panel.plot(
        run.steps[thin],
        run.returns[thin],
        ".",
        color=color,
        alpha=alpha,
        markersize=4,
        markeredgewidth=0,
        rasterized=True,
        label="episode" if alone else None,
    )
    panel.plot(run.steps, moving_average(run.returns, window), color=color, lw=1.8, label=name)


def _draw_seeds(
    panel: Axes,
    members: list[Run],
    color: str,
    window: int,
    statistic: Statistic,
    name: str,
    alone: bool,
) -> None:
    first = max(run.steps[0] for run in members)
    last = min(run.steps[-1] for run in members)
    if first > last:
        names = ", ".join(run.path.name for run in members)
        raise UserError(f"no steps are common to the runs {names}: plot the short ones apart")
    grid = np.linspace(first, last, _GRID_POINTS)
    curves = np.empty((len(members), grid.size))
    for row, run in zip(curves, members, strict=True):
        latest = np.searchsorted(run.steps, grid, side="right") - 1
        row[:] = moving_average(run.returns, window)[latest]
    if alone:
        for i, row in enumerate(curves):
            each = "each seed" if i == 0 else None
            panel.plot(grid, row, color=color, lw=0.7, alpha=0.35, label=each)
    low, high = bootstrap_band(curves, statistic)
    band = "95 % bootstrap band" if alone else None
    panel.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0, label=band)
    panel.plot(grid, aggregate(curves.T, statistic), color=color, lw=1.8, label=name)


def _draw_box(panel: Axes, runs: list[Run]) -> None:
    """Write the settings that all runs share to the right of a panel."""
    every = [run.settings for run in runs]
    shared = {
        name: value
        for name, value in every[0].items()
        if all(settings.get(name) == value for settings in every)
        and value not in ("none", "no", "{}")
    }
    algos = {str(run.config.get("algo", "")) for run in runs}
    if len(algos) == 1:
        shared = {"algo": algos.pop(), **shared}
    if shared:
        width = max(map(len, shared))
        lines = [f"{name:<{width}}  {value}" for name, value in shared.items()]
        panel.text(
            1.04,
            1.0,
            "\n".join(lines),
            transform=panel.transAxes,
            va="top",
            fontsize=7,
            family="monospace",
            linespacing=1.5,
            color="#333333",
            bbox={"boxstyle": "round,pad=0.6", "facecolor": "#f7f7f7", "edgecolor": "#cccccc"},
        )


def _show(figure: Figure, path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    try:
        if matplotlib.get_backend().lower() == "agg":
            raise UserError(f"no window can be opened here: the plot is in {path}")
        pyplot.show()
    finally:
        pyplot.close(figure)  # pyright: ignore[reportArgumentType]
