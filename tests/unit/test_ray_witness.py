"""What is said of a process that Ray has ended on the spot; without Ray."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from starling.training.ray_witness import Witness

PROCESS = """
import os, sys
from starling.training.ray_witness import Witness

witness = Witness(sys.argv[1])
if sys.argv[2] == "through":
    witness.dismiss()
print(os.getpid(), flush=True)
os._exit(1)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("raylet_is_there", "how", "told"),
    [(False, "ended", True), (True, "ended", False), (False, "through", False)],
)
def test_a_process_that_ends_without_a_word_is_told_of(raylet_is_there, how, told):
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        address = "{}:{}".format(*raylet.getsockname())
        if not raylet_is_there:
            raylet.close()
        # Whoever is left would keep its standard error open.
        ended = subprocess.run(
            [sys.executable, "-c", PROCESS, address, how],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert ended.returncode == 1
    assert ("(raylet) is gone, and process " + ended.stdout.strip() in ended.stderr) == told
    assert told or not ended.stderr


def test_a_run_goes_on_without_a_witness(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")  # as where Python is part of another program
    Witness("127.0.0.1:1").dismiss()
