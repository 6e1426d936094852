"""The formulae of docs/scaling.md: what is fitted is found again, and limits are where they are."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("scaling_model")


@pytest.fixture
def costs(model):
    return model.Costs(1e-3, 2e-3, 5e-3, put=1e9, join=2e9)


@pytest.fixture
def case(model):
    return model.Case(256, False, 1e-3, 100, 40_000, 4e-3, 1e-5)


def test_a_fit_finds_what_runs_were_made_of(model, costs, case):
    free = case._replace(row=0, parameters=0)
    runs = []
    for workers in (1, 2, 3, 4):
        rows = model.rows_in_all(free, workers)
        update = free.update + free.update_row * rows
        runs.append(
            {
                "workers": workers,
                "rows": rows,
                "update": update,
                "busy": model.learning(costs, free, workers) - update,
                "collect": model.collecting(free, workers),
                "waited": model.collecting(free, workers) + costs.answer,
                "rollout_bytes": 0,
                "parameter_bytes": 0,
            }
        )
    assert model.fit_costs(runs, {"put": 1e9, "join": 2e9}) == pytest.approx(costs)
    assert model.fit_case(runs) == pytest.approx(free)


def test_lines_fall_nowhere_below_zero(model):
    assert model.line([(1, 3.0), (2, 1.0)]) == (2.0, 0.0)
    assert model.line([(1, 1.0), (2, 4.0)]) == (0.0, pytest.approx(1.8))


@pytest.mark.parametrize("shared", [False, True])
def test_more_workers_help_until_the_learner_is_busy(model, costs, case, shared):
    case = case._replace(shared=shared, rows=20_000 if shared else 256)

    def busy(workers):
        return model.learning(costs, case, workers)

    most = model.enough(busy, case)
    assert most > 4
    for workers, limit in ((most - 1, model.collecting(case, most - 1)), (most, busy(most))):
        assert model.iteration(costs, case, workers, "non_blocking") == pytest.approx(limit)
    assert model.iteration(costs, case, most, "blocking") > 2 * busy(most)
    assert model.enough(lambda workers: 0.0, case) is None


def test_rollouts_of_all_and_parameters_for_each_node_go_over_the_link(model, costs, case):
    assert model.moving(case, 1) == (25_600, 40_000)
    assert model.moving(case, 16) == (16 * 25_600, 40_000)
    assert model.moving(case, 17) == (17 * 25_600, 80_000)
    narrow = costs._replace(link=1000.0)
    assert model.iteration(narrow, case, 17, "non_blocking") == pytest.approx(435.2)
    without = costs._replace(link=math.inf)
    assert model.iteration(narrow, case, 17, "blocking") == pytest.approx(
        model.iteration(without, case, 17, "blocking") + 435.2 + 80
    )
