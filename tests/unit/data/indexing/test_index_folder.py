"""`foveal data index` on a folder: labels, reuse of indices, output."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveal.cli import app
from foveal.data.format.shard_index import ShardIndex, mmap_index
from foveal.data.indexing import shards as indexing
from foveal.data.indexing.index import index_folder
from foveal.errors import DataError

WriteTar = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar, png: bytes) -> Path:
    """Three shards of two samples, modified an hour ago."""
    (tmp_path / "set").mkdir()
    for number in range(3):
        members = [
            (f"{key}.{name}", png if name == "png" else b"%d" % number) for key in "ab" for name in ("png", "cls")
        ]
        backdate(write_tar(tmp_path / "set" / f"train-{number}.tar", members))
    return tmp_path / "set"


def backdate(file: Path) -> Path:
    """Move a file's modification time one hour back."""
    before = file.stat().st_mtime - 3600
    os.utime(file, (before, before))
    return file


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the scanned shards, sorted."""
    names: list[str] = []
    original = indexing.scan_shard

    def recording_scan(source: Any, file: str, rules: Any) -> ShardIndex:
        names.append(file)
        names.sort()
        return original(source, file, rules)

    monkeypatch.setattr(indexing, "scan_shard", recording_scan)
    return names


def scanned_numbers(scans: list[str]) -> str:
    """Return the numbers of the shards scanned since the last call."""
    numbers = "".join(name[6] for name in scans)
    scans.clear()
    return numbers


def test_only_what_changed_is_walked_again(folder: Path, scans: list[str], write_tar: WriteTar, png: bytes) -> None:
    run = partial(index_folder, str(folder))
    first = run()
    written = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.index")}
    assert scanned_numbers(scans) == "012"
    assert run() == first
    assert scanned_numbers(scans) == ""
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.index")} == written
    (folder / "train-1.tar.index").unlink()
    damaged = folder / "train-2.tar.index"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert run() == first
    assert scanned_numbers(scans) == "12"
    assert {file: file.read_bytes() for file in folder.glob("*.index")} == {
        file: before for file, (before, _) in written.items()
    }
    size = (folder / "train-0.tar").stat().st_size
    write_tar(folder / "train-0.tar", [("x.png", png), ("x.cls", b"7"), ("y.png", png), ("y.cls", b"7")])
    assert (folder / "train-0.tar").stat().st_size == size
    os.utime(folder / "train-0.tar", (2**31, 2**31))  # newer than its index at any time resolution
    assert run() != first
    assert scanned_numbers(scans) == "0"
    assert mmap_index(folder / "train-0.tar.index")[0].key(0) == "x"
    backdate(folder / "train-0.tar")
    run(rebuild=True)
    assert scanned_numbers(scans) == "012"
    run(classes=["p", "q", "r", "s", "t", "u", "v", "w"])
    assert scanned_numbers(scans) == "012"


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, scans: list[str]) -> None:
    data = (folder / "train-2.tar").read_bytes()
    backdate(folder / "train-2.tar").write_bytes(b"no tar" * 500)
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-2.tar is not a tar file"):
            index_folder(str(folder), workers=1)
        assert not (folder / "manifest.json").exists()
    assert scanned_numbers(scans) == "0122"
    (folder / "train-2.tar").write_bytes(data)
    assert index_folder(str(folder)).splits["train"].samples == 6
    assert scanned_numbers(scans) == "2"


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_the_sentence_is_of_the_first_bad_shard_however_many_work(folder: Path, damaged: int) -> None:
    for number in range(damaged, 3):
        (folder / f"train-{number}.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(DataError, match=rf"train-{damaged}.tar is not a tar file"):
        index_folder(str(folder), workers=3)


def test_sha256_stays_while_the_shard_does(folder: Path) -> None:
    index_folder(str(folder))
    tree = json.loads((folder / "manifest.json").read_text())
    for shard in tree["splits"]["train"]["shards"]:
        shard["sha256"] = shard["file"]
    (folder / "manifest.json").write_text(json.dumps(tree))
    os.utime(folder / "train-1.tar", (2**31, 2**31))
    checksums = [shard.sha256 for shard in index_folder(str(folder)).splits["train"].shards]
    assert checksums == ["train-0.tar", None, "train-2.tar"]
    assert not any(shard.sha256 for shard in index_folder(str(folder), rebuild=True).splits["train"].shards)


def test_labels_from_json(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    entries = {"a": {"label": 2}, "f": {"label": "0"}, "b": {"label": "dog"}, "c": {"label": None}, "d": {}, "e": None}
    members = [(f"{key}.png", png) for key in entries]
    members += [(f"{key}.json", json.dumps(entry).encode()) for key, entry in entries.items() if entry is not None]
    write_tar(tmp_path / "train-0.tar", sorted(members, key=lambda member: member[0]))
    warnings: list[str] = []
    manifest = index_folder(str(tmp_path), label_key="label", classes=["cat", "dog", "cow"], on_warning=warnings.append)
    index, _ = mmap_index(tmp_path / "train-0.tar.index")
    assert index.labels.tolist() == [2, 1, -1, -1, -1, 0]
    assert warnings == ["train: 3 of 6 samples have no class"]
    assert manifest.fields == ("json", "png")
    with pytest.raises(DataError, match=r"no sample has a label 'lable' in its .json: correct --label-key"):
        index_folder(str(tmp_path), label_key="lable")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{", r"train-0.tar: the .json of 'a' is no JSON object"),
        (b"[1]", r"train-0.tar: the .json of 'a' is no JSON object"),
        (
            b'{"label": [1]}',
            r"train-0.tar: the label of 'a' is the list \[1\], not one number: .* task=multilabel reads lists",
        ),
        (b'{"label": true}', r"train-0.tar: the label of 'a' is 'true', not a number"),
        (b'{"label": 1.5}', r"train-0.tar: the label of 'a' is '1.5', not a whole number: it is not one of --classes"),
        (b'{"label": 3}', r"train-0.tar: the label of 'a' is 3, and labels are 0 to 1"),
        (b"[" * 100_000, r"train-0.tar: the .json of 'a' is no JSON object"),
    ],
)
def test_json_that_gives_no_label(tmp_path: Path, write_tar: WriteTar, png: bytes, text: bytes, sentence: str) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.png", png), ("a.json", text)])
    with pytest.raises(DataError, match=sentence):
        index_folder(str(tmp_path), label_key="label", classes=["cat", "dog"])


def test_dotted_keys(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    names = ["v1.5/img.001.jpg", "v1.5/img.001.cls", "v1.5/img.001.mask.png", "v1.5/img.002.JPG", "._x.jpg", ".hidden"]
    write_tar(tmp_path / "train-0.tar", [(name, b"3" if name.endswith("cls") else png) for name in names])
    with pytest.raises(DataError, match="if keys have dots, index with --dotted-keys"):
        index_folder(str(tmp_path))
    manifest = index_folder(str(tmp_path), dotted_keys=True)
    index, _ = mmap_index(tmp_path / "train-0.tar.index")
    assert [index.key(row) for row in range(len(index))] == ["v1.5/img.001", "v1.5/img.002"]
    assert manifest.fields == ("jpg", "cls", "mask.png")
    assert index.labels.tolist() == [3, -1]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["mask.png"], "no sample has a class of its whole image; .mask.png may hold labels"),
        (["json", "seg.png"], "no sample has a class of its whole image; .json, .seg.png may hold labels"),
        (["md5"], "no sample has a label, which pretraining and distillation of features do not need"),
        (["mask.png", "cls"], "1 of 2 samples have no class"),
    ],
)
def test_labels_in_other_members_need_no_class(
    tmp_path: Path, write_tar: WriteTar, png: bytes, names: list[str], sentence: str
) -> None:
    members = [(f"{key}.{name}", png) for key in "ab" for name in ["jpg", *names] if (key, name) != ("b", "cls")]
    write_tar(tmp_path / "val-0.tar", [(name, b"0" if name.endswith("cls") else data) for name, data in members])
    warnings: list[str] = []
    index_folder(str(tmp_path), on_warning=warnings.append)
    assert f"val: {sentence}" in warnings, warnings


def test_the_command_says_what_it_found(folder: Path, write_tar: WriteTar, png: bytes) -> None:
    write_tar(folder / "val-0.tar", [("a.png", png)])
    write_tar(folder / "val-1.tar", [])
    result = CliRunner().invoke(app, ["data", "index", str(folder), "--workers", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "set: members png, cls; 3 classes"
    assert lines[1].split()[:5] == ["train", "6", "samples", "3", "shards"]
    assert lines[-2:] == [
        f"{folder}/val-1.tar holds no samples: it is left out",
        "val: no sample has a label, which pretraining and distillation of features do not need",
    ]


class _Quiet(SimpleHTTPRequestHandler):
    def log_request(self, *args: Any) -> None:
        """Keep requests out of the output of the tests."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder over plain HTTP, with a listing and without byte ranges; yield the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_shards_behind_http_are_indexed_as_those_in_a_folder(folder: Path, tmp_path: Path, scans: list[str]) -> None:
    local = index_folder(str(folder), tmp_path / "local", name="set")
    scans.clear()
    with served(folder) as url:
        remote = index_folder(url, tmp_path / "remote", name="set")
        assert scanned_numbers(scans) == "012"
        assert index_folder(url, tmp_path / "remote") == remote
        assert scanned_numbers(scans) == "", "Last-Modified says that nothing changed"
    assert remote == local
    for file in (tmp_path / "local").glob("*.index"):
        index = mmap_index(file)[0]
        assert index.checksum == mmap_index(tmp_path / "remote" / file.name)[0].checksum
        assert index.shard_version == f"modified {(folder / index.shard).stat().st_mtime}"
