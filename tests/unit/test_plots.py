"""Learning curves: the numbers in them against simple oracles, and how bad input is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from matplotlib.collections import FillBetweenPolyCollection

from starling.errors import UserError
from starling.reporting import plots
from starling.reporting.curves import aggregate, bootstrap_band, moving_average, read_run
from starling.reporting.plots import plot_runs

SETTINGS = {
    "algo": "ppo",
    "env": "CartPole-v1",
    "env_kwargs": {},
    "seed": 0,
    "log_dir": "./logs",
    "lr": 0.0003,
    "hidden_sizes": [64, 64],
    "target_kl": None,
    "normalize_rewards": True,
    "num_steps": 2048,
    "versions": {"jax": "0.10.2"},
}


def make_run(folder, returns, steps=None, **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    steps = np.arange(1, len(returns) + 1) * 10 if steps is None else steps
    rows = [f"{step},{ret},10\n" for step, ret in zip(steps, returns, strict=True)]
    (folder / "episodes.csv").write_text("".join(["step,return,length\n", *rows]))
    return folder


def panels(*folders, window=3, statistic="mean"):
    figure = plots._draw([read_run(folder) for folder in folders], window, statistic, show=False)
    return [panel for panel in figure.axes if panel.get_visible()]


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(1, 40))
def test_moving_average_looks_back_only(values, window):
    expected = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(moving_average(np.array(values), window), expected, atol=1e-6)


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    values = np.array([100.0, 1.0, 3.0, -50.0, 2.0, 4.0, 1000.0, -999.0])
    assert aggregate(values, "iqm") == np.mean([1, 2, 3, 4])
    assert aggregate(values[:3], "iqm") == aggregate(values[:3], "mean") == values[:3].mean()


def test_bootstrap_band_is_that_of_the_standard_error():
    """For many normal curves the band is known: the mean plus and minus 1.96 s / sqrt(S)."""
    curves = np.random.default_rng(1).normal([5.0, 50.0], [1.0, 10.0], size=(400, 2))
    low, high = bootstrap_band(curves)
    half = 1.96 * curves.std(axis=0) / np.sqrt(400)
    np.testing.assert_allclose(low, curves.mean(axis=0) - half, atol=0.15 * half.max())
    np.testing.assert_allclose((high - low) / 2, half, rtol=0.1)
    again = bootstrap_band(curves)
    np.testing.assert_array_equal((low, high), again)  # the same picture every time
    flat = bootstrap_band(np.full((3, 2), 7.0), "iqm")
    np.testing.assert_array_equal(flat, np.full((2, 2), 7.0))


def test_one_run_shows_its_episodes_and_a_moving_average(tmp_path):
    returns = [1.0, 2.0, 6.0, 4.0, 5.0]
    (panel,) = panels(make_run(tmp_path / "run", returns))
    raw, average = panel.lines
    np.testing.assert_array_equal(raw.get_xydata(), np.c_[np.arange(10, 51, 10), returns])
    np.testing.assert_allclose(average.get_ydata(), [1, 1.5, 3, 4, 5])
    assert raw.get_alpha() < 0.6
    assert raw.get_linestyle() == "None"
    assert labels(panel) == ["episode", "moving average over 3 episodes"]
    assert panel.get_xlabel() == "environment steps"
    assert panel.get_ylabel() == "episode return"
    assert panel.get_title("left") == "CartPole-v1"


def test_the_box_has_what_decides_how_it_learns(tmp_path):
    (panel,) = panels(make_run(tmp_path / "run", [1.0]))
    (box,) = panel.texts
    assert [line.split() for line in box.get_text().splitlines()] == [
        ["algo", "ppo"],
        ["lr", "0.0003"],
        ["hidden_sizes", "64-64"],
        ["normalize_rewards", "yes"],
        ["num_steps", "2,048"],
    ]


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_seeds_become_one_curve_with_a_band(tmp_path, statistic):
    rng = np.random.default_rng(0)
    runs, curves = [], []
    for seed in range(4):
        steps = np.sort(rng.integers(1, 1000, 60))
        returns = rng.normal(size=60).cumsum()
        runs.append(make_run(tmp_path / f"s{seed}", returns, steps, seed=seed, device=f"cpu{seed}"))
        curves.append((steps, moving_average(returns, 3)))
    (panel,) = panels(*runs, statistic=statistic)
    *each, middle = panel.lines
    grid = middle.get_xdata()
    assert grid[0] == max(steps[0] for steps, _ in curves)
    assert grid[-1] == min(steps[-1] for steps, _ in curves)
    at_grid = np.array(  # the naive oracle: the last episode that had ended by then
        [
            [[y for x, y in zip(*curve, strict=True) if x <= at][-1] for at in grid]
            for curve in curves
        ]
    )
    np.testing.assert_allclose([line.get_ydata() for line in each], at_grid)
    cut = slice(1, -1) if statistic == "iqm" else slice(None)
    np.testing.assert_allclose(middle.get_ydata(), np.sort(at_grid, axis=0)[cut].mean(axis=0))
    (band,) = [c for c in panel.collections if isinstance(c, FillBetweenPolyCollection)]
    box = band.get_datalim(panel.transData)
    assert box.ymin < middle.get_ydata().min()
    assert box.ymax > middle.get_ydata().max()
    word = {"mean": "mean", "iqm": "interquartile mean"}[statistic]
    assert labels(panel) == [
        "each seed",
        "95 % bootstrap band",
        f"{word} of 4 seeds, each a moving average over 3 episodes",
    ]


def test_settings_and_algorithms_are_told_apart_and_environments_have_panels(tmp_path):
    runs = [
        make_run(tmp_path / "a", [1.0, 2.0], seed=0),
        make_run(tmp_path / "b", [1.0, 2.0], seed=1),
        make_run(tmp_path / "c", [1.0, 2.0], lr=0.001),
        make_run(tmp_path / "d", [1.0, 2.0], algo="a2c", lr=0.002),
        make_run(tmp_path / "e", [1.0, 2.0], env="Acrobot-v1", algo="a2c", lr=0.002),
    ]
    cartpole, acrobot = panels(*runs)
    assert labels(cartpole) == [
        "ppo, lr 0.0003: mean of 2 seeds, 95 % band",
        "ppo, lr 0.001",
        "a2c",
    ]
    lines = [line for line in cartpole.lines if line.get_linestyle() != "None"]
    assert len({line.get_color() for line in lines}) == 3
    assert acrobot.get_title("left") == "Acrobot-v1"
    assert acrobot.lines[-1].get_color() == lines[-1].get_color()  # a2c in both
    assert not list(cartpole.texts)
    (box,) = acrobot.texts
    assert "lr " not in box.get_text()
    assert "algo" not in box.get_text()
    assert "num_steps" in box.get_text()


def test_the_same_seed_twice_is_two_runs_and_the_same_folder_is_one(tmp_path):
    a, b = (make_run(tmp_path / name, [1.0, 2.0]) for name in "ab")
    (panel,) = panels(a, b)
    assert labels(panel)[-1].startswith("mean of 2 runs")
    assert plot_runs([a, a]) == a / "plots" / "learning_curve.png"
    assert plot_runs([a, b]) == tmp_path / "learning_curves.png"


def test_images_are_written_and_not_blank(tmp_path):
    run = make_run(tmp_path / "run", np.arange(200.0), run_name="$5_of^6")
    for name in ("new/curve.png", "curve.svg", "curve.pdf"):
        path = plot_runs([str(run)], save_fig=tmp_path / name)
        assert path == tmp_path / name
        assert path.stat().st_size > 5000
    pixels = image.imread(tmp_path / "new" / "curve.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 900
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_what_a_running_run_is_writing_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", [1.0, float("nan"), 3.0])
    with (run / "episodes.csv").open("a") as file:
        file.write("40,9")
    read = read_run(run)
    np.testing.assert_array_equal(read.steps, [10, 30])
    np.testing.assert_array_equal(read.returns, [1, 3])


def test_bad_input_is_one_sentence(tmp_path):
    run = make_run(tmp_path / "logs" / "run", [1.0])
    empty = make_run(tmp_path / "empty", [])
    fresh = make_run(tmp_path / "fresh", [])
    (fresh / "episodes.csv").unlink()
    broken = make_run(tmp_path / "broken", [1.0])
    (broken / "config.json").write_text("{")
    garbled = make_run(tmp_path / "garbled", [1.0])
    (garbled / "episodes.csv").write_text("step,return,length\n1,two,3\n")
    late = make_run(tmp_path / "late", [1.0], [500], seed=1)
    (tmp_path / "nothing").mkdir()
    for runs, options, message in [
        ([], {}, "at least one run folder"),
        ([tmp_path / "gone"], {}, "gone does not exist"),
        ([run / "config.json"], {}, "does not exist"),
        ([tmp_path / "nothing"], {}, "is no run folder: it has no config.json"),
        ([tmp_path / "logs"], {}, r"give the runs in it, .*logs/\*"),
        ([empty], {}, "no episode has ended in .*empty yet"),
        ([fresh], {}, "no episode has ended"),
        ([broken], {}, r"config\.json cannot be read"),
        ([garbled], {}, r"episodes\.csv cannot be read"),
        ([run, late], {}, "no steps are common to the runs run, late"),
        ([run], {"window": 0}, "window must be at least 1"),
        ([run], {"statistic": "median"}, "use mean or iqm"),
        ([run], {"save_fig": tmp_path}, "is a folder"),
        ([run], {"save_fig": tmp_path / "curve.docx"}, "use one of .*pdf.*png"),
        ([run], {"save_fig": tmp_path / "curve"}, "has no ending of an image"),
        ([run], {"save_fig": run / "config.json" / "a.png"}, "cannot be written"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            plot_runs(runs, **options)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.png"))


def test_a_window_that_cannot_be_opened_still_leaves_the_image(tmp_path, monkeypatch):
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    run = make_run(tmp_path / "run", [1.0, 2.0])
    with pytest.raises(UserError, match="no window can be opened here: the plot is in"):
        plot_runs([run], show=True)
    assert (run / "plots" / "learning_curve.png").exists()
    assert pyplot.get_fignums() == []


IMPORTS = """
import importlib, sys
for name in ("metrics", "episodes", "writers", "progress", "curves", "plots", "video"):
    importlib.import_module("starling.reporting." + name)
heavy = {"jax", "gymnasium", "matplotlib", "rich", "tensorboardX", "wandb", "imageio"}
print(sorted(heavy & set(sys.modules)))
from starling.reporting.plots import plot_runs
plot_runs(sys.argv[1:])
print("matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.timeout(60)
def test_nothing_heavy_is_imported_early_and_no_window_toolkit_at_all(tmp_path):
    run = make_run(tmp_path / "run", [1.0, 2.0])
    command = [sys.executable, "-c", IMPORTS, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False"]
