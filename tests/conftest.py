"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
import tempfile

import pytest
from leaks import nothing_left


def pytest_configure(config):
    """Lets tests that build the same program load it: to compile is most of their time."""
    folder = config.rootpath / ".pytest_cache" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(autouse=True, scope="session")
def folders_of_the_tests(tmp_path_factory):
    """Keeps what is meant for the user's cache out of it, and temporary files to themselves."""
    temporary = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TMPDIR", temporary)
        patch.setattr(tempfile, "tempdir", temporary)
        yield


@pytest.fixture
def no_leaks():
    """Fails if the test leaves a process, thread, descriptor or temporary file behind."""
    with nothing_left():
        yield
