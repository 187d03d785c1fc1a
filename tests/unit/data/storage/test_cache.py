"""The node's download cache, filled from a file:// URL: complete copies, bounded size, bounded waits."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from cached_copies import SIZE, FileFactory, age, copy_names, read_copy
from clock import Clock

from foveal.data.config import CacheConfig
from foveal.data.storage import cache as cache_module
from foveal.data.storage.cache import CacheFullError, DownloadCache, RemoteFile, open_cache
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError


@pytest.fixture
def folder_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the total size of a cache's folder, in bytes, whenever names or reserved sizes have changed."""
    sums: list[int] = []
    lock = DownloadCache._eviction_lock

    @contextmanager
    def measure(cache: DownloadCache) -> Iterator[None]:
        with lock(cache):
            yield
            sizes = []
            for entry in os.scandir(cache.folder):
                with contextlib.suppress(FileNotFoundError):  # the part of a file that does not fit
                    sizes.append(Path(entry).stat().st_size)
            sums.append(sum(sizes))

    monkeypatch.setattr(DownloadCache, "_eviction_lock", measure)
    return sums


def test_what_is_unused_for_the_longest_goes_first(cache: DownloadCache, remote_file: FileFactory) -> None:
    for number in (0, 1, 2):
        read_copy(cache, remote_file(number))
        age(cache, remote_file(number), 100 - number)
    read_copy(cache, remote_file(0))  # marks the copy as used
    read_copy(cache, remote_file(3))
    assert copy_names(cache) == ["0.tar", "3.tar"], (
        "an eviction leaves 5 % of the limit free, so two copies were removed"
    )


def test_many_readers_in_little_room(tmp_path: Path, remote_file: FileFactory, folder_bytes: list[int]) -> None:
    """All reads are correct, the folder stays within its limit, and no part file remains."""
    files = [remote_file(number) for number in range(8)]
    faults: list[object] = []

    def read(seed: int) -> None:
        rng, own_cache = (
            random.Random(seed),
            DownloadCache(tmp_path / "cache", 3 * SIZE + 10, other_process_timeout=60.0),
        )
        for _ in range(25):
            file = rng.choice(files)
            try:
                if hashlib.sha256(read_copy(own_cache, file)).hexdigest() != file.sha256:
                    faults.append(file.name)
            except BaseException as error:
                faults.append(error)
                raise

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert 2 * SIZE < max(folder_bytes) <= 3 * SIZE + 10
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_copy_that_goes_while_it_is_read(cache: DownloadCache, remote_file: FileFactory, server: Path) -> None:
    descriptor = cache.open_file(remote_file(0))
    for number in (1, 2, 3, 4):
        read_copy(cache, remote_file(number))
    assert "0.tar" not in copy_names(cache)
    assert os.pread(descriptor, SIZE, 0) == (server / "0.tar").read_bytes()
    os.close(descriptor)


def test_a_file_larger_than_the_cache(tmp_path: Path, remote_file: FileFactory) -> None:
    small = DownloadCache(tmp_path / "cache", SIZE - 1, other_process_timeout=1.0)
    with pytest.raises(
        CacheFullError, match=r"0.tar has 0.0001 GB and the cache .* may hold 0.0001 GB: raise data.cache.max_giga"
    ):
        small.open_file(remote_file(0))
    assert copy_names(small) == []


def test_a_cache_too_small_for_what_is_in_use_says_so_once(
    cache: DownloadCache, remote_file: FileFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for number in (0, 1, 2, 3, 4, 5, 6, 7):
            read_copy(cache, remote_file(number))
    assert [record.message.partition(": ")[2][:11] for record in caplog.records] == ["the 0.0003 "]


def test_a_copy_that_was_damaged_is_fetched_again(cache: DownloadCache, remote_file: FileFactory, server: Path) -> None:
    read_copy(cache, remote_file(0))
    (cache.folder / remote_file(0).cache_name).write_bytes(b"short")
    assert read_copy(cache, remote_file(0)) == (server / "0.tar").read_bytes()


def test_bytes_that_are_always_wrong(cache: DownloadCache, remote_file: FileFactory, server: Path) -> None:
    file = remote_file(0)
    (server / "0.tar").write_bytes(bytes(SIZE))
    with pytest.raises(DataError, match=r"server/0.tar is damaged: 5 downloads brought wrong bytes \(their sha256 is"):
        cache.open_file(file)
    (server / "0.tar").write_bytes(bytes(SIZE - 1))
    with pytest.raises(DataError, match=r"0.tar has 99999 bytes and manifest.json says 100000: restore it, or index"):
        cache.open_file(file)
    assert copy_names(cache) == []


def test_a_check_names_the_url_and_not_the_copy(cache: DownloadCache, remote_file: FileFactory, server: Path) -> None:
    def refuse(file: Path) -> None:
        raise DataError(f"{file} is no good: index {file.parent} again")

    with pytest.raises(DataError) as caught:
        cache.open_file(dataclasses.replace(remote_file(0), validate=refuse))
    assert f"file://{server}/0.tar is no good: index file://{server} again" in str(caught.value)
    assert str(cache.folder) not in str(caught.value)


def test_two_sets_with_the_same_names_do_not_collide(
    cache: DownloadCache, remote_file: FileFactory, server: Path
) -> None:
    other = server.parent / "other"
    other.mkdir()
    (other / "0.tar").write_bytes(bytes(SIZE))
    other_file = RemoteFile(RemoteFolder(f"file://{other}", 4.0), "0.tar", "1", SIZE)
    newer = dataclasses.replace(other_file, version="2")
    assert read_copy(cache, remote_file(0)) == (server / "0.tar").read_bytes()
    assert read_copy(cache, other_file) == bytes(SIZE)
    (other / "0.tar").write_bytes(b"\1" * SIZE)
    assert read_copy(cache, newer) == b"\1" * SIZE


@pytest.mark.parametrize("moves", [False, True])
def test_another_process_that_copies(
    cache: DownloadCache, remote_file: FileFactory, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stalled process raises; a writing process is waited for, and its part is taken over if it dies."""
    cache.folder.mkdir()
    descriptor = os.open(cache.folder / f"{remote_file(0).cache_name}.part", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    clock, waits = Clock(), itertools.count(1)

    def wait(_seconds: float) -> None:
        """Let 25 s pass, of which the cache waits for 60 without a write; the other process dies in the tenth wait."""
        clock.pass_(25.0)
        if moves and (number := next(waits)) < 10:
            os.pwrite(descriptor, b"not a valid file", 0)
            os.utime(descriptor, ns=(number, number))  # as a clock of the kernel's that ticks in between
        elif moves:
            assert cache.download_counter() == 9
            os.close(descriptor)  # as the kernel does

    monkeypatch.setattr(cache_module, "time", SimpleNamespace(monotonic=clock, sleep=wait, time=time.time))
    start = clock.now
    if moves:
        assert hashlib.sha256(read_copy(cache, remote_file(0))).hexdigest() == remote_file(0).sha256
        assert clock.now - start == 250
        return
    with pytest.raises(DataError, match=r"0.tar is being copied by another process .* not moved for 60 s: end that"):
        cache.open_file(remote_file(0))
    assert clock.now - start == 75
    os.close(descriptor)


def test_a_part_that_goes_between_opening_and_locking_it(
    cache: DownloadCache, remote_file: FileFactory, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eviction may remove a part between open and lock; the lock on a deleted file protects nothing."""
    part, try_lock, removals = cache.folder / f"{remote_file(0).cache_name}.part", cache_module._try_lock, []

    def remove_then_lock(descriptor: int) -> bool:
        if not removals and part.exists():
            part.unlink()
            removals.append(descriptor)
        return try_lock(descriptor)

    monkeypatch.setattr(cache_module, "_try_lock", remove_then_lock)
    assert read_copy(cache, remote_file(0)) == (server / "0.tar").read_bytes()
    assert removals and copy_names(cache) == ["0.tar"]


def test_a_copy_that_comes_between_two_looks(
    cache: DownloadCache, remote_file: FileFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_copy(cache, remote_file(0))
    open_existing, calls = cache_module._open_existing, []
    monkeypatch.setattr(
        cache_module, "_open_existing", lambda *args: open_existing(*args) if calls else calls.append(args)
    )
    monkeypatch.setattr(DownloadCache, "_wait_for_lock", lambda _, file, *__: os.open(file, os.O_RDWR | os.O_CREAT))
    monkeypatch.setattr(DownloadCache, "_download", lambda *_: pytest.fail("the copy exists"))
    read_copy(cache, remote_file(0))
    assert calls and copy_names(cache) == ["0.tar"]


def test_parts_of_the_dead_take_no_room(cache: DownloadCache, remote_file: FileFactory) -> None:
    cache.folder.mkdir()
    for number in (1, 2, 3):
        (cache.folder / f"{remote_file(number).cache_name}.part").write_bytes(bytes(SIZE))
    (cache.folder / "notes.txt").write_bytes(bytes(4 * SIZE))
    read_copy(cache, remote_file(0))
    assert sorted(copy_names(cache)) == ["", "0.tar"], "foreign files are neither counted nor removed"


def test_room_that_downloads_under_way_have_taken(tmp_path: Path, remote_file: FileFactory) -> None:
    cache = DownloadCache(tmp_path / "cache", 2 * SIZE - 1, other_process_timeout=0.3)
    cache.folder.mkdir()
    part = os.open(cache.folder / f"{remote_file(1).cache_name}.part", os.O_RDWR | os.O_CREAT)
    fcntl.flock(part, fcntl.LOCK_EX)
    os.ftruncate(part, SIZE)
    with pytest.raises(
        CacheFullError, match=r"0.tar does not fit into the cache .* are taken by downloads under way; raise"
    ):
        cache.open_file(remote_file(0))
    os.close(part)
    read_copy(cache, remote_file(0))


def test_a_full_disk(cache: DownloadCache, remote_file: FileFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        DataError, match=r"0.tar cannot be copied, .* is on a full disk: lower data.cache.max_gigabytes"
    ):
        cache.open_file(remote_file(0))
    assert copy_names(cache) == []


def test_the_default_folder_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = open_cache(CacheConfig(max_gigabytes=2.0), 1.0).folder
    assert folder == tmp_path / f"foveal-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(DataError, match="is not yours alone to write to: set data"):
        open_cache(CacheConfig(), 1.0)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(DataError, match="is not yours alone"):
        open_cache(CacheConfig(), 1.0)
