"""One real Slurm per session. Without Slurm its tests skip; under FOVEAL_REQUIRE_CLUSTER=1 they fail instead."""

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster, missing

running = pytest.StashKey[Cluster]()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A two-node Slurm, with accounting. Its logs are kept when a test of the session failed."""
    if absent := missing():
        sentence = f"no Slurm here ({', '.join(absent)} missing): run tests/cluster/install_slurm.sh as root"
        if os.environ.get("FOVEAL_REQUIRE_CLUSTER") == "1":
            pytest.fail(sentence, pytrace=False)
        pytest.skip(sentence)
    folder = Path(tempfile.mkdtemp(prefix="fov-", dir="/tmp"))  # TMPDIR may be too long for UNIX sockets
    failed_before = request.session.testsfailed
    with Cluster(folder) as up:
        request.config.stash[running] = up
        yield up
    if request.session.testsfailed == failed_before:
        shutil.rmtree(folder)


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
