"""A worker behind a network that is slow and loses packets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slow_network import ROWS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# With its first process all others end.
APART = [*("unshare", "--user", "--map-root-user", "--net"), "--pid", "--fork", "--kill-child"]
APART += ["--mount-proc"]


@pytest.fixture(scope="module", autouse=True)
def own_network():
    """Skips where nobody may have networks of their own."""
    attempt = [*APART, "ip", "tuntap", "add", "dev", "any", "mode", "tun"]
    try:
        subprocess.run(attempt, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"networks of their own need `unshare` and `ip`: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"networks of their own are not permitted here: {error.stderr.strip()}")


@pytest.mark.parametrize(("sync_mode", "updates"), [("blocking", 20), ("non_blocking", 300)])
def test_a_slow_network_that_loses_packets_spoils_nothing(sync_mode, updates):
    """Every packet takes 200 ms, and of 20 one is lost; see slow_network.py for what is checked."""
    program = Path(__file__).with_name("slow_network.py")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:  # short, for sockets
        done = subprocess.run(
            [*APART, sys.executable, program, sync_mode, str(updates), "0.2", "0.05", folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rollouts = found.pop("rollouts")
    print(found)
    assert (found["status"], found["steps"]) == ("completed", updates * ROWS)
    assert len(rollouts) - found["dropped"] == 2 * updates
    for index in (0, 1):  # of which one is beyond
        numbers = [number for worker, number in rollouts if worker == index]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > 2
    assert found["workers_lost"] == 0
    assert found["most_waiting"] <= 2 * 2 + 1, "two requests of each, and what is left over"
    assert found["packets_lost"] > 0.02 * found["packets"] > 2
