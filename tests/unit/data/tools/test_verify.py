"""`foveal data verify`: finds and names every kind of damage; an undamaged set has no faults."""

import hashlib
import itertools
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveal.cli import app
from foveal.data.dataset import open_unchecked_dataset
from foveal.data.format.manifest import read_manifest
from foveal.data.format.shard_index import ShardIndex, write_index
from foveal.data.indexing.index import build_shard_index, index_folder
from foveal.data.tools import verify as verifying
from foveal.data.tools.verify import verify_dataset
from foveal.errors import DataError

WriteTar = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar, png: bytes) -> Path:
    """Two shards for training and one for validation, of five labelled samples each; sha256 recorded."""
    (tmp_path / "set").mkdir()
    for name in ("train-0", "train-1", "val-0"):
        members = [(f"{k}.{field}", png if field == "png" else b"1") for k in "abcde" for field in ("png", "cls")]
        write_tar(tmp_path / "set" / f"{name}.tar", members)
    index_folder(str(tmp_path / "set"))
    assert verify(tmp_path / "set", record=True) == []
    return tmp_path / "set"


def verify(folder: Path, *, full: bool = False, record: bool = False, url: bool = False) -> list[str]:
    """Return the faults, without the folder in front."""
    path = f"file://{folder}" if url else str(folder)
    faults = verify_dataset(
        open_unchecked_dataset(path, str(folder)), full=full, workers=2, record_missing_checksums=record
    )
    return [fault.replace(f"{path}/", "").replace(f"{folder}/", "") for fault in faults]


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree)
    (folder / "manifest.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_whole_set_has_nothing_wrong(digits: Path, folder: Path, full: bool, url: bool) -> None:
    assert verify(folder, full=full, url=url) == []
    assert verify(digits, full=full, url=url) == []


def test_sha256_are_recorded_once(folder: Path) -> None:
    for split in read_manifest(folder).splits.values():
        for shard in split.shards:
            assert shard.sha256 == hashlib.sha256((folder / shard.file).read_bytes()).hexdigest()
    edit(folder, lambda tree: tree["splits"]["train"]["shards"][0].update(sha256=None))
    flip(folder / "train-1.tar", 600)  # the manifest has its sha256: only --full compares it
    assert verify(folder, record=True) == []
    sha256s = [shard.sha256 for shard in read_manifest(folder).splits["train"].shards]
    assert sha256s[0] == hashlib.sha256((folder / "train-0.tar").read_bytes()).hexdigest()
    assert sha256s[1] != hashlib.sha256((folder / "train-1.tar").read_bytes()).hexdigest()
    edit(folder, lambda tree: tree["splits"]["train"]["shards"][0].update(sha256=None))
    assert verify(folder, full=True, record=True)
    assert read_manifest(folder).splits["train"].shards[0].sha256 is None, "a damaged set gets no new sha256"


def rewritten(folder: Path, change: Callable[[ShardIndex], None]) -> None:
    """Write an index of train-0 that is a valid file and does not match its shard."""
    index = build_shard_index(str(folder), "train-0.tar")
    change(index)
    write_index(index, folder / "train-0.tar.index")
    update = {"index": index.compute_samples_digest()}
    edit(folder, lambda tree: tree["splits"]["train"]["shards"][0].update(update))


def shifted(index: ShardIndex) -> None:
    index.offsets[2] += 512


def relabelled(index: ShardIndex) -> None:
    index.labels[2] = 0


def beyond(index: ShardIndex) -> None:
    index.labels[2:] = 2


FAST = {
    "missing": (
        lambda folder: (folder / "train-1.tar").unlink(),
        r"train-1.tar is missing, and manifest.json lists it",
    ),
    "longer": (
        lambda folder: (folder / "train-0.tar").write_bytes((folder / "train-0.tar").read_bytes() + b"x"),
        r"train-0.tar has 20481 bytes and manifest.json says 20480",
    ),
    "no index": (lambda folder: (folder / "train-0.tar.index").unlink(), r"train-0.tar.index is missing: run"),
    "other index": (
        lambda folder: (
            shutil.copy(folder / "train-0.tar", folder / "x-0.tar")
            and edit(folder, lambda tree: tree["splits"]["train"]["shards"][0].update(index="0" * 64))
        ),
        r"train-0.tar.index is not the index that manifest.json was written with: run",
    ),
    "index of another shard": (
        lambda folder: shutil.copy(folder / "train-1.tar.index", folder / "train-0.tar.index"),
        r"train-0.tar: its index was made from train-1.tar of 20480 bytes",
    ),
    "index damaged": (
        lambda folder: flip(folder / "train-0.tar.index", (folder / "train-0.tar.index").stat().st_size - 60),
        r"train-0.tar: its index is damaged, its checksum does not match its content",
    ),
    "labels": (
        lambda folder: rewritten(folder, beyond),
        r"train-0.tar: 3 labels are not among the 2 classes of manifest.json, the first is 2, of 'c'",
    ),
    "fields": (
        lambda folder: edit(folder, lambda tree: tree.update(fields=["png"])),
        r"train-0.tar: manifest.json does not list its members cls",
    ),
}


@pytest.mark.parametrize("kind", FAST)
def test_what_shows_without_reading_the_shards(folder: Path, kind: str) -> None:
    damage, sentence = FAST[kind]
    damage(folder)
    faults = verify(folder)
    assert len(faults) == (3 if kind == "fields" else 1)
    assert faults[0].startswith(sentence.removesuffix(": run"))
    assert "\n" not in faults[0]


FULL = {
    "image": (lambda folder: flip(folder / "train-0.tar", 512 * 9 + 45), r"the image of 'c' does not decode \(.+\)"),
    "name": (lambda folder: flip(folder / "train-0.tar", 512 * 4), r"train-0.tar is damaged after byte 2048"),
    "padding": (lambda folder: flip(folder / "train-0.tar", 9000), r"sha256 is [0-9a-f]{64} and manifest.json says"),
    "offsets": (
        lambda folder: rewritten(folder, shifted),
        r"its members or labels are not those that its index was made from",
    ),
    "labels": (
        lambda folder: rewritten(folder, relabelled),
        r"its members or labels are not those that its index was made from",
    ),
}


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("kind", FULL)
def test_what_shows_only_in_full(folder: Path, kind: str, url: bool) -> None:
    damage, sentence = FULL[kind]
    damage(folder)
    assert verify(folder, url=url) == []
    faults = verify(folder, full=True, url=url)
    assert any(fault.startswith("train-0.tar") and "\n" not in fault for fault in faults)
    assert any(re.search(sentence, fault) for fault in faults), faults


def test_a_cut_shard_is_wrong_as_long_as_it_is_cut(folder: Path) -> None:
    data = (folder / "train-1.tar").read_bytes()
    (folder / "train-1.tar").write_bytes(data[: 512 * 18])
    index_folder(str(folder))
    faults = verify(folder)
    assert len(faults) == 1
    assert faults[0].startswith(
        "train-1.tar is cut short after byte 9216: its first 4 samples are indexed, without 'e'"
    )


def test_images_of_one_shard_are_decoded_in_parallel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads must decode images of one shard at once, or the barrier times out."""
    monkeypatch.setattr(verifying, "_IMAGES_PER_JOB", 1)
    edit(folder, lambda tree: tree["splits"]["train"]["shards"].pop())
    edit(folder, lambda tree: tree["splits"]["train"].update(samples=5))
    edit(folder, lambda tree: tree["splits"].pop("val"))
    barrier = threading.Barrier(2, timeout=60)
    calls = itertools.count()
    original = verifying.decode_image

    def decode(data: bytes, channels: int, bit_depth: int | None) -> Any:
        if next(calls) < 2:
            barrier.wait()
        return original(data, channels, bit_depth=bit_depth)

    monkeypatch.setattr(verifying, "decode_image", decode)
    assert verify(folder, full=True) == []


def test_the_command_exits_with_1_and_the_list(folder: Path) -> None:
    run = CliRunner()
    undamaged = run.invoke(app, ["data", "verify", str(folder), "--full"])
    assert (undamaged.exit_code, undamaged.output) == (
        0,
        f"{folder}: 15 samples in 3 shards are as the manifest says, and every image decodes\n",
    )
    edit(folder, lambda tree: [shard.pop("sha256") for shard in tree["splits"]["train"]["shards"]])
    without_sha256 = run.invoke(app, ["data", "verify", str(folder)])
    assert without_sha256.output.endswith(
        "as the manifest says; the manifest has no sha256 for 2 shards, --record writes it\n"
    )
    assert run.invoke(app, ["data", "verify", str(folder), "--record"]).output.endswith("as the manifest says\n")
    flip(folder / "train-1.tar", 512 * 9 + 45)
    (folder / "val-0.tar").unlink()
    damaged = run.invoke(app, ["data", "verify", str(folder), "--full"])
    assert damaged.exit_code == 1
    assert [line.split("/")[-1][:11] for line in damaged.output.splitlines()] == [
        "train-1.tar",
        "train-1.tar",
        "val-0.tar i",
    ]
    nowhere = run.invoke(app, ["data", "verify", str(folder / "nowhere")])
    assert isinstance(nowhere.exception, DataError)


def test_a_manifest_behind_a_url_is_not_written(folder: Path) -> None:
    with pytest.raises(DataError, match=r"is a URL, manifest.json can only be written into a folder: copy it first"):
        verify_dataset(
            open_unchecked_dataset(f"file://{folder}", None), full=False, workers=1, record_missing_checksums=True
        )
