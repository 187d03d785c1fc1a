"""The node's cache, filled from a folder by its file:// URL: whole copies, never more than promised, nobody waits for ever."""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from foveal.data.config import CacheConfig
from foveal.data.storage import cache as cache_module
from foveal.data.storage.cache import CacheFullError, DownloadCache, RemoteFile, open_cache
from foveal.data.storage.prefetch import Prefetcher
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError

SIZE = 100_000  # of each of the files


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    return folder


@pytest.fixture
def want(server: Path) -> Callable[[int], RemoteFile]:
    """The n-th file as the cache wants it."""
    remote = RemoteFolder(f"file://{server}", timeout=4.0)

    def make(number: int) -> RemoteFile:
        data = (server / f"{number}.tar").read_bytes()
        return RemoteFile(remote, f"{number}.tar", "1", len(data), hashlib.sha256(data).hexdigest())

    return make


@pytest.fixture
def cache(tmp_path: Path) -> DownloadCache:
    return DownloadCache(tmp_path / "cache", 3 * SIZE, stall_timeout=1.0)


def fetched(cache: DownloadCache, wanted: RemoteFile) -> bytes:
    descriptor = cache.open_file(wanted)
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def held(cache: DownloadCache) -> list[str]:
    """Names of the files whose copies are there, the one unused for the longest first."""
    cache.folder.mkdir(exist_ok=True)
    found = [file for file in cache.folder.iterdir() if file.name != ".lock"]
    return [file.name.partition("-")[2] for file in sorted(found, key=lambda file: file.stat().st_mtime_ns)]


def age(cache: DownloadCache, wanted: RemoteFile, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(cache.folder / wanted.cache_name, (moment, moment))


@contextmanager
def watched(cache: DownloadCache) -> Iterator[list[int]]:
    """The sums of the sizes of all files in the folder, looked at all the time."""
    sums, ended = [], threading.Event()

    def look() -> None:
        lock = os.open(cache.folder / ".lock", os.O_RDWR | os.O_CREAT)  # or a look would mix the times before and after
        while not ended.is_set():
            fcntl.flock(lock, fcntl.LOCK_EX)
            sizes = {}
            for entry in os.scandir(cache.folder):
                with contextlib.suppress(FileNotFoundError):
                    sizes[entry.name] = Path(entry).stat().st_size
            fcntl.flock(lock, fcntl.LOCK_UN)
            sums.append(sum(sizes.values()))
            time.sleep(0.0005)
        os.close(lock)

    cache.folder.mkdir(exist_ok=True)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sums
    finally:
        ended.set()
        thread.join()


def test_what_is_unused_for_the_longest_goes_first(cache: DownloadCache, want: Callable[[int], RemoteFile]) -> None:
    for number in (0, 1, 2):
        fetched(cache, want(number))
        age(cache, want(number), 100 - number)
    fetched(cache, want(0))  # and so it is used
    fetched(cache, want(3))
    assert held(cache) == ["0.tar", "3.tar"], "5 % of the limit stay free, so two had to go"


def test_many_readers_in_little_room(tmp_path: Path, want: Callable[[int], RemoteFile]) -> None:
    """Every read is right, the folder never holds more than its limit, and nothing is left locked."""
    wanted = [want(number) for number in range(8)]
    faults: list[object] = []

    def read(seed: int) -> None:
        dice, mine = random.Random(seed), DownloadCache(tmp_path / "cache", 3 * SIZE + 10, stall_timeout=30.0)
        for _ in range(25):
            one = dice.choice(wanted)
            try:
                if hashlib.sha256(fetched(mine, one)).hexdigest() != one.sha256:
                    faults.append(one.name)
            except BaseException as error:
                faults.append(error)
                raise

    cache = DownloadCache(tmp_path / "cache", 3 * SIZE + 10, stall_timeout=30.0)
    with watched(cache) as sums:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults
    assert len(sums) > 20 and 2 * SIZE < max(sums) <= cache.max_bytes
    assert not list(cache.folder.glob("*.part"))


def test_a_copy_that_goes_while_it_is_read(
    cache: DownloadCache, want: Callable[[int], RemoteFile], server: Path
) -> None:
    descriptor = cache.open_file(want(0))
    for number in (1, 2, 3, 4):
        fetched(cache, want(number))
    assert "0.tar" not in held(cache)
    assert os.pread(descriptor, SIZE, 0) == (server / "0.tar").read_bytes()
    os.close(descriptor)


def test_a_file_larger_than_the_cache(tmp_path: Path, want: Callable[[int], RemoteFile]) -> None:
    small = DownloadCache(tmp_path / "cache", SIZE - 1, stall_timeout=1.0)
    with pytest.raises(
        CacheFullError, match=r"0.tar has 0.0001 GB and the cache .* may hold 0.0001 GB: raise data.cache.giga"
    ):
        small.open_file(want(0))
    assert held(small) == []


def test_a_cache_too_small_for_what_is_in_use_says_so_once(
    cache: DownloadCache, want: Callable[[int], RemoteFile], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for number in (0, 1, 2, 3, 4, 5, 6, 7):
            fetched(cache, want(number))
    assert [record.message.partition(": ")[2][:11] for record in caplog.records] == ["the 0.0003 "]


def test_a_copy_that_was_damaged_is_fetched_again(
    cache: DownloadCache, want: Callable[[int], RemoteFile], server: Path
) -> None:
    fetched(cache, want(0))
    (cache.folder / want(0).cache_name).write_bytes(b"short")
    assert fetched(cache, want(0)) == (server / "0.tar").read_bytes()


def test_bytes_that_are_always_wrong(cache: DownloadCache, want: Callable[[int], RemoteFile], server: Path) -> None:
    wanted = want(0)
    (server / "0.tar").write_bytes(bytes(SIZE))
    with pytest.raises(DataError, match=r"server/0.tar is damaged: 5 downloads brought wrong bytes \(their sha256 is"):
        cache.open_file(wanted)
    (server / "0.tar").write_bytes(bytes(SIZE - 1))
    with pytest.raises(DataError, match=r"0.tar has 99999 bytes and manifest.json says 100000: restore it, or index"):
        cache.open_file(wanted)
    assert held(cache) == []


def test_a_check_names_the_url_and_not_the_copy(
    cache: DownloadCache, want: Callable[[int], RemoteFile], server: Path
) -> None:
    def refuse(file: Path) -> None:
        raise DataError(f"{file} is no good: index {file.parent} again")

    with pytest.raises(DataError) as caught:
        cache.open_file(dataclasses.replace(want(0), validate=refuse))
    assert f"file://{server}/0.tar is no good: index file://{server} again" in str(caught.value)
    assert str(cache.folder) not in str(caught.value)


def test_two_sets_with_the_same_names_do_not_collide(
    cache: DownloadCache, want: Callable[[int], RemoteFile], server: Path
) -> None:
    other = server.parent / "other"
    other.mkdir()
    (other / "0.tar").write_bytes(bytes(SIZE))
    theirs = RemoteFile(RemoteFolder(f"file://{other}", 4.0), "0.tar", "1", SIZE)
    newer = dataclasses.replace(theirs, version="2")
    assert fetched(cache, want(0)) == (server / "0.tar").read_bytes()
    assert fetched(cache, theirs) == bytes(SIZE)
    (other / "0.tar").write_bytes(b"\1" * SIZE)
    assert fetched(cache, newer) == b"\1" * SIZE


@pytest.mark.parametrize("moves", [False, True])
def test_another_process_that_copies(cache: DownloadCache, want: Callable[[int], RemoteFile], moves: bool) -> None:
    """One that stands still is given up; while it writes it is waited for, and if it dies its part is taken over."""
    cache.folder.mkdir()
    part = cache.folder / f"{want(0).cache_name}.part"
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if not moves:
        start = time.monotonic()
        with pytest.raises(DataError, match=r"0.tar is being copied by another process .* not moved for 1 s: end that"):
            cache.open_file(want(0))
        assert 1 < time.monotonic() - start < 10
        os.close(descriptor)
        return
    before = cache.progress()
    reads: list[bytes] = []
    reader = threading.Thread(target=lambda: reads.append(fetched(cache, want(0))))
    reader.start()
    for _ in range(15):
        time.sleep(0.1)
        os.pwrite(descriptor, b"never believed", 0)
    assert reader.is_alive()
    assert cache.progress() >= before + 10
    os.close(descriptor)  # as the kernel does for the dead
    reader.join()
    assert hashlib.sha256(reads[0]).hexdigest() == want(0).sha256


def test_a_part_that_goes_between_opening_and_locking_it(
    cache: DownloadCache, want: Callable[[int], RemoteFile], server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when who makes room takes it for that of a dead process: a lock on a file without a name protects nothing."""
    part, take, taken = cache.folder / f"{want(0).cache_name}.part", cache_module._try_lock, []

    def late(descriptor: int) -> bool:
        if not taken and part.exists():
            part.unlink()
            taken.append(descriptor)
        return take(descriptor)

    monkeypatch.setattr(cache_module, "_try_lock", late)
    assert fetched(cache, want(0)) == (server / "0.tar").read_bytes()
    assert taken and held(cache) == ["0.tar"]


def test_a_copy_that_comes_between_two_looks(
    cache: DownloadCache, want: Callable[[int], RemoteFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(cache, want(0))
    found, looks = cache_module._open_existing, []
    monkeypatch.setattr(cache_module, "_open_existing", lambda *asked: found(*asked) if looks else looks.append(asked))
    monkeypatch.setattr(DownloadCache, "_wait_for_lock", lambda _, file, *__: os.open(file, os.O_RDWR | os.O_CREAT))
    monkeypatch.setattr(DownloadCache, "_download", lambda *_: pytest.fail("it is there"))
    fetched(cache, want(0))
    assert looks and held(cache) == ["0.tar"]


def test_parts_of_the_dead_take_no_room(cache: DownloadCache, want: Callable[[int], RemoteFile]) -> None:
    cache.folder.mkdir()
    for number in (1, 2, 3):
        (cache.folder / f"{want(number).cache_name}.part").write_bytes(bytes(SIZE))
    (cache.folder / "notes.txt").write_bytes(bytes(4 * SIZE))
    fetched(cache, want(0))
    assert sorted(held(cache)) == ["", "0.tar"], "what is not the cache's is neither counted nor removed"


def test_room_that_downloads_under_way_have_taken(tmp_path: Path, want: Callable[[int], RemoteFile]) -> None:
    cache = DownloadCache(tmp_path / "cache", 2 * SIZE - 1, stall_timeout=0.3)
    cache.folder.mkdir()
    part = os.open(cache.folder / f"{want(1).cache_name}.part", os.O_RDWR | os.O_CREAT)
    fcntl.flock(part, fcntl.LOCK_EX)
    os.ftruncate(part, SIZE)
    with pytest.raises(
        CacheFullError, match=r"0.tar does not fit into the cache .* are taken by downloads under way; raise"
    ):
        cache.open_file(want(0))
    os.close(part)
    fetched(cache, want(0))


def test_a_full_disk(cache: DownloadCache, want: Callable[[int], RemoteFile], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=r"0.tar cannot be copied, .* is on a full disk: lower data.cache.gigabytes"):
        cache.open_file(want(0))
    assert held(cache) == []


def test_the_default_folder_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = open_cache(CacheConfig(gigabytes=2.0), 1.0).folder
    assert folder == tmp_path / f"foveal-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(DataError, match="is not yours alone to write to: set data"):
        open_cache(CacheConfig(), 1.0)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(DataError, match="is not yours alone"):
        open_cache(CacheConfig(), 1.0)


def settled(cache: DownloadCache, names: list[str]) -> bool:
    until = time.monotonic() + 5
    while sorted(held(cache)) != names and time.monotonic() < until:
        time.sleep(0.01)
    return sorted(held(cache)) == names


def test_fetching_ahead_takes_no_room_from_what_is_in_use(
    cache: DownloadCache, want: Callable[[int], RemoteFile]
) -> None:
    for number, seconds in ((0, 1000), (1, 30), (2, 1)):
        fetched(cache, want(number))
        age(cache, want(number), seconds)
    Prefetcher(cache).request_files(
        [want(3), want(4), want(5), want(6)]
    )  # of which three would fit into an empty cache
    time.sleep(0.3)
    assert len(held(cache)) == 3
    assert {"1.tar", "2.tar"} < set(held(cache))


def test_fetching_ahead_stops_where_the_cache_ends(
    cache: DownloadCache, want: Callable[[int], RemoteFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes first is needed first, and stays however long the rest takes."""
    monkeypatch.setattr(cache_module, "_PREFETCH_MIN_IDLE", 0.0)
    Prefetcher(cache).request_files([want(number) for number in range(6)])
    time.sleep(0.3)
    assert sorted(held(cache)) == ["0.tar", "1.tar", "2.tar"]


def test_fetching_ahead_notes_what_is_there_as_in_use(cache: DownloadCache, want: Callable[[int], RemoteFile]) -> None:
    for number in (0, 1, 2):
        fetched(cache, want(number))
        age(cache, want(number), 1000 - number)
    Prefetcher(cache).request_files([want(0), want(1), want(3)])
    assert settled(cache, ["0.tar", "1.tar", "3.tar"])


def test_fetching_ahead_says_nothing_of_what_is_not_there(
    cache: DownloadCache, want: Callable[[int], RemoteFile], server: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = want(0)
    (server / "0.tar").unlink()
    Prefetcher(cache).request_files([missing, want(1)])
    until = time.monotonic() + 5
    while "0.tar is not there or may not be read" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    assert "not fetched ahead: file://" in caplog.text
    assert settled(cache, ["1.tar"])
