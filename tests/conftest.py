"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import gc
import os
import tempfile
import threading

import pytest
from leaks import nothing_left

# Programs of few and simple kernels: to compile them takes a quarter of the time.
_CHEAP = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    """Makes compiling cheap, which is most of the tests' time.

    Tests that build the same program load it, and the fast ones' programs are not optimised. With
    `XLA_FLAGS=` and `JAX_DISABLE_MOST_OPTIMIZATIONS=0` they are those that users run.

    Ray gives its workers a niceness of 15: beside other tests they would hardly get to run.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    folder = config.rootpath / ".pytest_cache" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if config.option.markexpr == "not slow":
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        os.environ.setdefault("XLA_FLAGS", _CHEAP)


def pytest_collection_finish(session):
    """Spares the garbage collector what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def folders_of_the_tests(tmp_path_factory):
    """Keeps what is meant for the user's cache out of it, and temporary files to themselves."""
    temporary = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TMPDIR", temporary)
        patch.setenv("RAY_TMPDIR", "/tmp")  # Ray's sockets have to have short names
        patch.setattr(tempfile, "tempdir", temporary)
        yield


@pytest.fixture
def shared_programs(monkeypatch):
    """Lets trainers that are told the same have their programs in common."""
    from programs import shared  # imports JAX, which is to know first what is above

    from starling import DQN, AsyncDQN, AsyncPPO, ParallelPPO
    from starling.training.agent import Agent

    for trainer in (Agent, ParallelPPO, AsyncPPO, DQN, AsyncDQN):
        own = trainer.algorithm_class
        monkeypatch.setattr(trainer, "algorithm_class", staticmethod(shared(own)))


@pytest.fixture
def closed_at_the_end():
    """Returns what it is given, and closes it when the test ends."""
    kept = []

    def keep(made):
        kept.append(made)
        return made

    yield keep
    for made in kept:
        made.close()
    kept.clear()  # agents hold observations, which are the environments' memory


@pytest.fixture
def no_actors_left():
    """Fails if an actor's thread is left; for fixtures that close agents after it."""
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("starling-actor")]
    assert not left


@pytest.fixture
def no_leaks():
    """Fails if the test leaves a process, thread, descriptor or temporary file behind."""
    with nothing_left():
        yield
