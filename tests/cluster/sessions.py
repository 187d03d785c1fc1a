"""A cluster for the tests of a session, or the reason why there is none."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster, missing


@contextmanager
def cluster_of_session(request: pytest.FixtureRequest, **settings: Any) -> Iterator[Cluster]:
    """A cluster with its own folder, which stays when a test of the session failed; skips where Slurm is not installed."""
    if absent := missing():
        sentence = f"no Slurm here ({', '.join(absent)} missing): run tests/cluster/install_slurm.sh as root"
        if os.environ.get("FOVEAL_REQUIRE_CLUSTER") == "1":
            pytest.fail(sentence, pytrace=False)
        pytest.skip(sentence)
    folder = Path(tempfile.mkdtemp(prefix="fov-", dir="/tmp"))  # TMPDIR may be too long for UNIX sockets
    failed_before = request.session.testsfailed
    with Cluster(folder, **settings) as up:
        yield up
    if request.session.testsfailed == failed_before:
        shutil.rmtree(folder)
