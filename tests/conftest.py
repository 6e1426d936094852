"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import gc
import os

import pytest
from leaks import children, descriptors


def pytest_configure(config):
    """Lets tests that build the same program load it: to compile is most of their time."""
    folder = config.rootpath / ".pytest_cache" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory):
    """Keeps what commands would put into the user's cache folder out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_leaks():
    """Fails if the test leaves a process or a file descriptor behind."""
    gc.collect()
    processes, files = children(), descriptors()
    yield
    gc.collect()
    assert children() <= processes, "a process was left behind"
    assert len(descriptors()) <= len(files), set(descriptors()) - set(files)
