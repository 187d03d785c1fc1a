"""`foveal data show`: the class histogram, and a contact sheet with every image above its label."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveal.cli import app
from foveal.data.dataset import open_unchecked_dataset
from foveal.data.indexing.index import index_folder
from foveal.data.tools.show import (
    _CAPTION,
    _COLUMNS,
    _GAP,
    _MISSING,
    _PAPER,
    _SIDE,
    draw_contact_sheet,
    format_class_histogram,
)
from foveal.errors import DataError

WriteTar = Callable[..., Path]


def encode_png(grey: int, size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, grey).save(stream, "PNG")
    return stream.getvalue()


def square(sheet: Image.Image, number: int) -> np.ndarray:
    """Return the cell of an image on a sheet: uint8 [side, side, 3]."""
    left = _GAP + number % _COLUMNS * (_SIDE + _GAP)
    top = _GAP + number // _COLUMNS * (_SIDE + _CAPTION + _GAP)
    return np.asarray(sheet)[top : top + _SIDE, left : left + _SIDE]


def test_every_class_has_a_line_and_a_bar() -> None:
    counts = {"train": np.array([40, 10, 0]), "val": np.array([1_000, 0, 3])}
    assert list(format_class_histogram(counts, ("cat", "big dog", "cow"))) == [
        "class         train         val",
        f"cat              40       1,000  {'#' * 40}",
        f"big dog          10           0  {'#' * 10}",
        "cow               0           3",
    ]


def test_classes_of_masks_and_lists_are_no_table_of_zeros() -> None:
    counts = {"train": np.zeros(3, dtype=np.int64), "val": np.zeros(3, dtype=np.int64)}
    (line,) = format_class_histogram(counts, ("road", "car", "sky"))
    assert line.startswith("no sample has a class of the index;")


def test_of_many_classes_the_ends_are_listed() -> None:
    counts = np.arange(1000)
    lines = list(format_class_histogram({"train": counts}, tuple(f"class {number}" for number in counts)))
    assert len(lines) == 22
    assert lines[1].split()[1:3] == ["999", "999"]
    assert lines[11] == "... 980 classes between ..."
    assert lines[-1] == "class 0             0"


def test_the_sheet_has_images_spread_over_shards_and_classes(tmp_path: Path, write_tar: WriteTar) -> None:
    """Shards sorted by class; the grey level is the class, so that the sheet can be checked."""
    for shard in range(20):
        members = [
            (f"{row:04d}.{name}", encode_png(10 * shard) if name == "png" else b"%d" % shard)
            for row in range(30)
            for name in ("png", "cls")
        ]
        write_tar(tmp_path / f"train-{shard:02d}.tar", members)
    index_folder(str(tmp_path))
    sheet = draw_contact_sheet(open_unchecked_dataset(str(tmp_path), None), "train")
    assert sheet.size == (8 * 134 + 6, 6 * 152 + 6)
    greys = [int(np.median(square(sheet, number))) // 10 for number in range(48)]
    assert greys == sorted(greys)
    assert (greys[0], greys[-1], len(set(greys))) == (0, 19, 12)
    again = draw_contact_sheet(open_unchecked_dataset(f"file://{tmp_path}", None), "train")
    assert sheet.tobytes() == again.tobytes()
    index_folder(str(tmp_path), classes=[f"class {shard}" for shard in range(20)])
    named = draw_contact_sheet(open_unchecked_dataset(str(tmp_path), None), "train")
    assert all((square(named, number) == square(sheet, number)).all() for number in range(48))
    caption = np.s_[_GAP + _SIDE : 2 * _GAP + _SIDE + _CAPTION, :_SIDE]
    assert (np.asarray(named)[caption] < 128).sum() > 2 * (np.asarray(sheet)[caption] < 128).sum(), "names are longer"


def test_small_and_large_and_bad_images_fit(tmp_path: Path, write_tar: WriteTar) -> None:
    sizes = [(8, 8), (300, 100), (5, 90), (1, 1), (128, 128), (4000, 3)]
    members = [(f"{number}.png", encode_png(90, size)) for number, size in enumerate(sizes)]
    write_tar(tmp_path / "train-0.tar", [("x" * 90 + "é\n.png", encode_png(90)[:40]), *members])
    index_folder(str(tmp_path))
    sheet = draw_contact_sheet(open_unchecked_dataset(str(tmp_path), None), "train")
    assert sheet.size == (7 * 134 + 6, 152 + 6)
    assert (square(sheet, 0) == _MISSING).all(axis=-1).mean() > 0.5
    assert (square(sheet, 1) == 90).all()
    assert (square(sheet, 2)[:40] == _PAPER).all()
    assert (square(sheet, 2)[50:78] == 90).all()
    gaps = np.asarray(sheet)[:, 134 : 134 * 7 : 134]
    assert (gaps == _PAPER).all(), "an image or a caption runs into its neighbour"


def test_the_command_draws_a_sheet(digits: Path, tmp_path: Path) -> None:
    run = CliRunner()
    file = tmp_path / "sheet.png"
    result = run.invoke(app, ["data", "show", str(digits), "--sheet", str(file), "--split", "val"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == "digits: members cls, png; 10 classes"
    assert result.output.splitlines()[-1] == f"{file}: written"
    with Image.open(file) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (1078, 918))
    lost = run.invoke(app, ["data", "show", str(digits), "--sheet", str(tmp_path / "no" / "x.png")])
    assert isinstance(lost.exception, DataError)
    with pytest.raises(DataError, match="split 'test' does not exist; splits with samples: 'train', 'val'"):
        draw_contact_sheet(open_unchecked_dataset(str(digits), None), "test")
