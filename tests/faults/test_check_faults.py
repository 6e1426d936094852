"""`starling check` outlives whatever an environment does to its process."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from commands import starling, wait_for
from leaks import ends_within

from starling.cli import main

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_leaks")]

ENVIRONMENTS = """
import ctypes
import os
import re
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np


class Env(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 3:
            self.fault()
        return self.observe(), 0.0, self.steps == 5, False, {}

    def observe(self):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def fault(self):
        pass


class WithoutJax(Env):
    def close(self):
        assert "jax" not in sys.modules


class Scaled(Env):
    def __init__(self, scale):
        self.scale = scale

    def observe(self):
        return super().observe() * self.scale


class Double(Env):
    def observe(self):
        return self.np_random.uniform(-1, 1, 2)


class Hangs(Double):
    def fault(self):
        time.sleep(3600)


class Waits(Env):
    def fault(self):
        with open("pid", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(3602)


class HangsInC(Double):
    def fault(self):
        re.match("(a*)*b", "a" * 40)  # holds the interpreter lock


class HangsInConstructor(Env):
    def __init__(self):
        time.sleep(3601)


class Exits(Double):
    def fault(self):
        os._exit(7)


class Crashes(Double):
    def fault(self):
        ctypes.string_at(0)


class Interrupts(Double):
    def fault(self):
        raise KeyboardInterrupt


class Killed(Double):
    def fault(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Leaves(Env):
    def __init__(self):
        process = subprocess.Popen(["sleep", "3600"])
        with open("pids", "a") as file:
            print(process.pid, file=file)


class BadSpace(gym.spaces.Discrete):
    def sample(self, *args, **kwargs):
        raise LookupError("nothing to choose from")


class CannotSample(Env):
    action_space = BadSpace(2)
"""


@pytest.fixture(autouse=True)
def environments(tmp_path, monkeypatch):
    (tmp_path / "own_environments.py").write_text(ENVIRONMENTS)
    monkeypatch.chdir(tmp_path)


def check(capfd, name, *more):
    """Runs the command; gives its exit code, its lines and its JSON."""
    code = main(["check", f"own_environments:{name}", "--steps", "30", *more, "--json"])
    *lines, last = capfd.readouterr().out.splitlines()
    return code, lines, json.loads(last)


def line_of(words):
    lines = ENVIRONMENTS.splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if words in line)
    return number


@pytest.mark.parametrize(
    ("name", "finding", "words", "place"),
    [
        ("Hangs", "hangs", "took longer than 0.3 s", "sleep(3600)"),
        ("HangsInC", "hangs", "took longer than 0.3 s", "(a*)*b"),
        ("Exits", "process-ends", "exit code 7", None),
        ("Crashes", "process-ends", "signal 11 (SIGSEGV)", "string_at"),
        ("Killed", "process-ends", "signal 9 (SIGKILL), perhaps out of memory", None),
    ],
)
def test_an_end_in_a_step_is_a_finding(capfd, name, finding, words, place):
    code, lines, content = check(capfd, name, "--seconds", "0.3")
    assert code == 1
    (error,) = (found for found in content["findings"] if found["level"] == "error")
    assert error["name"] == finding
    assert error["message"].startswith("step 3: ")
    assert words in error["message"]
    if place is not None:
        assert f"(at own_environments.py:{line_of(place)})" in error["message"]
    # what was found before is not lost
    assert [found["name"] for found in content["findings"][1:]] == ["observation-dtype"]
    assert lines[-1].startswith("1 error and 1 warning (")


def test_an_environments_own_interrupt_is_a_finding(capfd):
    assert main(["check", "own_environments:Interrupts", "--steps", "30"]) == 1
    output, errors = capfd.readouterr()
    assert output.startswith("error    step-raises            step 3: KeyboardInterrupt (at own_en")
    assert output.count("\n") == 3  # the type of its observations, and how many there are in all
    assert errors == ""


@pytest.mark.parametrize(
    ("signum", "code", "said"),
    [
        (signal.SIGINT, 130, "starling: error: interrupted\n"),
        (signal.SIGTERM, 143, ""),
        pytest.param(
            *(signal.SIGKILL, -signal.SIGKILL, ""),
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of it"),
        ),
    ],
)
def test_a_signal_ends_it_and_its_process(tmp_path, monkeypatch, signum, code, said):
    if signum == signal.SIGKILL:  # nobody is left to remove its temporary files
        monkeypatch.setenv("TMPDIR", str(tmp_path))
    with starling("check", "own_environments:Waits") as process:
        wait_for(process, tmp_path / "pid")
        pid = int((tmp_path / "pid").read_text())
        process.send_signal(signum)
        assert process.wait() == code
        assert ends_within(pid, 5.0)
        assert process.communicate() == ("", said)


def test_a_constructor_that_hangs_is_a_finding(capfd):
    code, _, content = check(capfd, "HangsInConstructor", "--seconds", "0.3")
    assert code == 1
    (found,) = content["findings"]
    assert found["message"].startswith("making it: took longer than 0.3 s (at own_environments.py:")
    assert found["message"].endswith("give --seconds")


def test_a_sound_environment_has_none_and_meets_no_jax(capfd):
    code, lines, content = check(capfd, "WithoutJax")
    assert code == 0
    assert lines[-1].startswith("nothing wrong found in 30 steps of 6 episodes (")
    assert [found["name"] for found in content["findings"]] == ["speed"]
    assert (content["errors"], content["warnings"], content["notes"]) == (0, 0, 1)
    assert content["steps_per_second"] > 0
    assert content["env"] == "own_environments:WithoutJax"


def test_warnings_alone_leave_the_exit_code_at_0(capfd):
    code, lines, _ = check(capfd, "Double")
    assert code == 0
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["warning", "observation-dtype"],
        ["note", "speed"],
    ]
    assert lines[-1].startswith("0 errors and 1 warning in 30 steps of 6 episodes (")


def test_arguments_go_to_the_environment(capfd):
    code, _, content = check(capfd, "Scaled", "--env_kwargs", '{"scale": 1.0}')
    assert (code, content["warnings"]) == (0, 0)
    code, _, content = check(capfd, "Scaled", "--env-kwargs", '{"scale": 50.0}')
    assert [found["name"] for found in content["findings"]] == ["observation-bounds", "speed"]


def test_processes_that_an_environment_leaves_are_ended(capfd, tmp_path):
    _, _, content = check(capfd, "Leaves")
    assert [found["about"] for found in content["findings"]] == ["child processes", ""]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) > 3
    assert all(ends_within(pid, 5.0) for pid in pids)


def test_a_space_that_raises_is_a_finding(capfd):
    code, _, content = check(capfd, "CannotSample")
    assert code == 1
    assert [found["name"] for found in content["findings"]] == ["sample-raises"]
    assert "step 1: LookupError: nothing to choose from" in content["findings"][0]["message"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["CartPol-v1"], "there is no environment 'CartPol-v1'"),
        (["own_environments:Nobody"], "module 'own_environments' has no 'Nobody'"),
        (["own_environments:Scaled", "--env_kwargs", '{"sise": 1}'], "no argument 'sise'"),
        (["CartPole-v1", "--env_kwargs", "3"], "env_kwargs must be a JSON object"),
        (["CartPole-v1", "--steps", "0"], "steps must be at least 1"),
        (["CartPole-v1", "--stepps", "5"], "unknown option --stepps: did you mean --steps"),
        ([], "env is missing"),
    ],
)
def test_wrong_input_is_told_in_one_line(capfd, arguments, words):
    assert main(["check", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("starling: error: ")
    assert words in line


def test_the_environment_may_be_an_option_as_elsewhere(capfd):
    assert main(["check", "--env", "own_environments:Env", "--steps", "5"]) == 0
    assert "nothing wrong found in 5 steps of 1 episode (" in capfd.readouterr().out
