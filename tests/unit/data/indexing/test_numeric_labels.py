"""Class names that are numbers: labels of a set are names or positions, whichever shard comes first."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from foveal.data.dataset import open_unchecked_dataset
from foveal.data.format.shard_index import mmap_index
from foveal.data.indexing import shards
from foveal.data.indexing.index import index_folder
from foveal.data.pack.folder import pack_folder
from foveal.data.tools.verify import verify_dataset
from foveal.errors import ConfigError, DataError

WriteTar = Callable[..., Path]
FROM_ONE = tuple(str(number) for number in range(1, 11))
AS_TEXT = tuple(sorted(str(number) for number in range(12)))


@pytest.fixture
def write(tmp_path: Path, write_tar: WriteTar) -> Callable[..., Path]:
    """Return a writer of a folder with one shard for each list of labels."""

    def make(*labels_by_shard: Sequence[object]) -> Path:
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for number, labels in enumerate(labels_by_shard):
            members = [
                (f"{row:02}.{name}", b"x" if name == "jpg" else str(label).encode())
                for row, label in enumerate(labels)
                for name in ("jpg", "cls")
            ]
            write_tar(folder / f"train-{number}.tar", members)
        return folder

    return make


def labels_of(folder: Path) -> list[int]:
    files = sorted(folder.glob("*.index"))
    return [label for file in files for label in mmap_index(file)[0].labels.tolist()]


def quiet(_sentence: str) -> None:
    """Take no notice of warnings."""


@pytest.mark.parametrize(
    ("names", "texts", "labels"),
    [
        (FROM_ONE, [[0, 1], [2, 9]], [0, 1, 2, 9]),
        (FROM_ONE, [[2, 9], [1, 0]], [2, 9, 1, 0]),
        (FROM_ONE, [[1, 2], [10, 3]], [0, 1, 9, 2]),
        (FROM_ONE, [[10], [3, "1.0", "02"]], [9, 2, 0, 1]),
        (AS_TEXT, [[0, 1], [1, 0]], [0, 1, 1, 0]),
        (("-1", "1"), [[-1, 1]], [0, 1]),
        (("cat", "2", "dog"), [["cat", 2], ["dog"]], [0, 1, 2]),
        (("cat", "2", "dog"), [[0, 2, 1, -1]], [0, 2, 1, -1]),
        (("0", "1", "2"), [[0, 1], [2, -1]], [0, 1, 2, -1]),
    ],
)
def test_the_meaning_that_fits_every_label_is_taken(
    write: Callable[..., Path], names: tuple[str, ...], texts: list[list[object]], labels: list[int]
) -> None:
    folder = write(*texts)
    for rebuild in (False, False, True):
        index_folder(str(folder), classes=names, rebuild=rebuild, on_warning=quiet)
        assert labels_of(folder) == labels
    assert not [
        fault
        for fault in verify_dataset(open_unchecked_dataset(str(folder), None), full=True, workers=1)
        if "decode" not in fault
    ]


@pytest.mark.parametrize("texts", [[[1, 2], [3]], [[3], [1, 2]], [[1, 2, 3]]])
def test_where_both_fit_the_option_decides(
    write: Callable[..., Path], texts: list[list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(*texts)
    for _ in range(2):
        with pytest.raises(
            DataError,
            match=r"label 1 may be the class named '1' or the class at position 1, '2': say --numeric-labels names or pos",
        ):
            index_folder(str(folder), classes=FROM_ONE)
        assert not (folder / "manifest.json").exists()
    numbers = [int(str(label)) for shard in texts for label in shard]
    for meaning, shift in (("positions", 0), ("names", 1)):
        index_folder(str(folder), classes=FROM_ONE, numeric_labels=meaning, on_warning=quiet)
        assert labels_of(folder) == [number - shift for number in numbers]
    monkeypatch.setattr(shards, "scan_shard", None)
    for classes in (FROM_ONE, None):
        manifest = index_folder(str(folder), classes=classes, on_warning=quiet)
        assert (manifest.classes, labels_of(folder)) == (FROM_ONE, [number - 1 for number in numbers]), "as before"


@pytest.mark.parametrize("texts", [[[10], [0]], [[0], [10]]])
def test_names_in_one_shard_and_positions_in_another_are_refused(
    write: Callable[..., Path], texts: list[list[object]]
) -> None:
    with pytest.raises(DataError, match=r"'10' is a name and no position, and 0 a position and no name"):
        index_folder(str(write(*texts)), classes=FROM_ONE)


def test_names_and_positions_in_one_shard_are_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"the label of '01' is 0, and is not one of --classes"):
        index_folder(str(write([10, 0])), classes=FROM_ONE)


@pytest.mark.parametrize(
    ("classes", "meaning", "sentence"),
    [
        (None, "names", "--numeric-labels names is for names that are numbers: give them with --classes"),
        (FROM_ONE, "name", "--numeric-labels name: labels are names or positions"),
    ],
)
def test_the_option_needs_names(tmp_path: Path, classes: tuple[str, ...] | None, meaning: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        index_folder(str(tmp_path), classes=classes, numeric_labels=meaning)


def test_a_packed_folder_keeps_its_positions(tmp_path: Path, png: bytes) -> None:
    """The packer writes positions among the sorted names; its manifest says so when the names are given again."""
    for name in AS_TEXT:
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / f"{name}.png").write_bytes(png)
    pack_folder(tmp_path / "images", tmp_path / "out", val_fraction=0.0, workers=1)
    packed = mmap_index(tmp_path / "out" / "train-000000.tar.index")[0]
    before = {packed.key(row): int(packed.labels[row]) for row in range(len(packed))}
    for classes in (None, AS_TEXT, None):
        manifest = index_folder(str(tmp_path / "out"), classes=classes, on_warning=quiet)
        index = mmap_index(tmp_path / "out" / "train-000000.tar.index")[0]
        assert {index.key(row): int(index.labels[row]) for row in range(len(index))} == before
        assert manifest.classes == AS_TEXT
