"""One real Slurm per session. Without Slurm its tests skip; under FOVEAL_REQUIRE_CLUSTER=1 they fail instead."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from harness import Cluster
from sessions import cluster_of_session

running = pytest.StashKey[Cluster]()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A two-node Slurm, with accounting. Its logs are kept when a test of the session failed."""
    with cluster_of_session(request, nodes=2) as up:
        request.config.stash[running] = up
        yield up


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test on the cluster shows the end of the daemons' logs, and says where the whole ones are."""
    report = yield
    up = item.config.stash.get(running, None)
    if report.failed and up is not None and "cluster" in getattr(item, "fixturenames", ()):
        report.sections += [(f"{up.folder}/log/{name}", text) for name, text in up.logs().items()]
    return report
