"""Commands in processes of their own, which end with the test that started them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leaks import living_in

from starling.training.signals import GRACE_SECONDS

# Says when what is before the command has been imported: until then Python itself answers signals.
# They may be ignored where tests run (in a shell's background), and would be here, too.
_PROGRAM = """
import faulthandler, os, signal, sys
from starling.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
if stack := os.environ.get("STACK"):
    faulthandler.register(signal.SIGUSR1, open(stack, "w"), all_threads=False)
print("started", flush=True)
sys.exit(main(sys.argv[1:]))
"""

Process = subprocess.Popen[str]


@contextmanager
def starling(
    *arguments: str, folder: Path | None = None, stack: Path | None = None
) -> Iterator[Process]:
    """Starts a command in a session of its own, of which nothing is left in the end.

    Args:
        arguments: Of the command.
        folder: Its current one.
        stack: Where `activity` finds out what it is at.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=folder,
        env={**os.environ, **({"STACK": str(stack)} if stack else {})},
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "started\n", process.communicate()[1]
            yield process
        finally:
            process.kill()
            process.wait()
            for pid in living_in(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def wait_for(process: Process, file: Path, size: int = 1) -> None:
    """Waits until a file is that large; the test's time limit is the deadline."""
    while not (file.exists() and file.stat().st_size >= size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


# The first of these whose functions the main thread is in.
_ACTIVITIES = {
    "importing": "_find_and_load",
    "saving": "save_checkpoint",
    "evaluating": "_evaluate",
    "compiling": "backend_compile.*|lower|trace.*",
    "updating": "update",
    "collecting": "collect",
    "starting": "__init__|begin",
}


def activity(process: Process, stack: Path) -> str:
    """What a run is at, by the functions that its main thread is in."""
    found, asked = "", 0
    while not found.endswith(("in <module>\n", "  ...\n")):
        if process.poll() is not None:
            return "ending"
        if asked % 1000 == 0:  # now and then another thread takes the signal, and says nothing
            process.send_signal(signal.SIGUSR1)
        if asked == 5000:
            return "elsewhere"
        asked += 1
        time.sleep(0.001)
        found = stack.read_text()
    for what, functions in _ACTIVITIES.items():
        if re.search(rf" in ({functions})$", found, re.MULTILINE):
            return what
    return "elsewhere"


def wait_until_gone(process: Process) -> None:
    """Waits until nothing of the process's session lives; see `wait_for`."""
    while living_in(process.pid):
        time.sleep(0.01)


def done(*arguments: str, folder: Path | None = None) -> str:
    """Runs a command that must succeed; returns what it said on standard output."""
    with starling(*arguments, folder=folder) as process:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        wait_until_gone(process)
    return output


def stop(process: Process, signum: int, to_group: bool = False) -> None:
    """Stops a command; it must say what it has done, or nothing, and leave no process.

    Args:
        process: The command's.
        signum: SIGINT or SIGTERM.
        to_group: Send it to all of its group, as a terminal does.
    """
    (os.killpg if to_group else os.kill)(process.pid, signum)
    output, errors = process.communicate(timeout=GRACE_SECONDS + 15)
    code = process.returncode
    code = 128 - code if code < 0 else code  # as a shell says it
    assert code == 128 + signum, errors
    if output:
        assert (json.loads(output)["status"], errors) == ("stopped", "")
    else:  # nothing had begun
        told = "starling: error: interrupted\n" if signum == signal.SIGINT else ""
        assert errors == told, errors
    wait_until_gone(process)


ROWS = 4 * 16
"""Steps of an iteration of `train`, or of two, where those are of one actor of two."""

_PPO = ["--mini_batch_size", "64", "--epochs", "1"]
_DQN = [
    *("--mini_batch_size", "8", "--learning_starts", "32", "--buffer_size", "6400"),
    *("--updates_per_transition", "0.25", "--n_step", "1"),
]
_LEARNING = {
    "ppo": _PPO,
    "async_ppo": _PPO,
    "dqn": _DQN,
    "async_dqn": [*_DQN, "--num_actors", "2"],
    "distributed_ppo": _PPO,
}


def train(
    *options: str, algo: str = "ppo", env: str = "CartPole-v1", backend: str = "process"
) -> list[str]:
    """The words of a run whose iterations take milliseconds, each with a report and a save."""
    return [
        *("train", "--env", env, "--preset", "none", "--quiet", "--json", "--no_tensorboard"),
        *("--algo", algo, *_LEARNING[algo], "--num_envs", "4", "--num_steps", "16"),
        *("--hidden_sizes", "8", "--log_interval", "1", "--save_interval", "1"),
        *("--backend", backend, "--num_workers", "2", "--timesteps", "1_000_000_000"),
        *options,
    ]
