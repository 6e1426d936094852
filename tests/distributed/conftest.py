"""A Ray cluster on this machine, for the tests of one file."""

from __future__ import annotations

import pytest

NO_DASHBOARD = {"include_dashboard": False, "object_store_memory": 200 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """A head node with three cores, as Ray counts them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, **NO_DASHBOARD})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def head():
    """A cluster of one node with one core."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **NO_DASHBOARD})
    yield cluster
    cluster.shutdown()
