"""Any content in place of a manifest or an index raises DataError in one line, without delay."""

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.shard_index import mmap_index, write_index
from foveal.data.sampling.sources import build_training_set
from foveal.errors import DataError, StorageUnreachableError

WRONG: list[Any] = ["a", None, -1, 0, 1e400, 10**15, 10**30, [], {}, True, ["a"], 1.5, "", "x" * 300, "a\0b"]


@pytest.fixture
def folder(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits data set that tests damage."""
    shutil.copytree(digits, tmp_path / "copy")
    return tmp_path / "copy"


def read_for_plan(folder: Path, stall_timeout: float = 60.0) -> None:
    """Read the parts of a data set that a training plan reads."""
    tree = {"path": str(folder), "image_size": 8, "channels": 1, "stall_timeout_seconds": stall_timeout}
    cfg = DataConfig.from_dict(tree, "the test")
    dataset = Dataset.open(cfg)
    build_training_set(dataset, cfg, seed=0, batch_size=64)
    dataset.class_counts("train")
    assert dataset.mean, dataset.std


def value_paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; of lists only the first two items."""
    yield path
    for key in tree if isinstance(tree, dict) else range(min(2, len(tree))) if isinstance(tree, list) else ():
        yield from value_paths(tree[key], (*path, key))


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    edited = inner = copy.deepcopy(tree)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return edited


def assert_refused_or_read(folder: Path, case: object) -> None:
    message = ""
    try:
        read_for_plan(folder)
    except DataError as error:
        message = str(error)
    assert "\n" not in message, case


@pytest.mark.parametrize(
    "name", ["manifest.json", "train-000000.tar", "train-000000.tar.index", "train-000003.tar.index"]
)
def test_what_never_answers_is_named_within_the_patience(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    began = time.monotonic()
    with pytest.raises(StorageUnreachableError, match=rf"{name} cannot be read \(no answer within 2.5 s\)"):
        read_for_plan(folder, 2.5)  # which the files beside it keep to, on a busy machine too
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.tar", "train-000000.tar.index"])
def test_a_folder_in_place_of_a_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(DataError, match=name.removesuffix(".index")):
        read_for_plan(folder)


def test_every_value_of_a_manifest_may_be_wrong(folder: Path) -> None:
    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    for path in value_paths(tree):
        for value in WRONG:
            file.write_text(json.dumps(with_value(tree, path, value)))
            assert_refused_or_read(folder, (path, value))


def test_more_samples_than_there_are_bytes(folder: Path) -> None:
    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    train = tree["splits"]["train"]
    train["samples"] += 10**15 - train["shards"][0]["samples"]
    train["shards"][0]["samples"] = 10**15
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"bytes have no room for 1000000000000000 samples"):
        read_for_plan(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\0",
        b"NaN",
        b"9" * 5000,
        b"[]",
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
    ],
)
def test_what_is_no_manifest(text: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_for_plan(folder)


def test_every_value_of_an_index_may_be_wrong(folder: Path) -> None:
    file = folder / "train-000000.tar.index"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = json.loads(header["__metadata__"]["index"])

    def write(header: Any) -> None:
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])

    for path in value_paths(header):
        for value in WRONG:
            write(with_value(header, path, value))
            assert_refused_or_read(folder, (path, value))
    for path in value_paths(metadata):
        for value in WRONG:
            write(header | {"__metadata__": {"index": json.dumps(with_value(metadata, path, value))}})
            assert_refused_or_read(folder, (path, value))


def rewrite_index(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Apply ``change`` to the arrays of the first index and write it; return its file."""
    file = folder / "train-000000.tar.index"
    index, _ = mmap_index(file)
    arrays = {name: getattr(index, name).copy() for name in ("offsets", "sizes", "labels", "key_ends", "keys")}
    change(arrays)
    for name, array in arrays.items():
        object.__setattr__(index, name, array)
    write_index(index, file)
    return file


def test_an_image_outside_of_its_shard(folder: Path) -> None:
    def far(arrays: dict[str, np.ndarray]) -> None:
        arrays["offsets"][0] = 10**15

    index, _ = mmap_index(rewrite_index(folder, far))
    with pytest.raises(
        DataError, match=r"train-000000\.tar: the index has '.*' at byte 1000000000000000, outside of the"
    ):
        index.find_image_offset_size(0)


def test_a_label_beyond_the_classes(folder: Path) -> None:
    def high(arrays: dict[str, np.ndarray]) -> None:
        arrays["labels"][0] = 10**12

    digest = mmap_index(rewrite_index(folder, high))[1]
    tree = json.loads((folder / "manifest.json").read_text())
    tree["splits"]["train"]["shards"][0]["index"] = digest
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"split 'train' has label 1000000000000, and manifest.json has 10 classes"):
        read_for_plan(folder)
