"""Hugging Face `datasets` folders: written by save_to_disk, or readable by load_dataset."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.pack import pack_hf
from foveal.errors import DataError

NAMES = ["tench", "springer", "church"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The `datasets` library with its cache in a temporary folder."""
    datasets = pytest.importorskip("datasets")
    cache = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield datasets
    datasets.config.HF_DATASETS_CACHE = cache


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (10 * number, 0, 0)).save(stream, "JPEG", quality=40 + number)
    return stream.getvalue()


@pytest.fixture
def make_rows(library: Any) -> Callable[..., Any]:
    """Return a factory of data sets of the rows first..last-1; every fifth row has no label."""

    def make(first: int, last: int, **features: Any) -> Any:
        numbers = range(first, last)
        types = {"image": library.Image(), "label": library.ClassLabel(names=NAMES), "text": library.Value("string")}
        rows = {
            "image": [{"bytes": jpeg(number), "path": f"no.{number}.JPEG"} for number in numbers],
            "label": [-1 if number % 5 == 4 else number % 3 for number in numbers],
            "text": ["even" if number % 2 == 0 else "odd" for number in numbers],
        }
        return library.Dataset.from_dict(rows, features=library.Features(types | features))

    return make


def rows(dataset: Dataset, split: str) -> dict[int, tuple[int, bytes]]:
    """Return (label, image bytes) by the number in the name."""
    index = dataset.shard_index(split, 0)
    return {
        int(index.key(row).rsplit("_", 1)[1]): (
            int(index.labels[row]),
            dataset.read_bytes(index.shard, *index.find_image_offset_size(row)),
        )
        for row in range(len(index))
    }


def opened(folder: Path) -> Dataset:
    return Dataset.open(DataConfig.from_dict({"path": str(folder), "image_size": 8}, "the test"))


def expected(first: int, last: int) -> dict[int, tuple[int, bytes]]:
    return {number: (-1 if number % 5 == 4 else number % 3, jpeg(number)) for number in range(first, last)}


def test_a_saved_set_keeps_splits_classes_and_bytes(tmp_path: Path, library: Any, make_rows: Callable) -> None:
    library.DatasetDict(train=make_rows(0, 12), validation=make_rows(12, 16)).save_to_disk(str(tmp_path / "saved"))
    assert pack_hf(tmp_path / "saved", tmp_path / "out", workers=3)
    dataset = opened(tmp_path / "out")
    assert (dataset.manifest.name, dataset.classes) == ("saved", tuple(NAMES))
    assert list(dataset.manifest.splits) == ["train", "val"]
    assert rows(dataset, "train") == expected(0, 12)
    assert rows(dataset, "val") == expected(12, 16)
    assert not pack_hf(tmp_path / "saved", tmp_path / "out")
    pack_hf(tmp_path / "saved", tmp_path / "again", workers=1)
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_one_set_is_divided(tmp_path: Path, make_rows: Callable) -> None:
    make_rows(0, 20).save_to_disk(str(tmp_path / "saved"))
    pack_hf(tmp_path / "saved", tmp_path / "out", val_fraction=0.25)
    dataset = opened(tmp_path / "out")
    train, val = rows(dataset, "train"), rows(dataset, "val")
    assert train | val == expected(0, 20)
    assert sorted(label for label, _ in val.values()) == [-1, 0, 0, 1, 2]


def test_rows_are_those_that_the_set_shows(tmp_path: Path, make_rows: Callable) -> None:
    """A filtered or shuffled set keeps all rows on disk, with the indices of its own rows."""
    make_rows(0, 12).select([7, 2, 9]).save_to_disk(str(tmp_path / "saved"))
    pack_hf(tmp_path / "saved", tmp_path / "out", val_fraction=0.0)
    packed = rows(opened(tmp_path / "out"), "train")
    assert packed == {number: expected(0, 12)[number] for number in (7, 2, 9)}


def test_a_local_folder_of_parquet_is_read(tmp_path: Path, library: Any, make_rows: Callable) -> None:
    (tmp_path / "local").mkdir()
    make_rows(0, 9).to_parquet(str(tmp_path / "local" / "train-00000-of-00001.parquet"))
    make_rows(9, 12).to_parquet(str(tmp_path / "local" / "test-00000-of-00001.parquet"))
    pack_hf(tmp_path / "local", tmp_path / "out")
    dataset = opened(tmp_path / "out")
    assert dataset.classes == tuple(NAMES)
    assert rows(dataset, "train") == expected(0, 9)
    assert rows(dataset, "test") == expected(9, 12)


def test_files_that_are_named_and_not_stored_are_read(tmp_path: Path, library: Any) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "dog").mkdir()
    for number, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / "images" / name / f"no.{number}.jpg").write_bytes(jpeg(number))
    pack_hf(tmp_path / "images", tmp_path / "out", val_fraction=0.0)
    dataset = opened(tmp_path / "out")
    assert dataset.classes == ("cat", "dog")
    assert rows(dataset, "train") == {0: (0, jpeg(0)), 1: (1, jpeg(1)), 2: (1, jpeg(2))}


def test_a_column_of_texts_names_classes(tmp_path: Path, make_rows: Callable) -> None:
    make_rows(0, 6).save_to_disk(str(tmp_path / "saved"))
    pack_hf(tmp_path / "saved", tmp_path / "out", label_column="text", val_fraction=0.0)
    dataset = opened(tmp_path / "out")
    assert dataset.classes == ("even", "odd")
    assert {number: label for number, (label, _) in rows(dataset, "train").items()} == {at: at % 2 for at in range(6)}


def test_what_cannot_be_packed_is_a_sentence(
    tmp_path: Path, library: Any, make_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_rows(0, 3).save_to_disk(str(tmp_path / "saved"))
    make_rows(0, 3).add_column("other", [None] * 3, feature=library.Image()).save_to_disk(str(tmp_path / "two"))
    make_rows(0, 3).select_columns(["text"]).save_to_disk(str(tmp_path / "text"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no table")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "state.json").write_text("{")
    columns = r"the columns are image \(Image\), label \(ClassLabel\), text \(Value\)"
    for name, options, sentence in (
        ("nowhere", {}, r"nowhere: no such folder"),
        ("saved", {"image_column": "text"}, rf"'text' is no column of type Image; {columns}"),
        ("saved", {"label_column": "lable"}, rf"has no column 'lable'; {columns}"),
        ("two", {}, r"several columns of type Image, image, other: choose with --image-column"),
        ("two", {"image_column": "other"}, r"two: row \d of split 'train' has no image"),
        ("text", {}, r"no column is of type Image; the columns are text \(Value\)"),
        ("broken", {}, r"broken cannot be read by `datasets` \(.*Parquet"),
        ("shards", {}, r"shards cannot be read by `datasets` \(.+\)"),
    ):
        with pytest.raises(DataError, match=sentence):
            pack_hf(tmp_path / name, tmp_path / "out", **options)
    monkeypatch.setattr(library, "load_from_disk", lambda _folder: make_rows(0, 0))
    with pytest.raises(DataError, match=r"saved has no rows"):
        pack_hf(tmp_path / "saved", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"which is not installed: pip install 'foveal\[hf\]'"):
        pack_hf(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()
