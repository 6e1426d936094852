"""Standard error that is closed, full or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full"),
]

CASES = ["closed", "full", "nobody reads"]


def run(program: list[str], stderr: str, **options) -> subprocess.CompletedProcess:
    """Runs a program that can write nothing to standard error."""
    options |= {"stdout": subprocess.PIPE, "text": True, "check": False}
    if stderr == "closed":
        return subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *program], **options)
    if stderr == "full":
        with open("/dev/full", "wb") as full:
            return subprocess.run(program, stderr=full, **options)
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        return subprocess.run(program, stderr=write_end, **options)
    finally:
        os.close(write_end)


ENVIRONMENT = """
import os, sys
import gymnasium as gym
import numpy as np
from starling.envs.process import ProcessVectorEnv

class Env(gym.Env):
    observation_space = gym.spaces.Box(0, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        say(self.steps)
        return np.full(1, self.steps, np.float32), 1.0, False, False, {}

def steps(n):
    vector = ProcessVectorEnv([Env] * 2, num_workers=2)
    vector.reset()
    for k in range(1, n + 1):
        assert vector.step([0, 0])[0].tolist() == [[k]] * 2
    vector.close()
"""

PRINTS = """
def say(step):
    print("x" * 10_000)  # more than a buffer holds
    print("y", file=sys.stderr)

first = open("first", "w")  # gets the number of standard error where that is closed
steps(3)
print(first.fileno(), os.stat("first").st_size)
"""


@pytest.mark.parametrize("stderr", CASES)
def test_what_is_printed_is_lost_and_nothing_else(tmp_path, stderr):
    done = run([sys.executable, "-c", ENVIRONMENT + PRINTS], stderr, cwd=tmp_path)
    assert done.returncode == 0
    number, size = map(int, done.stdout.split())
    assert size == 0
    assert (number == 2) == (stderr == "closed")


CLOSES = """
def say(step):
    if step == 1:
        sys.stdout.close()
    print(f"step {step}", file=sys.stderr)

steps(2)
"""


def test_an_environment_that_closes_standard_output():
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT + CLOSES], capture_output=True, text=True, check=True
    )
    said = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert sorted(said) == ["step 1", "step 1", "step 2", "step 2"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_workers_start_without_standard_streams(tmp_path, closed):
    script = ENVIRONMENT + "say = print\nsteps(2)\nopen('done', 'w').close()"
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", script]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("stderr", CASES)
def test_a_command_says_by_its_exit_code_what_it_cannot_print(stderr):
    done = run([sys.executable, "-m", "starling", "trian"], stderr)
    assert (done.returncode, done.stdout) == (2, "")
