"""What ``foveal export`` accepts, and the sentence for everything else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from foveal.convert.source import find_source
from foveal.errors import ExportError


def run_with(folder: Path, *exports: str, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "science.json").write_text("{}")
    if finished:
        (folder / "finished.json").write_text("{}")
    for name in exports:
        (folder / name).mkdir(parents=True)
        (folder / name / "card.json").write_text(json.dumps({"format": 1}))
    return folder


def test_an_export_and_the_run_around_it_are_the_same(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "export")
    assert find_source(run).export == find_source(run / "export").export == run / "export"
    assert find_source(run).run == run
    assert find_source(run / "export").run is None


def test_the_one_export_of_several_places_is_taken(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "export/student")
    assert find_source(run).export == run / "export" / "student"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda place: place / "none", r"none does not exist; give the directory of a finished run"),
        (lambda place: (place / "file").touch() or place / "file", r"file is a file; give"),
        (lambda place: place, r"neither a run of foveal's .* nor an export"),
        (lambda place: run_with(place / "run", finished=False), r"an unfinished run; start the run again"),
        (lambda place: run_with(place / "run", "export", finished=False), r"an unfinished run"),
        (lambda place: run_with(place / "run"), r"finished run without an export"),
        (
            lambda place: run_with(place / "run", "export/a", "export/b"),
            r"has several exports; give one of .*export/a, .*export/b",
        ),
        (lambda place: run_with(place / "run", "folds/0/export", "folds/1/export"), r"several exports"),
        (
            lambda place: run_with(place / "run", "export/a", "export/b") / "export",
            r"export holds several exports; give one of .*export/a, .*export/b",
        ),
    ],
)
def test_what_is_no_source_is_said_in_a_sentence(make: Callable[[Path], Path], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=sentence):
        find_source(make(tmp_path))
