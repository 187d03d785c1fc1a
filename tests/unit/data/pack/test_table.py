"""Tables of paths: CSV and Parquet, names and numbers, with and without splits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import read_manifest
from foveal.data.pack import pack_table
from foveal.data.pack.source import parse_labels
from foveal.errors import DataError

Columns = dict[str, list[Any]]
Write = Callable[[Columns], Path]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Ten images in two folders, with the row number in the name."""
    names = [f"{'even' if number % 2 == 0 else 'odd'}/no.{number}.png" for number in range(10)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name)
    return names


@pytest.fixture(params=["csv", "parquet"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Return a function that writes a table of this format."""

    def csv(columns: Columns) -> Path:
        rows = [columns, *zip(*columns.values(), strict=True)]
        lines = [",".join("" if cell is None else f'"{cell}"' for cell in row) for row in rows]
        (tmp_path / "my.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8-sig")
        return tmp_path / "my.csv"

    def arrow(columns: Columns) -> Path:
        parquet.write_table(pa.table(columns), tmp_path / "my.parquet")
        return tmp_path / "my.parquet"

    return csv if request.param == "csv" else arrow


def opened(folder: Path) -> Dataset:
    return Dataset.open(DataConfig.from_dict({"path": str(folder), "image_size": 8}, "the test"))


def labels(dataset: Dataset, split: str) -> dict[int, int]:
    """Return the label by the number in the file name."""
    index = dataset.shard_index(split, 0)
    return {int(index.key(row).rsplit("_", 1)[1]): int(index.labels[row]) for row in range(len(index))}


def test_names_become_classes_and_splits_are_kept(tmp_path: Path, images: list[str], write: Write) -> None:
    splits = ["validation" if number < 3 else "train" for number in range(10)]
    names = ["zebra, plain" if number % 2 else "ant" for number in range(10)]
    table = write({"file": images, "what": names, "part": splits})
    columns: dict[str, Any] = {"image_column": "file", "label_column": "what", "split_column": "part"}
    assert pack_table(table, tmp_path / "out", **columns, workers=3)
    dataset = opened(tmp_path / "out")
    assert dataset.manifest.name == "my"
    assert dataset.classes == ("ant", "zebra, plain")
    assert list(dataset.manifest.splits) == ["train", "val"]
    assert labels(dataset, "val") == {0: 0, 1: 1, 2: 0}
    assert labels(dataset, "train") == {number: number % 2 for number in range(3, 10)}
    assert not pack_table(table, tmp_path / "out", **columns)


def test_numbers_are_labels_and_an_empty_place_is_none(tmp_path: Path, images: list[str], write: Write) -> None:
    values = [3, 0, None, 3, 0, 3, 0, 3, -1, 3]
    pack_table(write({"image": images, "y": values}), tmp_path / "out", label_column="y", val_fraction=0.0)
    dataset = opened(tmp_path / "out")
    assert dataset.classes == ("0", "1", "2", "3")
    assert labels(dataset, "train") == {row: -1 if label is None else label for row, label in enumerate(values)}


def test_labels_are_optional_and_files_may_lie_elsewhere(tmp_path: Path, images: list[str], write: Write) -> None:
    table = write({"image": images})
    (tmp_path / "far").mkdir()
    table = table.rename(tmp_path / "far" / table.name)
    with pytest.raises(DataError, match=r"row 1 names .*far/even/no.0.png, and there is no such file; see --root"):
        pack_table(table, tmp_path / "out")
    assert pack_table(table, tmp_path / "out", image_root=tmp_path, val_fraction=0.2)
    dataset = opened(tmp_path / "out")
    assert dataset.classes is None
    assert dataset.manifest.fields == ("png",)
    assert {split: len(labels(dataset, split)) for split in ("train", "val")} == {"train": 8, "val": 2}


def test_a_table_of_one_split_is_not_divided(tmp_path: Path, images: list[str], write: Write) -> None:
    pack_table(write({"image": images, "split": ["test"] * 10}), tmp_path / "out", split_column="split")
    assert list(read_manifest(tmp_path / "out").splits) == ["test"]


def test_the_same_table_gives_the_same_bytes(tmp_path: Path, images: list[str], write: Write) -> None:
    table = write({"image": images * 3, "label": list("aab") * 10})
    for workers in (1, 4):
        pack_table(table, tmp_path / str(workers), label_column="label", shard_mb=0.02048, workers=workers, resize=2)
    serial, parallel = ({file.name: file.read_bytes() for file in (tmp_path / workers).iterdir()} for workers in "14")
    assert serial == parallel
    assert len([name for name in serial if name.endswith(".tar")]) > 3


@pytest.mark.parametrize(
    ("columns", "options", "sentence"),
    [
        ({"images": ["x"]}, {}, r"has no column 'image'; did you mean 'images'\?"),
        ({"a": ["x"], "b": ["y"]}, {}, r"has no column 'image'; there are: a, b"),
        ({"image": ["even/no.0.png", None], "y": [1, 2]}, {}, r"row 2 has no text in column 'image'"),
        ({"image": ["even/no.0.png", "gone.png"]}, {}, r"row 2 names .*gone.png, and there is no such file"),
        ({"image": []}, {}, r"has no rows"),
        (
            {"image": ["even/no.0.png"] * 2, "s": ["../up", "train"]},
            {"split_column": "s"},
            r"'../up' cannot name a split",
        ),
        ({"image": ["even/no.0.png"], "y": [-5]}, {"label_column": "y"}, r"column 'y': labels from -5 to -5, .* 0 to"),
    ],
)
def test_tables_that_cannot_be_packed_are_sentences(
    tmp_path: Path, images: list[str], write: Write, columns: Columns, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        pack_table(write(columns), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", b"", r"a table is expected whose name ends in .csv or .parquet"),
        ("a.csv", b"image\n\xff\n", r"a.csv cannot be read \(.*utf-8.*\)"),
        ("a.parquet", b"image\n", r"a.parquet cannot be read \("),
        ("gone.csv", None, r"gone.csv: no such table"),
        ("a.csv", b"", r"a.csv has no column 'image'"),
    ],
)
def test_files_that_are_no_tables_are_sentences(tmp_path: Path, name: str, data: bytes | None, sentence: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=sentence):
        pack_table(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([1, 0], [1, 0], ("0", "1")),
        ([1.0, float("nan")], [1, -1], ("0", "1")),
        (["1", " 0 ", ""], [1, 0, -1], ("0", "1")),
        (["1", "b"], [0, 1], ("1", "b")),
        ([1.5, 0.0], [1, 0], ("0", "1.5")),
        ([True, False], [1, 0], ("False", "True")),
        ([None, "  "], [-1, -1], None),
        ([-1, -1], [-1, -1], None),
    ],
)
def test_what_a_cell_means(values: list[Any], labels: list[int], classes: tuple[str, ...] | None) -> None:
    parsed, names = parse_labels(values, "the test")
    assert (parsed.tolist(), names) == (labels, classes)


def test_numbers_that_are_no_numbering_are_refused() -> None:
    with pytest.raises(DataError, match=r"the test: labels from 7 to 70000000, .* number the classes from 0"):
        parse_labels([7, 70_000_000], "the test")
