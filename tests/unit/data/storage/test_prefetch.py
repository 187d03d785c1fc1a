"""Prefetching: request order, bounded by the cache, without eviction of copies in use."""

import time
from pathlib import Path

import pytest
from cached_copies import FileFactory, age, copy_names, read_copy

from foveal.data.storage import cache as cache_module
from foveal.data.storage.cache import DownloadCache, RemoteFile
from foveal.data.storage.prefetch import Prefetcher


def fetch_ahead(cache: DownloadCache, files: list[RemoteFile]) -> set[str]:
    """Return the names of the copies after the last thread of a prefetcher has ended."""
    prefetcher, until = Prefetcher(cache), time.monotonic() + 60
    prefetcher.replace_requests(files)
    while prefetcher._threads:
        assert time.monotonic() < until
        time.sleep(0.005)
    return set(copy_names(cache))


def test_fetching_ahead_takes_no_room_from_what_is_in_use(cache: DownloadCache, remote_file: FileFactory) -> None:
    for number, seconds in ((0, 1000), (1, 30), (2, 1)):
        read_copy(cache, remote_file(number))
        age(cache, remote_file(number), seconds)
    files = [remote_file(number) for number in (3, 4, 5, 6)]  # of which three would fit into an empty cache
    copies = fetch_ahead(cache, files)
    assert {"1.tar", "2.tar"} < copies
    assert len(copies - {"0.tar", "1.tar", "2.tar"}) == 1


def test_fetching_ahead_stops_where_the_cache_ends(
    cache: DownloadCache, remote_file: FileFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first files are needed first and stay, however long the others take."""
    monkeypatch.setattr(cache_module, "_PREFETCH_MIN_IDLE", 0.0)
    assert fetch_ahead(cache, [remote_file(number) for number in range(6)]) == {"0.tar", "1.tar", "2.tar"}


def test_fetching_ahead_notes_what_is_there_as_in_use(cache: DownloadCache, remote_file: FileFactory) -> None:
    for number in (0, 1, 2):
        read_copy(cache, remote_file(number))
        age(cache, remote_file(number), 1000 - number)
    assert fetch_ahead(cache, [remote_file(0), remote_file(1), remote_file(3)]) == {"0.tar", "1.tar", "3.tar"}


def test_fetching_ahead_says_nothing_of_what_is_not_there(
    cache: DownloadCache, remote_file: FileFactory, server: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = remote_file(0)
    (server / "0.tar").unlink()
    assert fetch_ahead(cache, [missing, remote_file(1)]) == {"1.tar"}
    assert "not fetched ahead: file://" in caplog.text
    assert "0.tar is not there or may not be read" in caplog.text
