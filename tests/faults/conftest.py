"""Fixtures of the tests of faults."""

from __future__ import annotations

import os
import signal

import pytest

from starling.envs import restarts


@pytest.fixture
def no_pauses(monkeypatch):
    """Lets what has failed be tried again at once."""
    monkeypatch.setattr(restarts, "_FIRST_PAUSE", 0.0)


@pytest.fixture
def make(closed_at_the_end):
    """Makes vector environments that are closed when the test ends."""

    def make_one(backend, factories, **options):
        return closed_at_the_end(backend(factories, **options))

    return make_one


@pytest.fixture
def gate(tmp_path):
    """A named pipe at which a `GatedEnv` waits in each step."""
    path = str(tmp_path / "gate")
    os.mkfifo(path)
    return path


@pytest.fixture
def interruptible():
    """Lets Ctrl-C be heard, which what runs in the background may not hear."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
