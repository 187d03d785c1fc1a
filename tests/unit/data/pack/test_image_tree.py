"""Scan of a folder: links, hidden and system files, files of other types."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from foveal.data.pack import image_tree
from foveal.data.pack.image_tree import ImageFolder, PassedOver, scan_folder
from foveal.errors import DataError

Put = Callable[..., Path]


def scan(folder: Path, **options: Path) -> tuple[list[str], dict[str, int]]:
    """Return the images' paths below a folder, and the number of files that are passed over, by reason."""
    passed_over = PassedOver()
    tree = scan_folder(folder, passed_over, **options)
    return sorted(str(file.path.relative_to(folder)) for file in tree.walk()), dict(passed_over.counts)


def test_hidden_and_system_files_are_counted(put: Put) -> None:
    hidden = (".a.png", "._0.png", ".ipynb_checkpoints/0.png", ".ipynb_checkpoints/deep/1.png", ".DS_Store")
    system = (
        "@eaDir/0.png/THUMB_M.png",
        "__MACOSX/0.png",
        "lost+found/0.png",
        "Thumbs.db",
        "DESKTOP.INI",
        "#recycle/0.png",
    )
    folder = put("in", "cat/0.png", *(f"cat/{name}" for name in (*hidden, *system)))
    assert scan(folder) == (["cat/0.png"], {"hidden files": 5, "system files": 6})


def test_files_of_other_types_are_counted_and_named(put: Put) -> None:
    others = ("a/notes.txt", "a/list.CSV", "a/README", "a/1.heic", "a/2.JP2", "a/3.avif")
    folder = put("in", "a/0.PNG", "a/1.JPEG", "a/2.jfif", *others)
    os.mkfifo(folder / "a" / "pipe.png")
    passed_over = PassedOver()
    tree = scan_folder(folder, passed_over)
    assert len(list(tree.walk())) == 3
    assert passed_over.describe() == (
        "images of formats that are not read: 3 (.heic, .jp2, .avif); files that are no images: 3 (README, .csv, .txt); "
        "neither files nor folders: 1 (pipe.png)"
    )


def test_a_folder_with_the_name_of_an_image_is_a_folder(put: Put) -> None:
    assert scan(put("in", "cat/0.jpg/1.png")) == (["cat/0.jpg/1.png"], {})


def test_links_are_followed_and_circles_are_not(put: Put, tmp_path: Path) -> None:
    folder = put("in", "cat/0.png")
    put("elsewhere", "1.png", "deep/2.png")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "cat" / "self").symlink_to("self")
    (folder / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "elsewhere" / "deep" / "again").symlink_to(tmp_path / "elsewhere")
    images, counts = scan(folder)
    assert set(images) >= {"cat/0.png", "cat/linked.png", "cat/more/2.png", "dog/1.png", "dog/deep/2.png"}
    assert counts == {"links to a folder above": 3, "broken links": 1}


def test_the_output_is_no_part_of_the_source(put: Put) -> None:
    folder = put("in", "cat/0.png", "out/1.png")
    assert scan(folder, leave_out=folder / "out")[0] == ["cat/0.png"]


def test_a_folder_that_cannot_be_read_is_named(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put("in", "cat/0.png", "dog/0.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(image_tree.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"in/dog cannot be read \(Permission denied\)"):
        scan(folder)


def test_filled_folders_hold_images_at_any_depth(put: Put) -> None:
    tree = scan_folder(put("in", "a/b/0.png", "c/notes.txt"), PassedOver())
    assert isinstance(tree, ImageFolder)
    assert [folder.name for folder in tree.filled_folders] == ["a"]
