"""Files that are there whole or not at all, and how much room is left for them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from foveal.files import force, free_bytes, in_gigabytes, room, write_json, write_whole


def refusing(code: int) -> Callable[[int], None]:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    return fsync


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    write_json(tmp_path / "a", {"é": 1})
    assert (tmp_path / "a").read_text() == '{\n "é": 1\n}\n'
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_file_system_that_cannot_force_names_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EINVAL))
    force(tmp_path)


def test_room_is_asked_of_the_file_system_that_will_hold_it(tmp_path: Path) -> None:
    place = tmp_path / "not" / "yet"
    free, mount = free_bytes(place)
    assert mount.is_mount()
    assert tmp_path.is_relative_to(mount)
    assert room(place, 0) is None
    said = room(place, 10 * free)
    assert said is not None
    assert said.startswith(f"{place} has ")
    assert said.endswith(f"a checkpoint takes {in_gigabytes(10 * free)}; make room, or set run.dir to another disk")


def test_bytes_are_told_as_disks_are_sold() -> None:
    assert [in_gigabytes(count) for count in (0, 1_234_567, 99_999_999, 1_390_000_000)] == [
        "0.0 MB",
        "1.2 MB",
        "100.0 MB",
        "1.4 GB",
    ]
