"""Environments with one fault each, and the same without it."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
from envs_for_tests import Refusal
from faulty_envs import (
    CAMERA,
    F32,
    NAN,
    NESTED,
    PAIRS,
    SMALL,
    Plain,
    Walk,
    WithoutSpaces,
    at,
    box,
    check,
    counted,
    differing,
    drawn,
    empty,
    ending,
    fails,
    faults,
    global_seed,
    leaves,
    low,
    masked,
    nested,
    noisy,
    only_one,
    raising,
    reset_alone,
    reset_without_info,
    reused,
    scaled,
    seeded,
    step_of_four,
    step_of_three,
    step_of_three_later,
    stubborn,
    surviving,
    the_same,
    walk,
    with_lock,
    written,
)
from gymnasium import spaces

import starling
from starling.envs.checks import run_checks
from starling.envs.findings import Finding, Findings
from starling.errors import UserError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]

CANCELLED = asyncio.CancelledError

FAULTY = [
    ("error", "constructor-raises", r"no licence \(at .*:\d+\)", walk(__init__=fails)),
    ("error", "constructor-raises", "SystemExit: 3", walk(__init__=leaves)),
    ("error", "constructor-raises", "a second one .* the port is taken", only_one()),
    ("error", "interface", "no observation_space and no action_space", WithoutSpaces),
    ("error", "same-object", "same object", the_same()),
    ("error", "spaces-differ", r"different observation_space, .*\(1,\).*\(2,\)", differing()),
    ("warning", "not-picklable", "lock.*backend process cannot", with_lock()),
    ("error", "space-unsupported", "Text", walk(observation_space=spaces.Text(5))),
    ("error", "space-unsupported", "Graph", walk(action_space=spaces.Graph(SMALL, None))),
    ("error", "space-empty", "holds no number", walk(observation_space=spaces.Dict())),
    ("error", "space-bounds", "nan at position 1", walk(observation_space=box(1, 0, np.nan))),
    ("error", "space-bounds", "low 3.0 and high -3.0", walk(action_space=box(0, 3, -3))),
    ("warning", "action-unbounded", "bounds", walk(action_space=spaces.Box(-1, np.inf, (2,)))),
    ("note", "action-scale", "-500 to 500", scaled(500)),
    ("note", "action-scale", "-0.01 to 0.01", scaled(0.01)),
    (
        *("note", "observation-float64", "float32"),
        walk(observation_space=spaces.Box(-9e9, 9e9, (2,), np.float64), observe=lambda s: s.place),
    ),
    ("note", "old-interface", r"reset\(\) of .* \(observation, info\)", walk(reset=reset_alone)),
    ("note", "old-interface", r"step\(\) of an older", walk(step=step_of_four)),
    ("note", "old-interface", "Plain does not derive from gymnasium.Env", Plain),
    ("error", "reset-result", "a pair whose second .* NoneType", walk(reset=reset_without_info)),
    ("error", "reset-raises", "reset 1, seed 0: RuntimeError: no licence", walk(start=fails)),
    ("error", "step-raises", "step 1: RuntimeError: no licence", walk(moved=fails)),
    ("error", "step-raises", "step 1: SystemExit: 3", walk(moved=leaves)),
    ("error", "step-result", "step 1: .*3 values", walk(step=step_of_three)),
    ("error", "step-result", "step 3: .*3 values", walk(step=step_of_three_later)),
    ("error", "step-result", "step 1: .*NoneType", walk(step=lambda self, action: None)),
    ("warning", "close-raises", "no licence", walk(close=fails)),
    ("error", "constructor-raises", "making it: CancelledError", walk(__init__=raising(CANCELLED))),
    ("error", "reset-raises", "reset 1, seed 0: GeneratorExit", walk(start=raising(GeneratorExit))),
    ("error", "step-raises", "step 1: CancelledError", walk(moved=raising(CANCELLED))),
    ("warning", "close-raises", "close: CancelledError", walk(close=raising(CANCELLED))),
    ("error", "raises", "stepping it: CancelledError", stubborn()),
    # observations
    ("error", "observation-missing", "step 4: .*None", at(4, lambda s: None, "observe")),
    ("error", "observation-nesting", "reset 1: .*ndarray", walk(observation_space=NESTED)),
    ("error", "observation-nesting", "'camera'", empty()),
    ("error", "observation-shape", r"'camera': shape \(3, 2\) .*\(2, 3\) exp", nested(CAMERA.T)),
    ("warning", "observation-dtype", "'camera': float64 given, uint8", nested(CAMERA * 1.0)),
    ("error", "observation-value", "'camera'.*300.* uint8", nested(CAMERA * 1.0 + 300)),
    ("error", "observation-value", "e.(299|30[01])", walk(observe=lambda self: self.place * 1e300)),
    ("error", "observation-value", "a list given", at(2, lambda s: [[1], 2], "observe")),
    ("error", "observation-not-finite", "nan at position 1", at(4, lambda s: NAN, "observe")),
    ("error", "observation-not-finite", "inf", at(4, lambda s: NAN + F32(np.inf), "observe")),
    (
        *("error", "observation-not-finite", "2147483648 at position 1; .* 32 bits: scale it"),
        walk(
            observation_space=spaces.Box(-(2**40), 2**40, (2,), np.int64),
            observe=lambda s: np.int64([1000 * s.place[0], 2**31]),
        ),
    ),
    ("warning", "observation-bounds", "-7 at position 1", low()),
    ("error", "observation-bounds", r"8 is not in Discrete\(8\)", counted(1)),
    ("note", "observation-reused", "step 1", reused()),
    ("warning", "observation-constant", "30 steps", walk(observe=lambda self: np.zeros(2, F32))),
    # actions and masks
    ("warning", "action-written", "step 1: the action", walk(moved=written)),
    ("error", "mask-size", "2 values given, 3 expected", masked(np.ones(2, bool))),
    ("error", "mask-size", "1 values given", masked({"wrong": 1})),
    ("error", "mask-size", "cannot be used: setting an", masked([[1], [1, [1]]])),
    ("error", "mask-empty", "reset 1: .*none of 3 choices", masked(np.zeros(3, bool))),
    ("error", "mask-empty", "none of 3 choices", masked(np.array([1, 0, 0, 0, 0]), PAIRS)),
    ("note", "mask-ignored", "Discrete", masked([1, 1], Walk.action_space)),
    # rewards
    ("error", "reward-type", "step 1: the reward is None", walk(reward=lambda self: None)),
    ("error", "reward-type", "'1.0'", walk(reward=lambda self: "1.0")),
    ("error", "reward-type", r"shape \(1,\)", walk(reward=lambda self: np.ones(1))),
    ("error", "reward-type", r"shape \(2,\)", walk(reward=lambda self: self.place)),
    ("error", "reward-not-finite", "step 4: .*nan", at(4, lambda s: np.nan, "reward")),
    ("error", "reward-not-finite", "-inf", at(4, lambda s: -np.inf, "reward")),
    ("error", "reward-not-finite", "1e.39", at(4, lambda s: 1e39, "reward")),
    ("note", "reward-huge", "2e.07", at(4, lambda s: 2e7, "reward")),
    # ends
    ("warning", "terminated-type", "0, read as False", ending(lambda last: (int(last), False))),
    ("warning", "truncated-type", "None", ending(lambda last: (last, None))),
    ("error", "terminated-type", r"shape \(2,\)", ending(lambda last: (np.full(2, last), last))),
    ("note", "both-ends", "step 7", ending(lambda last: (last, last))),
    ("warning", "no-episode-end", "30 steps", ending(lambda last: (False, False))),
    ("warning", "one-step-episodes", "30 episodes", ending(lambda last: (True, False))),
    # infos
    ("error", "info-type", "a list", walk(info=lambda self: [1] if self.steps else {})),
    ("warning", "info-not-picklable", "'lock'", walk(info=lambda self: {"lock": threading.Lock()})),
    ("warning", "info-not-picklable", "missing 1", walk(info=lambda _: {"e": Refusal("a", "b")})),
    # seeds
    ("warning", "not-deterministic", r"first observation \(obs", walk(start=seeded(None))),
    ("warning", "not-deterministic", r"step 1 \(reward\)", walk(reward=noisy)),
    ("warning", "reset-incomplete", "first observation", surviving()),
    ("warning", "seed-ignored", "0, 1 and 2", walk(start=seeded(0))),
    ("warning", "global-random", "np.random", walk(start=drawn)),
    ("warning", "global-random", "process, random,", walk(reward=lambda self: random.random())),
    ("warning", "seeds-global-random", "np.random", walk(start=global_seed)),
]  # fmt: skip
SOUND = {
    "walk": Walk,
    "nested": nested(),
    "counted": counted(0),
    "mask": masked(np.array([0, 1, 1])),
    "mask in parts": masked([np.array([0, 1]), np.array([1, 1, 0])], PAIRS),
    "reward of 0 dimensions": walk(reward=lambda self: np.array(1.5, F32)),
    "reward a whole number": walk(reward=lambda self: 1),
    "reward true or false": walk(reward=lambda self: np.True_),
    "ends of NumPy": ending(lambda last: (np.bool_(last), np.array(False))),
    "limited": lambda: gym.wrappers.TimeLimit(ending(lambda last: (False, False))(), 50),
    "lists": walk(action_space=spaces.Discrete(2), moved=lambda self, action: int(action)),
}
# what else a fault leads to
FOLLOWING = {"reset-result": ["old-interface"], "spaces-differ": ["not-deterministic"]}


@pytest.mark.parametrize(
    ("level", "name", "words", "env"), FAULTY, ids=[f"{row[1]}-{i}" for i, row in enumerate(FAULTY)]
)
def test_every_fault_is_found(level, name, words, env):
    found = faults(env)
    assert [(finding.level, finding.name) for finding in found[:1]] == [(level, name)]
    assert re.search(words, found[0].message), found[0].message
    assert [finding.name for finding in found[1:]] == FOLLOWING.get(name, [])


@pytest.mark.parametrize("name", SOUND)
def test_sound_environments_have_none(name):
    assert faults(SOUND[name]) == []


@pytest.mark.parametrize(
    "env",
    ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "Acrobot-v1", "MountainCarContinuous-v0"],
)
def test_gymnasiums_own_have_none(env):
    assert faults(env, steps=200) == []


def test_findings_of_one_kind_are_counted():
    (finding,) = faults(nested(CAMERA * 1.0))
    assert finding.count == 30 + 5  # steps and resets
    assert finding.message.startswith("reset 1: observation 'camera': float64")
    assert str(finding).startswith("warning  observation-dtype      reset 1: ")
    assert str(finding).endswith("(35 times)")
    assert finding.about == "camera"


def test_kinds_are_told_apart_by_level_and_key():
    told: list[Finding] = []
    findings = Findings(told.append)
    rows = [("note", "a", ""), ("error", "a", ""), ("error", "a", "key"), ("error", "a", "key")]
    findings.add(*(Finding(level, name, "", about) for level, name, about in rows))
    assert [(f.level, f.about, f.count) for f in findings.sorted()] == [
        *[("error", "", 1), ("error", "key", 2), ("note", "", 1)]
    ]
    assert len(told) == 3


def test_other_checks_go_on_after_an_exception():
    env = walk(moved=fails, close=fails, start=seeded(0), observe=lambda self: self.place)
    names = {finding.name for finding in faults(env)}
    assert names == {"step-raises", "close-raises", "observation-dtype"}


def test_an_interrupt_is_the_users_where_ctrl_c_reaches():
    env = walk(moved=raising(KeyboardInterrupt), close=raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        check(env)
    found = run_checks(env, steps=30, interruptible=False).findings
    assert [finding.name for finding in found] == ["step-raises", "close-raises"]
    assert found[0].message.startswith("step 1: KeyboardInterrupt (at ")


def test_the_last_finding_is_the_speed():
    speed = check(Walk)[-1]
    assert (speed.level, speed.name) == ("note", "speed")
    assert "a step mostly computes" in speed.message
    assert "make_vec takes backend serial" in speed.message or "process" in speed.message


def test_waiting_is_told_from_computing():
    def waits(self: Walk) -> float:
        time.sleep(0.002)
        return 1.0

    assert "a step mostly waits, so threads help" in check(walk(reward=waits), steps=5)[-1].message


def test_steps_and_seconds_limit_a_check():
    assert run_checks(Walk, steps=15).steps == 15
    assert run_checks(Walk, steps=15).episodes == 2
    assert 0 < run_checks(Walk, steps=10**9, seconds=0.05).steps < 10**9


def test_ends_that_did_not_come_in_little_time_are_a_note():
    found = faults(ending(lambda last: (False, False)), steps=10**9, seconds=0.05)
    assert [(finding.level, finding.name) for finding in found] == [("note", "no-episode-end")]


def test_arguments_reach_the_environment():
    env = walk(__init__=lambda self, size: setattr(self, "size", size), reward=lambda s: s.size)
    assert [f.name for f in faults(env, env_kwargs={"size": np.nan})] == ["reward-not-finite"]
    assert faults(env, env_kwargs={"size": 1.0}) == []
    with pytest.raises(UserError, match="takes no argument 'sise'"):
        check(env, env_kwargs={"sise": 1.0})


def test_an_environment_that_exists_is_copied():
    env = Walk()
    assert faults(env) == []
    assert not hasattr(env, "place")


@pytest.mark.parametrize(
    ("env", "settings", "words"),
    [
        ("CartPol-v1", {}, "did you mean CartPole-v1"),
        ("gymnax:Nothing", {}, "gymnax"),
        (Walk, {"steps": 0}, "steps must be at least 1"),
        (Walk, {"seconds": 0}, "seconds must be above 0"),
        (Walk, {"seed": -1}, "seed must be at least 0"),
    ],
)
def test_input_that_cannot_be_used(env, settings, words):
    with pytest.raises(UserError, match=words):
        starling.check_env(env, **settings)


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "torn_module.py").write_text("x = 1\nx.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = check("torn_module:Env")
    assert (finding.level, finding.name) == ("error", "import-raises")
    assert "torn_module.py:2)" in finding.message
