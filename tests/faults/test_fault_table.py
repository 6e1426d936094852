"""The table of faults in the documentation: Starling's cells, and that bad ones would be seen."""

from __future__ import annotations

import importlib
import json
import math
import mmap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FAULTS = [
    *("raise in step", "exit", "kill", "hang", "late"),
    *("NaN observation", "killed parent", "Ctrl-C"),
]
# What Starling does about these the other files here say, too.
MORE_FAULTS = [
    *("raise in reset", "raise in constructor"),
    *("infinite reward", "too large", "wrong shape", "float64", "reused array"),
]

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(autouse=True)
def programs_of_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def faults():
    return importlib.import_module("faults")


@pytest.mark.parametrize(
    "name", [*FAULTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAULTS)]
)
def test_a_fault_ends_well(faults, name, monkeypatch):
    monkeypatch.setattr(faults, "NOTICED_WITHIN", math.inf)  # a quiet machine is to judge of that,
    for stage in ("step", "close", "end"):  # and of how long closing takes
        monkeypatch.setitem(faults.LIMITS, stage, 30)
    monkeypatch.setattr(faults.leftovers, "LEFT_AFTER", 15)  # and of how long ending takes
    column = faults.COLUMNS["starling"]
    outcome = faults.run_case(column, name)
    assert faults.judge(column, name, outcome)[0] == "good", outcome


@pytest.mark.parametrize("name", ["raise in step", "kill", "late"])
def test_stepping_goes_on_where_environments_are_restarted(faults, name):
    column = faults.COLUMNS["restart"]
    outcome = faults.run_case(column, name)
    verdict, reasons = faults.judge(column, name, outcome)
    assert verdict == "good", outcome
    assert reasons.startswith("goes on with right data")


def test_a_hanging_case_is_ended_and_judged_bad(faults, monkeypatch):
    monkeypatch.setitem(faults.LIMITS, "step", 0.5)  # sooner than Starling's own limit
    column = faults.COLUMNS["starling"]
    outcome = faults.run_case(column, "hang")
    assert outcome["left"] == 0
    assert faults.judge(column, "hang", outcome) == ("bad", "hangs in step")


NOTICED = {"stage": "end", "error": "ValueError", "seconds": 0.04, "closed": True, "hung": ""}
NOTICED |= {"environment": "message", "cause": "log", "left": 0, "shared": 0, "tracebacks": 1}


@pytest.mark.parametrize(
    ("name", "change", "verdict", "reasons"),
    [
        ("kill", {}, "good", "message names environment, log names cause; `close()` works"),
        ("kill", {"environment": ""}, "poor", "log names cause, no word of environment"),
        ("kill", {"hung": "close", "closed": False}, "bad", "`close()` hangs"),
        ("kill", {"close_error": "EOFError", "closed": False}, "bad", "`close()` raises EOFError"),
        ("kill", {"left": 2}, "bad", "processes left: 2"),
        ("kill", {"shared": 1}, "bad", "files in /dev/shm left: 1"),
        ("kill", {"stage": "step"}, "bad", "the parent died"),
        ("kill", {"hung": "end"}, "bad", "the parent does not end"),
        ("late", {"later": "reward of step 3"}, "bad", "then reward of step 3"),
        ("Ctrl-C", {}, "poor", "tracebacks printed: 1"),
        ("Ctrl-C", {"seconds": 1.1, "tracebacks": 0}, "poor", "ValueError after 1.1 s, late"),
        ("kill", {"seconds": 1.0}, "good", "ValueError after 1.0 s, message names environment"),
        ("kill", {"seconds": 1.1}, "poor", "ValueError after 1.1 s, late, message names"),
        ("late", {"seconds": 1.25}, "good", "ValueError after 1.2 s, message names"),
        ("late", {"seconds": 1.4}, "poor", "ValueError after 1.4 s, late"),
        ("killed parent", {"left": 1}, "bad", "processes left: 1"),
        ("NaN observation", {"error": "", "flaw": "NaN"}, "bad", "unnoticed: NaN"),
        ("kill", {"error": ""}, "good", "goes on with right data, message names environment"),
        ("kill", {"error": "", "cause": ""}, "poor", "no word of cause"),
        ("kill", {"error": "", "later": "reward of step 3"}, "bad", "then reward of step 3"),
    ],
)
def test_what_is_wrong_is_judged_so(faults, name, change, verdict, reasons):
    found = faults.judge(faults.COLUMNS["gymnasium"], name, NOTICED | change)
    assert found[0] == verdict
    assert reasons in found[1]


@pytest.mark.parametrize(
    ("observation", "reward", "found"),
    [
        (np.array([1.0, 3.0], np.float32), 3.0, ""),
        (np.array([1.0, 3.0]), 3.0, "the whole batch is float64"),
        (np.array([1.0, np.nan], np.float32), 3.0, "NaN as observation"),
        (np.array([1.0, 3.0], np.float32), np.inf, "inf as reward"),
        (
            np.array([1.0, 4.0], np.float32),
            3.0,
            "observation of step 4, reward of step 3 in step 3",
        ),
        (
            np.array([1.0, 2.0], np.float32),
            2.0,
            "observation of step 2, reward of step 2 in step 3",
        ),
    ],
)
def test_wrong_data_is_seen(observation, reward, found):
    flaw = importlib.import_module("fault_case").flaw
    assert flaw(observation[None], np.array([reward]), {0: 3}) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["full disk, training", "full disk, same place", "crafted", "halves"]
)
def test_checkpoints_fare_well(name):
    checkpoints = importlib.import_module("checkpoint_faults")
    outcome = checkpoints.run_case("starling", name)
    assert checkpoints.judge(name, outcome)[0] == "good", outcome


def test_shared_memory_that_is_in_use_is_not_that_of_a_case(tmp_path, monkeypatch):
    """Other programs on the machine have files there as well."""
    leftovers = importlib.import_module("leftovers")
    monkeypatch.setattr(leftovers, "SHARED", tmp_path)
    monkeypatch.setattr(leftovers, "LEFT_AFTER", 0.1)
    (tmp_path / "old").touch()
    before = leftovers.shared()
    with (tmp_path / "open").open("w"), (tmp_path / "mapped").open("w+b") as file:
        file.write(b"x")
        file.flush()
        with mmap.mmap(file.fileno(), 1):
            file.close()
            assert leftovers.forgotten(before) == 0
    assert leftovers.forgotten(before) == 2


FULL = {"error": "OSError: no space", "steps": 512, "first": "", "newest": ""}


@pytest.mark.parametrize(
    ("name", "outcome", "verdict"),
    [
        ("full disk, training", {**FULL, "error": ""}, "good"),
        ("full disk, training", FULL, "poor"),
        ("full disk, training", {**FULL, "error": "", "newest": "torn"}, "poor"),
        ("full disk, training", {**FULL, "first": "torn"}, "bad"),
        ("full disk, same place", FULL, "good"),
        ("full disk, same place", {**FULL, "first": "torn"}, "bad"),
        ("crafted", {"error": "CheckpointError: no", "ran": False, "files": 4}, "good"),
        ("crafted", {"error": "", "ran": False, "files": 4}, "poor"),
        ("crafted", {"error": "CheckpointError: no", "ran": True, "files": 4}, "bad"),
        ("halves", {"difference": 0.0, "by_default": 0.1}, "good"),
        ("halves", {"difference": 1e-9}, "poor"),
    ],
)
def test_what_comes_of_checkpoints_is_judged_so(name, outcome, verdict):
    assert importlib.import_module("checkpoint_faults").judge(name, outcome)[0] == verdict


def test_the_page_is_that_of_the_measurements(faults):
    stored = json.loads((ROOT / "docs" / "faults_compared.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "faults_compared.md").read_text(encoding="utf-8")
    assert page == faults.page(stored)
    assert set(stored["outcomes"]["starling"]) == set(faults.FAULTS) == {*FAULTS, *MORE_FAULTS}
    cases = set(importlib.import_module("checkpoint_faults").TITLES)
    assert all(set(found) == cases for found in stored["checkpoints"]["outcomes"].values())


def test_the_page_of_storms_is_that_of_the_measurements():
    stored = json.loads((ROOT / "docs" / "storms.json").read_text(encoding="utf-8"))
    storms = importlib.import_module("storms")
    assert (ROOT / "docs" / "storms.md").read_text(encoding="utf-8") == storms.page(stored)
    assert {line["name"] for line in stored["lines"]} == set(storms.ROWS)
