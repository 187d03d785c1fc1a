"""Reuse of an index: it is that of the shard's modification time or ETag, and of nothing else."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foveal.data.format.shard_index import mmap_index, write_index
from foveal.data.indexing.index import index_folder
from foveal.data.storage.folder import LocalFolder

SHARD = "train-0.tar"


@pytest.fixture
def write(tmp_path: Path, write_tar: Callable[..., Path]) -> Callable[[bytes, float], None]:
    """Return a writer of the shard with one label and an age in seconds; its size is always the same."""

    def make(label: bytes, age: float) -> None:
        file = write_tar(tmp_path / SHARD, [("a.jpg", b"x"), ("a.cls", label)])
        time = 1_700_000_000 - age
        os.utime(file, (time, time))

    return make


def index(folder: Path) -> tuple[int, list[str]]:
    """Index a folder; return the label of its sample and the warnings of shards that may have changed."""
    warnings: list[str] = []
    index_folder(str(folder), on_warning=warnings.append)
    label = int(mmap_index(folder / f"{SHARD}.index")[0].labels[0])
    return label, [sentence for sentence in warnings if "modification time" in sentence]


@pytest.mark.parametrize("age", [-1e9, 3600.0, 0.5])
def test_a_corrected_shard_of_equal_size_is_scanned_again(
    tmp_path: Path, write: Callable[[bytes, float], None], age: float
) -> None:
    """`rsync -t`, `cp -p` and `tar -x` give it the time of its source, which may be earlier than that of the index."""
    write(b"1", 0)
    assert index(tmp_path) == (1, [])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "of the wrong shard"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write(b"2", age)
    assert index(tmp_path) == (2, [])
    assert json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]["shards"][0]["sha256"] is None


def test_the_time_is_in_no_digest(tmp_path: Path, write: Callable[[bytes, float], None]) -> None:
    found = []
    for age in (0, 60):
        write(b"1", age)
        index(tmp_path)
        found.append(mmap_index(tmp_path / f"{SHARD}.index"))
    (first, digest), (second, other_digest) = found
    assert first.shard_version != second.shard_version
    assert (first.checksum, digest) == (second.checksum, other_digest)


def test_an_index_of_an_earlier_version_is_to_be_newer_than_its_shard(
    tmp_path: Path, write: Callable[[bytes, float], None]
) -> None:
    write(b"1", 0)
    index(tmp_path)
    file = tmp_path / f"{SHARD}.index"
    write_index(replace(mmap_index(file)[0], shard_version=""), file)
    before = file.read_bytes()
    assert b"shard_version" not in before
    write(b"2", 3600)
    assert index(tmp_path)[0] == 1, "as foveal 0.1 did"
    assert file.read_bytes() == before
    write(b"2", -1e9)
    assert index(tmp_path)[0] == 2


def test_an_etag_stands_for_a_time_and_neither_is_said(
    tmp_path: Path, write: Callable[[bytes, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalFolder, "modified_time", lambda *_: None)
    said = "1 shards have no modification time and no ETag: their indices were reused, because their sizes are the same"
    for etag, label, expected in (("a", b"1", 1), ("a", b"2", 1), ("b", b"3", 3), (None, b"4", 3)):
        monkeypatch.setattr(LocalFolder, "etag", lambda *_, etag=etag: etag)
        write(label, 0)
        found, warnings = index(tmp_path)
        assert found == expected
        assert warnings == ([f"{said}; --again scans them"] if etag is None else [])
