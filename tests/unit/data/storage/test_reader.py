"""Shard readers: transient errors are retried, permanent errors raise DataError with the shard's name."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.storage import reader
from foveal.errors import DataError

Open = Callable[..., Dataset]


@pytest.fixture
def folder(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits data set that tests damage."""
    return shutil.copytree(digits, tmp_path / "copy")


@pytest.fixture(params=["", "file://"])
def opened(request: pytest.FixtureRequest, folder: Path, configure: Callable[..., DataConfig], tmp_path: Path) -> Open:
    """Open the copy by its path, and by a URL through a cache."""

    def make(**settings: object) -> Dataset:
        cache = {"dir": str(tmp_path / "cache")}
        url = f"{request.param}{folder}"
        return Dataset.open(configure(path=url, cache=cache, stall_timeout_seconds=4.0, **settings))

    return make


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_WAITS", (0.01, 0.01))


def make_pread_fail(monkeypatch: pytest.MonkeyPatch, times: int, number: int) -> list[int]:
    """Make the first ``times`` calls of pread fail with errno ``number``; return the list of requested descriptors."""
    requests: list[int] = []
    pread = os.pread

    def read(descriptor: int, size: int, offset: int) -> bytes:
        requests.append(descriptor)
        if len(requests) <= times:
            raise OSError(number, os.strerror(number))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", read)
    return requests


def open_files() -> list[str]:
    """Return the open files of this process; a removed file ends in ` (deleted)`."""
    paths = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            paths.append(str(link.readlink()))
    return paths


def test_a_read_that_fails_for_a_moment(folder: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened()
    expected = (folder / "train-000000.tar").read_bytes()[100:600]
    assert dataset.read_bytes("train-000000.tar", 100, 500) == expected
    requests = make_pread_fail(monkeypatch, 1, errno.ESTALE)
    opens, true_open = [], os.open
    monkeypatch.setattr(
        os, "open", lambda file, *args, **kwargs: opens.append(str(file)) or true_open(file, *args, **kwargs)
    )
    assert dataset.read_bytes("train-000000.tar", 100, 500) == expected
    assert len(requests) == 2
    assert any(file.endswith("train-000000.tar") for file in opens), "the old descriptor is stale"


def test_a_read_that_fails_for_good(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened()
    make_pread_fail(monkeypatch, 99, errno.EIO)
    with pytest.raises(DataError, match=r"copy/train-000000.tar cannot be read \(.*Input/output error\)$"):
        dataset.read_bytes("train-000000.tar", 0, 10)


def test_a_read_beyond_the_end(opened: Open) -> None:
    size = opened().manifest.splits["train"].shards[0].bytes
    with pytest.raises(
        DataError, match=rf"train-000000.tar is cut short: 20 bytes at {size - 5} are asked for, 5 left"
    ):
        opened().read_bytes("train-000000.tar", size - 5, 20)


def test_a_shard_that_went_away(folder: Path, configure: Callable[..., DataConfig]) -> None:
    dataset = Dataset.open(configure(path=str(folder)))
    (folder / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000.tar cannot be read \(\[Errno 2\] No such file"):
        dataset.read_bytes("train-000000.tar", 0, 10)


def test_more_shards_than_stay_open(folder: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 2)
    dataset = opened()
    files = [shard.file for shard in dataset.manifest.splits["train"].shards]
    dataset.read_bytes(files[0], 0, 10)
    before = len(open_files())
    for file in files * 2:
        assert dataset.read_bytes(file, 0, 512) == (folder / file).read_bytes()[:512]
    assert len(open_files()) <= before + 1


def test_a_shard_is_vouched_for_once(folder: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, digests = opened(), []
    sha256 = reader.sha256
    monkeypatch.setattr(reader, "sha256", lambda file: digests.append(file) or sha256(file))
    for _ in range(2):
        dataset.verify_checksum_once("train", 1)
    assert len(digests) == 1
    assert dataset.shard_display_path("train", 1).endswith(f"{folder}/train-000001.tar")


def test_damage_after_the_start(folder: Path, opened: Open, tmp_path: Path) -> None:
    dataset = opened()
    dataset.read_bytes("train-000001.tar", 0, 10)
    shards = [*folder.glob("train-000001.tar"), *(tmp_path / "cache").glob("*train-000001.tar")]
    damaged = shards[-1]  # the copy in the cache, if any
    with damaged.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff" * 8)
    with pytest.raises(DataError, match=r"train-000001.tar( in .*cache)? (is|was) damaged"):
        dataset.verify_checksum_once("train", 1)
    if len(shards) == 2:
        assert not damaged.exists()
        assert dataset.read_bytes("train-000001.tar", 1000, 8) == (folder / "train-000001.tar").read_bytes()[1000:1008]
        dataset.verify_checksum_once("train", 1)


def test_a_manifest_without_digests_vouches_for_anything(folder: Path, opened: Open) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text("".join(line for line in text.splitlines(True) if '"sha256"' not in line))
    opened().verify_checksum_once("train", 1)


def test_an_evicted_copy_is_let_go_and_fetched_again(folder: Path, opened: Open, tmp_path: Path) -> None:
    dataset = opened()
    dataset.read_bytes("train-000001.tar", 0, 10)
    for copy in (tmp_path / "cache").glob("*train-000001.tar"):
        copy.unlink()
    expected = (folder / "train-000001.tar").read_bytes()
    assert dataset.read_bytes("train-000001.tar", 512, 100) == expected[512:612]
    assert not any("train-000001.tar (deleted)" in name for name in open_files())


def test_damaged_and_foreign_indices(folder: Path, configure: Callable[..., DataConfig], tmp_path: Path) -> None:
    """A downloaded index is verified byte for byte, and the error names the URL."""
    file = folder / "train-000002.tar.index"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    cfg = configure(path=f"file://{folder}", cache={"dir": str(tmp_path / "cache")})
    url = f"file://{folder}/train-000002.tar.index"
    with pytest.raises(DataError, match=rf"^{url} is damaged: 5 downloads brought wrong bytes \({url} is damaged, its"):
        Dataset.open(cfg).shard_index("train", 2)
    shutil.copy(folder / "train-000003.tar.index", file)
    with pytest.raises(DataError, match=rf"{url} is not the index that manifest.json was written with"):
        Dataset.open(cfg).shard_index("train", 2)


def test_bytes_that_arrive_move_the_pulse(folder: Path, configure: Callable[..., DataConfig], tmp_path: Path) -> None:
    cfg = configure(path=f"file://{folder}", cache={"dir": str(tmp_path / "cache")})
    dataset = Dataset.open(cfg)
    assert dataset.download_counter() == 0
    dataset.prefetch_shards("train", [3])
    dataset.read_bytes("train-000003.tar", 0, 10)
    assert dataset.download_counter() >= dataset.manifest.splits["train"].shards[3].bytes
    assert Dataset.open(configure(path=str(folder))).download_counter() == 0
