"""Files of tables: encodings, and what cannot be read."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from foveal.data.pack.table_file import read_table
from foveal.errors import DataError


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_csv_of_excel_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes("image\tlabel\r\n0.png\tä\r\n".encode(encoding))
    columns = read_table(tmp_path / "t.csv", ["image", "label"], tmp_path).columns
    assert {name: cells.to_pylist() for name, cells in columns.items()} == {"image": ["0.png"], "label": ["ä"]}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_zero_bytes_are_no_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes("image,label\n".encode(encoding))
    with pytest.raises(DataError, match=r"t.csv holds zero bytes, as UTF-16 .* save it as UTF-8"):
        read_table(tmp_path / "t.csv", ["image"], tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", b"", r"a table is expected whose name ends in .csv, .tsv or .parquet"),
        ("a.csv", b"image\n\xff\n", r"a.csv cannot be read \(.*utf-8.*\): save it as UTF-8"),
        ("a.parquet", b"image\n", r"a.parquet cannot be read \("),
        ("", None, r"is a folder: name a table in it, or pack a folder of tables by `foveal data pack hf`"),
        ("gone.csv", None, r"gone.csv: no such table"),
        ("a.csv", b"", r"a.csv has no column 'image'"),
    ],
)
def test_files_that_are_no_tables_are_sentences(tmp_path: Path, name: str, data: bytes | None, sentence: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=sentence):
        read_table(tmp_path / name, ["image"], tmp_path)


def test_images_that_cannot_be_unpacked_are_a_sentence(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [b"x"]}), tmp_path / "t.parquet")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"t.parquet: its images cannot be unpacked to .*file \(.*exists"):
        read_table(tmp_path / "t.parquet", ["image"], tmp_path / "file")
