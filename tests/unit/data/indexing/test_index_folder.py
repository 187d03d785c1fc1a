"""`foveal data index` on a whole folder: what it takes for a label, what it walks again, what it says."""

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
from foveal.data.indexing import index as indexing
from foveal.data.indexing.index import index_folder
from foveal.errors import DataError

WriteTar = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar, png: bytes) -> Path:
    """Three shards of two samples, written an hour ago."""
    (tmp_path / "set").mkdir()
    for number in range(3):
        members = [
            (f"{key}.{name}", png if name == "png" else b"%d" % number) for key in "ab" for name in ("png", "cls")
        ]
        aged(write_tar(tmp_path / "set" / f"train-{number}.tar", members))
    return tmp_path / "set"


def aged(file: Path) -> Path:
    before = file.stat().st_mtime - 3600
    os.utime(file, (before, before))
    return file


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are walked, sorted."""
    names: list[str] = []
    original = indexing.scan_shard

    def counted(place: Any, file: str, rules: Any) -> ShardIndex:
        names.append(file)
        names.sort()
        return original(place, file, rules)

    monkeypatch.setattr(indexing, "scan_shard", counted)
    return names


def walked(walks: list[str]) -> str:
    """Numbers of the shards that were walked since this was asked last."""
    numbers = "".join(name[6] for name in walks)
    walks.clear()
    return numbers


def test_only_what_changed_is_walked_again(folder: Path, walks: list[str], write_tar: WriteTar, png: bytes) -> None:
    run = partial(index_folder, str(folder))
    first = run()
    written = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.index")}
    assert walked(walks) == "012"
    assert run() == first
    assert walked(walks) == ""
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.index")} == written
    (folder / "train-1.tar.index").unlink()
    torn = folder / "train-2.tar.index"
    torn.write_bytes(torn.read_bytes()[:-1] + b"?")
    assert run() == first
    assert walked(walks) == "12"
    assert {file: file.read_bytes() for file in folder.glob("*.index")} == {
        file: before for file, (before, _) in written.items()
    }
    size = (folder / "train-0.tar").stat().st_size
    write_tar(folder / "train-0.tar", [("x.png", png), ("x.cls", b"7"), ("y.png", png), ("y.cls", b"7")])
    assert (folder / "train-0.tar").stat().st_size == size
    os.utime(folder / "train-0.tar", (2**31, 2**31))  # newer than its index, whatever the clock's grain
    assert run() != first
    assert walked(walks) == "0"
    assert mmap_index(folder / "train-0.tar.index")[0].key(0) == "x"
    aged(folder / "train-0.tar")
    run(rebuild=True)
    assert walked(walks) == "012"
    run(classes=["p", "q", "r", "s", "t", "u", "v", "w"])
    assert walked(walks) == "012"


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, walks: list[str]) -> None:
    whole = (folder / "train-2.tar").read_bytes()
    aged(folder / "train-2.tar").write_bytes(b"no tar" * 500)
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-2.tar is not a tar file"):
            index_folder(str(folder), workers=1)
        assert not (folder / "manifest.json").exists()
    assert walked(walks) == "0122"
    (folder / "train-2.tar").write_bytes(whole)
    assert index_folder(str(folder)).splits["train"].samples == 6
    assert walked(walks) == "2"


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
    known = [shard.sha256 for shard in index_folder(str(folder)).splits["train"].shards]
    assert known == ["train-0.tar", None, "train-2.tar"]
    assert not any(shard.sha256 for shard in index_folder(str(folder), rebuild=True).splits["train"].shards)


def test_labels_from_json(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    entries = {"a": {"label": 2}, "b": {"label": "dog"}, "c": {"label": None}, "d": {}, "e": None}
    members = [(f"{key}.png", png) for key in entries]
    members += [(f"{key}.json", json.dumps(entry).encode()) for key, entry in entries.items() if entry is not None]
    write_tar(tmp_path / "train-0.tar", sorted(members, key=lambda member: member[0]))
    told: list[str] = []
    manifest = index_folder(str(tmp_path), label_key="label", classes=["cat", "dog", "cow"], on_warning=told.append)
    index, _ = mmap_index(tmp_path / "train-0.tar.index")
    assert index.labels.tolist() == [2, 1, -1, -1, -1]
    assert told == ["train: 3 of 5 samples have no class"]
    assert manifest.fields == ("json", "png")
    with pytest.raises(DataError, match=r"no sample has a label 'lable' in its .json: correct --label-key"):
        index_folder(str(tmp_path), label_key="lable")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{", r"train-0.tar: the .json of 'a' is no JSON object"),
        (b"[1]", r"train-0.tar: the .json of 'a' is no JSON object"),
        (b'{"label": [1]}', r"train-0.tar: the label of 'a' is '\[1\]', not a number"),
        (b'{"label": true}', r"train-0.tar: the label of 'a' is 'true', not a number"),
        (b'{"label": 1.5}', r"train-0.tar: the label of 'a' is '1.5', not a number"),
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


def test_the_command_says_what_it_found(folder: Path, write_tar: WriteTar, png: bytes) -> None:
    write_tar(folder / "val-0.tar", [("a.png", png)])
    write_tar(folder / "val-1.tar", [])
    result = CliRunner().invoke(app, ["data", "index", str(folder), "--workers", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "set: members png, cls; 3 classes"
    assert lines[1].split()[:5] == ["train", "6", "samples", "3", "shards"]
    assert lines[-2:] == [f"{folder}/val-1.tar holds no samples: it is left out", "val: 1 of 1 samples have no class"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_request(self, *args: Any) -> None:
        """Not into the output of the tests."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder behind a plain HTTP server, which lists it and ignores ranges."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_shards_behind_http_are_indexed_as_those_in_a_folder(folder: Path, tmp_path: Path, walks: list[str]) -> None:
    here = index_folder(str(folder), tmp_path / "here", name="set")
    walks.clear()
    with served(folder) as url:
        there = index_folder(url, tmp_path / "there", name="set")
        assert walked(walks) == "012"
        assert index_folder(url, tmp_path / "there") == there
        assert walked(walks) == "", "Last-Modified says that nothing changed"
    assert there == here
    for file in (tmp_path / "here").glob("*.index"):
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()
