"""Prefetching: request order, bounded by the cache, without eviction of copies in use."""

import time
from pathlib import Path

import pytest
from cached_copies import FileFactory, age, copy_names, read_copy

from foveal.data.storage import cache as cache_module
from foveal.data.storage.cache import DownloadCache
from foveal.data.storage.prefetch import Prefetcher


def wait_for_copies(cache: DownloadCache, names: list[str]) -> bool:
    until = time.monotonic() + 5
    while sorted(copy_names(cache)) != names and time.monotonic() < until:
        time.sleep(0.01)
    return sorted(copy_names(cache)) == names


def test_fetching_ahead_takes_no_room_from_what_is_in_use(cache: DownloadCache, remote_file: FileFactory) -> None:
    for number, seconds in ((0, 1000), (1, 30), (2, 1)):
        read_copy(cache, remote_file(number))
        age(cache, remote_file(number), seconds)
    files = [remote_file(number) for number in (3, 4, 5, 6)]  # of which three would fit into an empty cache
    Prefetcher(cache).replace_requests(files)
    time.sleep(0.3)
    assert len(copy_names(cache)) == 3
    assert {"1.tar", "2.tar"} < set(copy_names(cache))


def test_fetching_ahead_stops_where_the_cache_ends(
    cache: DownloadCache, remote_file: FileFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first files are needed first and stay, however long the others take."""
    monkeypatch.setattr(cache_module, "_PREFETCH_MIN_IDLE", 0.0)
    Prefetcher(cache).replace_requests([remote_file(number) for number in range(6)])
    time.sleep(0.3)
    assert sorted(copy_names(cache)) == ["0.tar", "1.tar", "2.tar"]


def test_fetching_ahead_notes_what_is_there_as_in_use(cache: DownloadCache, remote_file: FileFactory) -> None:
    for number in (0, 1, 2):
        read_copy(cache, remote_file(number))
        age(cache, remote_file(number), 1000 - number)
    Prefetcher(cache).replace_requests([remote_file(0), remote_file(1), remote_file(3)])
    assert wait_for_copies(cache, ["0.tar", "1.tar", "3.tar"])


def test_fetching_ahead_says_nothing_of_what_is_not_there(
    cache: DownloadCache, remote_file: FileFactory, server: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = remote_file(0)
    (server / "0.tar").unlink()
    Prefetcher(cache).replace_requests([missing, remote_file(1)])
    until = time.monotonic() + 5
    while "0.tar is not there or may not be read" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    assert "not fetched ahead: file://" in caplog.text
    assert wait_for_copies(cache, ["1.tar"])
