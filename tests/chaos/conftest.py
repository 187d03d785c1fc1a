"""The cluster that is disturbed."""

from collections.abc import Iterator

import pytest
from harness import Cluster
from sessions import cluster_of_session


@pytest.fixture(scope="session")
def third_node(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster where a job of two nodes can lose one."""
    with cluster_of_session(request, nodes=3) as up:
        yield up
