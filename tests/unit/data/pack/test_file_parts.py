"""Parts of tables: what is missing by their names, and parts of two writings."""

from pathlib import Path

import pytest

from foveal.data.pack.file_parts import describe_missing_parts, describe_other_parts
from foveal.errors import DataError


@pytest.mark.parametrize(
    ("name", "beside", "notes"),
    [
        ("train-00000-of-00002.parquet", [], ["the table is part 0 of 2, by its name, and no other part is packed"]),
        ("train-00000-of-00001.parquet", ["test-00000-of-00001.parquet"], []),
        (
            "00000.csv",
            ["00001.csv", "00002.parquet"],
            ["tables beside it differ in a number only and are not packed: '00001.csv'"],
        ),
        ("train.csv", ["val.csv"], []),
    ],
)
def test_one_part_of_a_table_says_so(tmp_path: Path, name: str, beside: list[str], notes: list[str]) -> None:
    for other in beside:
        (tmp_path / other).touch()
    found = describe_other_parts(tmp_path / name)
    assert len(found) == len(notes)
    assert all(sentence in note for sentence, note in zip(notes, found, strict=True))


def test_parts_are_counted_from_0_or_1(tmp_path: Path) -> None:
    def describe(*names: str) -> list[str]:
        return describe_missing_parts(tmp_path, [tmp_path / name for name in names])

    assert not describe(
        "a-00001-of-00002.arrow", "a-00002-of-00002.arrow", "b-00000-of-00001.arrow", "image_1_of_3.png"
    )
    assert "1 of 3 parts is missing, by the name of 1of3.csv: number '2'" in describe("1of3.csv", "3of3.csv")
    with pytest.raises(DataError, match=r"a-0-of-2.csv and a-00000-of-2.csv are parts of two writings"):
        describe("a-0-of-2.csv", "a-00000-of-2.csv")
