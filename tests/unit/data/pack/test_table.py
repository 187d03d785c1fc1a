"""Tables of paths: CSV and Parquet, names and numbers, with and without splits."""

import unicodedata
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
from foveal.data.image.class_lists import MultiLabelReader
from foveal.data.image.targets import AppliedCrop
from foveal.data.pack import pack_table
from foveal.data.pack.record import read_record
from foveal.errors import ConfigError, DataError

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
    table = write({"image": images * 3, "label": list("aabababbba") * 3})
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


def said(folder: Path) -> list[str]:
    """Return the notes of a packed folder."""
    record = read_record(folder)
    assert record
    return list(record.notes)


def pack(table: Path, **options: Any) -> tuple[Dataset, list[str]]:
    """Pack a table without validation split; return the data set and what was said."""
    out = table.with_name("out")
    assert pack_table(table, out, val_fraction=0.0, **options)
    return opened(out), said(out)


def test_lists_are_members_that_multilabel_training_reads(tmp_path: Path, images: list[str], write: Write) -> None:
    lists = [[2, 0] if number % 2 else [] for number in range(10)]
    dataset, notes = pack(write({"image": images, "y": lists}), label_column="y", label_lists="classes")
    assert (dataset.classes, dataset.manifest.fields) == (("0", "1", "2"), ("json", "png"))
    reader, index = MultiLabelReader("json", dataset.classes or ()), dataset.shard_index("train", 0)
    for row in range(10):
        member = dataset.read_bytes(index.shard, *(index.find_member_offset_size(row, "json") or (0, 0)))
        label = reader.read_label(member, AppliedCrop.whole_image(4, 4), "the test")
        assert label.tolist() == ([1, 0, 1] if int(index.key(row).rsplit("_", 1)[1]) % 2 else [0, 0, 0])
    assert notes == [
        "column 'y': labels are lists, stored in .json members, which task=multilabel reads",
        "column 'y': 1 of 3 classes has no samples: '1'",
    ]


def test_joined_names_are_divided(tmp_path: Path, images: list[str], write: Write) -> None:
    table = write({"image": images, "y": ["dog|cat"] * 9 + ["cat"]})
    dataset, _ = pack(table, label_column="y", label_separator="|")
    assert (dataset.classes, dataset.manifest.fields) == (("cat", "dog"), ("json", "png"))
    with pytest.raises(ConfigError, match=r"label_lists=both: lists of labels hold classes, or are one-hot"):
        pack_table(table, tmp_path / "other", label_column="y", label_lists="both")


@pytest.mark.parametrize("form", ["struct", "bytes", "large", "without path", "categories of paths"])
def test_images_inside_of_parquet(tmp_path: Path, images: list[str], form: str) -> None:
    data = [(tmp_path / name).read_bytes() for name in images]
    cells = {
        "struct": [
            {"bytes": None if number == 3 else data[number], "path": name} for number, name in enumerate(images)
        ],
        "bytes": data,
        "large": pa.array(data, pa.large_binary()),
        "without path": [{"bytes": content, "path": None} for content in data],
        "categories of paths": pa.array(images).dictionary_encode(),
    }[form]
    parquet.write_table(pa.table({"image": cells, "y": list(range(10))}), tmp_path / "t.parquet", row_group_size=4)
    dataset, notes = pack(tmp_path / "t.parquet", label_column="y", workers=3)
    index = dataset.shard_index("train", 0)
    for row in range(10):
        assert dataset.read_bytes(index.shard, *index.find_image_offset_size(row)) == data[index.labels[row]]
    assert not notes
    assert sorted(file.name for file in tmp_path.iterdir()) == ["even", "odd", "out", "t.parquet"]


def test_a_row_without_an_image_is_named_or_skipped(tmp_path: Path, images: list[str]) -> None:
    data = [(tmp_path / name).read_bytes() for name in images]
    parquet.write_table(pa.table({"image": [*data, None], "y": [0, 1] * 5 + [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet: row 11 does not decode \(it has no image\): .* with --skip-bad"):
        pack(tmp_path / "t.parquet", label_column="y")
    pack(tmp_path / "t.parquet", label_column="y", skip_bad=True)
    assert "row 11\tit has no image" in (tmp_path / "out" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ([[b"x"]], r"column 'image' is of type list<.*binary>: a row holds one image"),
        ([1], r"column 'image' is of type int64: an image is a path, its bytes, or a struct"),
        ([None], r"column 'image' is of type null: an image is a path"),
        ([{"width": 3}], r"column 'image' is of type struct<width: int64>"),
    ],
)
def test_columns_that_hold_no_images_are_refused(tmp_path: Path, cells: list[Any], sentence: str) -> None:
    parquet.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=sentence):
        pack_table(tmp_path / "t.parquet", tmp_path / "out")


def test_an_extension_type_is_not_taken_for_the_numbers_that_it_stores(tmp_path: Path, images: list[str]) -> None:
    metadata = {"ARROW:extension:name": "pandas.period", "ARROW:extension:metadata": '{"freq": "M"}'}
    schema = pa.schema([pa.field("image", pa.string()), pa.field("y", pa.int64(), metadata=metadata)])
    parquet.write_table(pa.table({"image": images, "y": range(10)}, schema), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'y' is of the extension type pandas.period"):
        pack_table(tmp_path / "t.parquet", tmp_path / "out", label_column="y")


@pytest.mark.parametrize("separator", [";", "\t", "|", ", "])
def test_a_csv_is_read_with_its_separator(tmp_path: Path, images: list[str], separator: str) -> None:
    lines = ["", f"image{separator}label", *(f'{name}{separator}"{row % 2}"' for row, name in enumerate(images)), ""]
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    dataset, notes = pack(tmp_path / "t.csv", label_column="label")
    assert dataset.classes == ("0", "1")
    assert len(notes) == (separator != ", ")
    assert all("separates the columns" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image,y\neven/no.0.png,great white, a shark\n", r"row 1 has 3 cells, and the first row names 2 columns: put"),
        ("image,y\neven/no.0.png,1\neven/no.2.png\n", r"row 2 has 1 cell, and the first row names 2 columns: complete"),
        ("image,y\neven/no.0.png,1\nodd/no", r"row 2 has 1 cell,"),
        ("image,y,y\neven/no.0.png,1,2\n", r"has 2 columns 'y'"),
        ("even/no.0.png,1\nodd/no.1.png,2\n", r"no column 'image'; its first row names 'even/no.0.png': the first row"),
        (f"image,y\nhttps:/{'/me:secret'}@host/a.jpg,1\n", r"row 1 names https://.*host/a.jpg, a URL, .* download"),
        ("image,y\nC:\\a\\b.png,1\n", r"no such file; see --root; a path of Windows is not known here"),
        ("image,y\neven/no.0,1\n", r"no such file; see --root; there is even/no.0.png: write complete names"),
        (f"image,y\n{'x' * 5000},1\n", r"row 1 names .{200}, and there is no such file"),
        ("image,y\neven/no.0.png,1\n./even/no.0.png,0\n", r"row 2 names .*, as row 1 does with another label: give"),
        ("image,y\neven/no.0.png,1\neven/no.0.png,\n", r"row 2 names .*, as row 1 does with another label"),
    ],
)
def test_rows_that_cannot_be_packed_are_named(tmp_path: Path, images: list[str], text: str, sentence: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=sentence) as caught:
        pack_table(tmp_path / "t.csv", tmp_path / "out", label_column="y")
    assert "secret" not in str(caught.value)


def test_an_image_in_several_rows_is_counted(tmp_path: Path, images: list[str]) -> None:
    rows = [f"{name},{number % 2},train" for number, name in enumerate(images)]
    for split_column, tail in (
        (None, "; copies of an image may be in train and in val"),
        ("part", ", 1 of them in another split"),
    ):
        (tmp_path / "t.csv").write_text("\n".join(["image,y,part", *rows, rows[0], rows[1].replace("train", "test")]))
        out = tmp_path / f"by {split_column}"
        pack_table(tmp_path / "t.csv", out, label_column="y", split_column=split_column)
        assert said(out)[-1] == f"2 rows name the image of an earlier row and are packed again{tail}"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            [1, 2] * 5,
            "label 0 has no samples: labels are 1 to 2, so a model has 3 classes; subtract 1 from every label",
        ),
        ([0, 5, 900, 0, 0, 0, 0, 0, 0, 0], "898 of 901 classes have no samples: '1', '2', '3', '4', '6', ..."),
        ([0, 1, None, 0, 0, 0, 0, 0, 0, 0], "split 'train': 1 of 10 images have no label"),
        ([0] * 10, "there is one class only, '0'"),
        ([-1] * 10, "column 'y': no row has a label"),
        (["Cat", "cat"] * 5, "'Cat' and 'cat'"),
    ],
)
def test_doubtful_classes_are_said(
    tmp_path: Path, images: list[str], write: Write, values: list[Any], sentence: str
) -> None:
    _, notes = pack(write({"image": images, "y": values}), label_column="y")
    assert len(notes) == 1
    assert sentence in notes[0]


def test_other_lists_of_classes_are_another_pack(tmp_path: Path, images: list[str], write: Write) -> None:
    pack(write({"image": images, "y": [[0, 1]] * 10}), label_column="y", label_lists="classes")
    table = write({"image": images, "y": [[0], [1]] * 5})
    with pytest.raises(DataError, match="has changed since, or is another of this name"):
        pack(table, label_column="y", label_lists="classes")


def test_files_are_found_under_other_spellings(tmp_path: Path) -> None:
    composed = "\u00e9.png"
    names = ["a/plain.png", f"a/{unicodedata.normalize('NFD', composed)}", f"b/{composed}"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "t.csv").write_text(
        "\n".join(["image", r"a\plain.png", f"a/{composed}", f"b\\{unicodedata.normalize('NFD', composed)}"])
    )
    dataset, notes = pack(tmp_path / "t.csv")
    assert dataset.manifest.splits["train"].samples == 3
    assert "3 paths, such as 'a\\\\plain.png', are spelled with backslashes or with other Unicode" in notes[0]


def test_a_table_without_label_column_says_so(tmp_path: Path, images: list[str], write: Write) -> None:
    _, notes = pack(write({"image": images, "species": list("ab") * 5}))
    assert len(notes) == 1
    assert "packed without labels: --label-column names their column ('species')" in notes[0]


def test_a_text_for_a_missing_value_is_no_split(tmp_path: Path, images: list[str]) -> None:
    (tmp_path / "t.csv").write_text(f"image,part\n{images[0]},train\n{images[1]},nan\n")
    with pytest.raises(DataError, match=r"row 2 has no text in column 'part'"):
        pack_table(tmp_path / "t.csv", tmp_path / "out", split_column="part")


@pytest.mark.parametrize(
    ("cells", "splits"),
    [
        ([1, 0], ["0", "1"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["False", "True"]),
        (["Training", "PublicTest"], ["train", "PublicTest"]),
    ],
)
def test_splits_that_no_default_names_are_said(
    tmp_path: Path, images: list[str], write: Write, cells: list[Any], splits: list[str]
) -> None:
    pack_table(write({"image": images, "is_train": cells * 5}), tmp_path / "out", split_column="is_train")
    assert list(read_manifest(tmp_path / "out").splits) == splits
    missing = "val" if "train" in splits else "train"
    assert any(f"no split is named '{missing}'" in note and repr(splits[0]) in note for note in said(tmp_path / "out"))


def test_a_split_that_cannot_be_named_has_its_place(tmp_path: Path, images: list[str], write: Write) -> None:
    table = write({"image": images, "part": [0.5] * 10})
    with pytest.raises(DataError, match=r"my.*, column 'part': '0.5' cannot name a split"):
        pack_table(table, tmp_path / "out", split_column="part")
