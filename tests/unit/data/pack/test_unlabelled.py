"""Images without labels, and selections of paths: several folders, globs, lists of files."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import Manifest, read_manifest
from foveal.data.pack import image_sources, pack_folder
from foveal.data.pack.image_sources import find_sources
from foveal.data.pack.record import read_record
from foveal.errors import ConfigError, DataError

Put = Callable[..., Path]


def images_of(*folders: str, count: int = 2) -> list[str]:
    return [f"{folder}/{number}.png" for folder in folders for number in range(count)]


def pack(source: Any, out: Path, **options: Any) -> tuple[Manifest, dict[str, int], str]:
    """Pack images; return the manifest, the samples per split, and the summary in one text."""
    assert pack_folder(source, out, **options)
    manifest, record = read_manifest(out), read_record(out)
    assert record is not None
    return manifest, {name: split.samples for name, split in manifest.splits.items()}, "\n".join(record.summary)


@pytest.mark.parametrize(
    ("names", "options", "counts", "labels", "splits"),
    [
        (
            images_of(".", count=10),
            {},
            {"train": 9, "val": 1},
            "no sub-folders: images without",
            "10 % of the images, dr",
        ),
        (
            images_of(".", "2024/jan"),
            {"labels": "none", "val_fraction": 0},
            {"train": 4},
            "none, as stated",
            "all images",
        ),
        (images_of(".", count=2), {}, {"train": 2}, "no sub-folders", "10 % of the images is less than one image"),
        (images_of("train", "val"), {}, {"train": 2, "val": 2}, "no class folders in the splits", "train, val, by the"),
        (
            images_of("train/a/b", "dev/c"),
            {"labels": "none"},
            {"train": 2, "val": 2},
            "none, as",
            "val is 'dev', by the",
        ),
        (
            images_of("a/x", "b/x"),
            {"labels": "none", "splits": "train=a,val=b"},
            {"train": 2, "val": 2},
            "none",
            "as stated",
        ),
        (
            images_of("f0/x", "f0/y", "f1/x", "f1/y"),
            {"labels": "none", "val_fraction": 0},
            {"train": 8},
            "none",
            "all images",
        ),
    ],
)
def test_images_without_labels_have_no_classes(
    put: Put,
    tmp_path: Path,
    names: list[str],
    options: dict[str, Any],
    counts: dict[str, int],
    labels: str,
    splits: str,
) -> None:
    manifest, packed, summary = pack(put("in", *names, ".x.png"), tmp_path / "out", **options)
    assert packed == counts and manifest.classes is None and manifest.fields == ("png",)
    lines = dict(line.split(": ", 1) for line in summary.splitlines())
    assert list(lines) == ["source", "labels", "splits", "passed over", "sizes"]
    assert labels in lines["labels"] and splits in lines["splits"]
    assert lines["passed over"] == "hidden files: 1 (.x.png)" and lines["sizes"].startswith("2 x 2 pixels")
    dataset = Dataset.open(DataConfig.from_dict({"path": str(tmp_path / "out"), "image_size": 2}, "the test"))
    assert (dataset.labels("train") == -1).all()


def test_the_option_may_repeat_what_is_understood(put: Put, tmp_path: Path) -> None:
    """The record knows shards with classes from those without, and the same images by other words."""
    flat, classes = put("flat", *images_of(".")), put("classes", *images_of("cat", "dog"))
    pack(flat, tmp_path / "a")
    pack(classes, tmp_path / "b")
    assert not pack_folder(flat, tmp_path / "a", labels="none")
    assert not pack_folder(find_sources([Path(f"{flat}/*.png")]), tmp_path / "a")
    assert not pack_folder(classes, tmp_path / "b", labels="folders")
    with pytest.raises(DataError, match=r"b was packed with classes, and \S+classes is now read without \(--labels\)"):
        pack_folder(classes, tmp_path / "b", labels="none")
    with pytest.raises(DataError, match=r"flat holds 2 images and no class folders, which --labels folders reads"):
        pack_folder(flat, tmp_path / "c", labels="folders")
    with pytest.raises(ConfigError, match=r"--labels table: `foveal data pack table TABLE --label-column"):
        pack_folder(flat, tmp_path / "c", labels="table")


def test_selections_of_paths_are_one_tree(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = put("in", *images_of("cat", "dog", "bird/wings"), "cat/2.PNG", "cat/.3.png", "@eaDir/4.png")
    (root / "notes.txt").write_text("no image")
    monkeypatch.chdir(root)
    listed = "\n".join(["cat/0.png", f"{root}/dog/1.png", "notes.txt", "bird", "cat/0.png", "@eaDir/4.png", ""])
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + listed.replace("\n", "\r\n").encode())
    stdin = io.TextIOWrapper(io.BytesIO(b"cat/0.png\0dog/1.png\0"))
    monkeypatch.setattr(image_sources.sys, "stdin", stdin)
    selections = {
        "glob": (find_sources([Path("**/*.png")]), 6, "given as '**/*.png'"),
        "one level": (find_sources([Path("*/[01].png")]), 4, "given as '*/[01].png'"),
        "folders": (
            find_sources([Path("cat"), Path("bird"), Path("dog/0.png")]),
            6,
            "folders (2) and single files (1)",
        ),
        "list": (find_sources([], str(tmp_path / "list.txt")), 2, "given as listed files (6)"),
        "stdin": (find_sources([], "-"), 2, "given as listed files (2)"),
    }
    passed_over = {
        "glob": "images that the pattern does not match: 1 (2.PNG)",
        "folders": "hidden files: 1 (.3.png)",
        "list": "files that are no images: 1 (.txt); folders in place of files: 1 (bird); images that are named again: 1 (0.png); "
        "system files: 1 (4.png)",
    }
    for name, (sources, count, description) in selections.items():
        with pytest.raises(
            DataError, match=r"in: the images lie in several folders, .* --labels none .* --labels folders"
        ):
            pack_folder(sources, tmp_path / name)
        _, packed, summary = pack(sources, tmp_path / name, labels="none", val_fraction=0)
        assert packed == {"train": count} and description in summary
        assert f"passed over: {passed_over.get(name, 'nothing')}\n" in summary
    manifest, _, _ = pack(find_sources([Path("cat"), Path("dog")]), tmp_path / "classes", labels="folders")
    assert manifest.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("paths", "listed", "sentence"),
    [
        (["gone"], None, r"gone: no such folder of images"),
        (["a", "gone"], None, r"gone cannot be read \(No such file"),
        (["a/*.jpg"], None, r"a/\*\.jpg: no image has a name of this pattern"),
        (["b/**/*.png"], None, r"b/\*\*/\*\.png: no image has a name of this pattern"),
        ([], b"a/0.png\ngone.png\n", r"list.txt: \S+gone.png cannot be read \(No such file"),
        ([], b"\n", r"--files-from \S+list.txt names no files"),
        ([], "a".encode("utf-16"), r"is UTF-16: save it as UTF-8"),
    ],
)
def test_paths_that_are_not_there_are_sentences(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], listed: bytes | None, sentence: str
) -> None:
    monkeypatch.chdir(put("in", "a/0.png"))
    if listed is not None:
        (tmp_path / "list.txt").write_bytes(listed)
    with pytest.raises(DataError, match=sentence):
        pack_folder(
            find_sources(list(map(Path, paths)), None if listed is None else str(tmp_path / "list.txt")),
            tmp_path / "out",
        )


def test_no_source_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no images are named: give a folder"):
        find_sources([])
    with pytest.raises(DataError, match=r"--files-from \S+ cannot be read \(No such file"):
        find_sources([], str(tmp_path / "gone.txt"))
