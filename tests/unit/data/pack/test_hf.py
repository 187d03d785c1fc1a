"""Hugging Face `datasets` folders: written by save_to_disk, or readable by load_dataset."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.pack import pack_hf
from foveal.data.pack.record import read_record
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


def rows_by_key(dataset: Dataset) -> list[tuple[int, bytes]]:
    """Return (row number of the key, image bytes) of the training samples."""
    index = dataset.shard_index("train", 0)
    return [
        (int(index.key(row)[:8]), dataset.read_bytes(index.shard, *index.find_image_offset_size(row)))
        for row in range(len(index))
    ]


def said(folder: Path) -> list[str]:
    """Return the notes of a packed folder."""
    record = read_record(folder)
    assert record
    return list(record.notes)


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


def test_missing_parts_are_said_and_parts_of_two_writings_refused(
    tmp_path: Path, library: Any, make_rows: Callable
) -> None:
    (tmp_path / "local" / "data").mkdir(parents=True)
    for number in (0, 2):
        make_rows(number, number + 1).to_parquet(
            str(tmp_path / "local" / "data" / f"train-{number:05d}-of-00003-0123456789abcdef.parquet")
        )
    pack_hf(tmp_path / "local", tmp_path / "out", val_fraction=0.0)
    assert (
        "1 of 3 parts is missing, by the name of data/train-00000-of-00003-0123456789abcdef.parquet: number '1'"
        in said(tmp_path / "out")
    )
    make_rows(0, 2).to_parquet(str(tmp_path / "local" / "data" / "train-00000-of-00001.parquet"))
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet and .* are parts of two writings of one table"):
        pack_hf(tmp_path / "local", tmp_path / "again")


def test_files_that_are_named_and_not_stored_are_read(tmp_path: Path, library: Any) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "dog").mkdir()
    for number, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / "images" / name / f"no.{number}.jpg").write_bytes(jpeg(number))
    pack_hf(tmp_path / "images", tmp_path / "out", val_fraction=0.0)
    dataset = opened(tmp_path / "out")
    assert dataset.classes == ("cat", "dog")
    assert rows(dataset, "train") == {0: (0, jpeg(0)), 1: (1, jpeg(1)), 2: (1, jpeg(2))}


@pytest.mark.parametrize("first", ["int64", "names", "other order"])
def test_splits_whose_labels_have_different_types_are_refused(
    tmp_path: Path, library: Any, make_rows: Callable, first: str
) -> None:
    """Whichever comes first: the names of a ClassLabel would be dropped, or hold for numbers that they do not name."""
    kinds = {"int64": library.Value("int64"), "names": library.ClassLabel(names=NAMES)}
    kinds["other order"] = library.ClassLabel(names=NAMES[::-1])
    second = kinds["int64" if first == "names" else "names"]
    splits = {"train": make_rows(0, 6, label=kinds[first]), "test": make_rows(6, 9, label=second)}
    library.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    sentence = (
        "name the classes of column 'label' differently" if first == "other order" else "ClassLabel in some splits"
    )
    with pytest.raises(DataError, match=sentence):
        pack_hf(tmp_path / "saved", tmp_path / "out", label_column="label")


def test_a_column_of_texts_names_classes(tmp_path: Path, make_rows: Callable) -> None:
    make_rows(0, 6).save_to_disk(str(tmp_path / "saved"))
    pack_hf(tmp_path / "saved", tmp_path / "out", label_column="text", val_fraction=0.0)
    dataset = opened(tmp_path / "out")
    assert dataset.classes == ("even", "odd")
    assert {number: label for number, (label, _) in rows(dataset, "train").items()} == {at: at % 2 for at in range(6)}


def test_labels_of_other_types_are_refused_or_said(tmp_path: Path, library: Any, make_rows: Callable) -> None:
    types = {
        "tags": (
            library.List(library.ClassLabel(names=NAMES)),
            [[0, 2], [], [1]],
            r"\[0, 2\]: .* --label-lists classes",
        ),
        "score": (
            library.Value("float32"),
            [0.5, 1.0, 2.0],
            r"column 'score' holds real numbers, such as 0.5 \(float\)",
        ),
        "object": ({"kind": library.Value("int64")}, [{"kind": 1}] * 3, r"'object' is of type struct<kind: int64>"),
        "when": (library.Value("timestamp[s]"), [0, 1, 2], r"column 'when' is of type timestamp\[s\]"),
        "raw": (library.Value("binary"), [b"a", b"b", b"c"], r"column 'raw' is of type binary"),
    }
    rows = make_rows(0, 3).select_columns(["image"])
    for name, (feature, values, _) in types.items():
        rows = rows.add_column(name, values, feature=library.Features({name: feature})[name])
    rows.save_to_disk(str(tmp_path / "saved"))
    for name, (_, _, sentence) in types.items():
        with pytest.raises(DataError, match=sentence):
            pack_hf(tmp_path / "saved", tmp_path / "out", label_column=name)
    pack_hf(tmp_path / "saved", tmp_path / "out", label_column="tags", label_lists="classes")
    dataset = opened(tmp_path / "out")
    assert (dataset.classes, dataset.manifest.fields) == (tuple(NAMES), ("jpg", "json"))
    assert "task=multilabel" in said(tmp_path / "out")[0]
    pack_hf(tmp_path / "saved", tmp_path / "plain")
    assert "packed without labels: no column is of type ClassLabel, and --label-column" in said(tmp_path / "plain")[0]


def test_a_split_without_labels_and_classes_without_samples_are_said(
    tmp_path: Path, library: Any, make_rows: Callable
) -> None:
    test = make_rows(9, 12).remove_columns("label")
    library.DatasetDict(train=make_rows(1, 3), test=test).save_to_disk(str(tmp_path / "saved"))
    pack_hf(tmp_path / "saved", tmp_path / "out")
    assert [label for label, _ in rows(opened(tmp_path / "out"), "test").values()] == [-1, -1, -1]
    assert said(tmp_path / "out") == [
        "1 of 3 classes has no samples: 'tench'",
        "split 'test': 3 of 3 images have no label",
        "split 'test' has no column 'label' and is packed without labels",
    ]
    library.DatasetDict(train=make_rows(1, 3), test=test.remove_columns("image")).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(DataError, match=r"bare: split 'test' has no column 'image'; the columns are text"):
        pack_hf(tmp_path / "bare", tmp_path / "none")


@pytest.mark.parametrize("stored", ["struct", "binary", "large_binary"])
def test_bytes_without_the_librarys_types_are_images(tmp_path: Path, library: Any, stored: str) -> None:
    cells = [{"bytes": jpeg(number), "path": None} if stored == "struct" else jpeg(number) for number in range(6)]
    table = pa.table({"picture": pa.array(cells, None if stored == "struct" else stored), "y": [0, 1, 2] * 2})
    (tmp_path / "local").mkdir()
    parquet.write_table(table, tmp_path / "local" / "train.parquet")
    pack_hf(tmp_path / "local", tmp_path / "out", label_column="y", val_fraction=0.0)
    index = opened(tmp_path / "out").shard_index("train", 0)
    found = {int(index.key(row)[:8]): int(index.labels[row]) for row in range(6)}
    assert found == {number: number % 3 for number in range(6)}
    assert all(data == jpeg(number) for number, data in rows_by_key(opened(tmp_path / "out")))


def test_one_of_several_columns_of_bytes_is_chosen(tmp_path: Path, library: Any) -> None:
    (tmp_path / "local").mkdir()
    table = pa.table({"left": [jpeg(0)] * 2, "right": [jpeg(1)] * 2})
    parquet.write_table(table, tmp_path / "local" / "train.parquet")
    with pytest.raises(DataError, match=r"several hold bytes, left, right: choose with --image-column"):
        pack_hf(tmp_path / "local", tmp_path / "out")
    assert pack_hf(tmp_path / "local", tmp_path / "out", image_column="right", val_fraction=0.0)
    assert {data for _, data in rows_by_key(opened(tmp_path / "out"))} == {jpeg(1)}


def test_a_saved_format_does_not_change_what_is_packed(tmp_path: Path, make_rows: Callable) -> None:
    make_rows(0, 4).with_format("numpy", columns=["label"]).save_to_disk(str(tmp_path / "saved"))
    pack_hf(tmp_path / "saved", tmp_path / "out", val_fraction=0.0)
    assert rows(opened(tmp_path / "out"), "train") == expected(0, 4)


def test_a_list_of_images_is_refused_by_name(tmp_path: Path, library: Any) -> None:
    features = library.Features({"views": library.List(library.Image())})
    cells = {"views": [[{"bytes": jpeg(0), "path": None}]]}
    library.Dataset.from_dict(cells, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"column 'views' of split 'train' is of type list<.*>: a row holds one image"):
        pack_hf(tmp_path / "saved", tmp_path / "out", image_column="views")


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
        (
            "saved",
            {"image_column": "text"},
            rf"'text' of split 'train' holds texts and is no column of type Image; {columns}",
        ),
        ("saved", {"label_column": "lable"}, rf"has no column 'lable'; {columns}"),
        ("two", {}, r"several columns of type Image, image, other: choose with --image-column"),
        (
            "two",
            {"image_column": "other"},
            r"two: row \d of split 'train' does not decode \(it has no image\): .* with --skip-bad",
        ),
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
