"""A download cache and remote files to fill it with."""

import hashlib
import random
from pathlib import Path

import pytest
from cached_copies import SIZE, FileFactory

from foveal.data.storage.cache import DownloadCache, RemoteFile
from foveal.data.storage.remote import RemoteFolder


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    return folder


@pytest.fixture
def remote_file(server: Path) -> FileFactory:
    """Factory of the n-th file as a ``RemoteFile``."""
    remote = RemoteFolder(f"file://{server}", all_attempts_timeout=480.0)  # an eighth for each attempt

    def make(number: int) -> RemoteFile:
        data = (server / f"{number}.tar").read_bytes()
        return RemoteFile(remote, f"{number}.tar", "1", len(data), hashlib.sha256(data).hexdigest())

    return make


@pytest.fixture
def cache(tmp_path: Path) -> DownloadCache:
    return DownloadCache(tmp_path / "cache", 3 * SIZE, other_process_timeout=60.0)
