"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import gc

import pytest
from leaks import children, descriptors


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
