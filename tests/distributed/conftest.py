"""A Ray cluster on this machine, for the tests of one file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # what they measure is tested, too

from elastic_cases import cluster_of


@pytest.fixture(scope="module")
def cluster():
    """A head node with three cores, as Ray counts them."""
    with cluster_of(3) as made:
        yield made


@pytest.fixture
def head():
    """A cluster of one node with one core."""
    with cluster_of(1) as made:
        yield made
