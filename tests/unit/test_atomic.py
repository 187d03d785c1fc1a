"""Atomic files, append logs, and free disk space."""

import ctypes
import errno
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from foveal import atomic
from foveal.atomic import (
    AppendLog,
    best_effort,
    disk_shortage,
    format_bytes,
    free_bytes_and_mount,
    fsync,
    read_json,
    reserve_space,
    write_atomic,
    write_json,
)
from foveal.errors import CheckpointError


def refusing(code: int) -> Callable[[int], None]:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    return fsync


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    write_json(tmp_path / "a", {"é": 1})
    assert (tmp_path / "a").read_text() == '{\n "é": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_system_that_cannot_force_names_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EINVAL))
    fsync(tmp_path)


def test_room_is_asked_of_the_file_system_that_will_hold_it(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    free, mount = free_bytes_and_mount(folder)
    assert mount.is_mount()
    assert tmp_path.is_relative_to(mount)
    assert disk_shortage(folder, 0) is None
    message = disk_shortage(folder, 10 * free)
    assert message is not None
    assert message.startswith(f"{folder} has ")
    assert message.endswith(f"a checkpoint takes {format_bytes(10 * free)}; make room, or set run.dir to another disk")


def test_bytes_are_told_as_disks_are_sold() -> None:
    assert [format_bytes(count) for count in (0, 1_234_567, 99_999_999, 1_390_000_000)] == [
        "0.0 MB",
        "1.2 MB",
        "100.0 MB",
        "1.4 GB",
    ]


# --- append logs ---


def full(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC, room_for: int = 3) -> None:
    """Simulate a full disk: the next write stores ``room_for`` bytes, all later writes fail."""
    write = os.write

    def short(descriptor: int, content: memoryview) -> int:
        count = write(descriptor, content[:room_for])
        monkeypatch.setattr(os, "write", refuse)
        return count

    def refuse(_descriptor: int, _content: memoryview) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", short)


def test_what_a_full_disk_has_no_room_for_comes_later_and_whole(tmp_path: Path, caplog) -> None:
    file = tmp_path / "a.jsonl"
    log = AppendLog(file)
    log.append_json_lines([{"a": 1}])
    with pytest.MonkeyPatch.context() as monkeypatch:
        full(monkeypatch)
        log.append_json_lines([{"a": 2}])
        assert file.read_bytes() == b'{"a": 1}\n', "no part of a line"
        log.append_json_lines([{"a": 3}])
    assert [record.message.partition(" (")[0] for record in caplog.records] == [f"{file}: no room"]
    log.close()
    assert file.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_stream_that_does_not_append_by_itself_leaves_no_hole(tmp_path: Path) -> None:
    file = tmp_path / "a.rows"
    log = AppendLog(file, FileIO(file, "xb"))
    log.append(b"one.")
    with pytest.MonkeyPatch.context() as monkeypatch:
        full(monkeypatch)
        log.append(b"two.")
    log.append(b"three.")
    log.close()
    assert file.read_bytes() == b"one.two.three."


def test_another_fault_of_the_disk_is_raised_and_leaves_no_part(tmp_path: Path, monkeypatch) -> None:
    log = AppendLog(tmp_path / "a.jsonl")
    log.append_json_lines([{"a": 1}])
    full(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        log.append_json_lines([{"a": 2}])
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"a": 1}\n'


def test_a_line_that_a_kill_cut_short_goes_before_the_next_comes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": ')
    AppendLog(file).append_json_lines([{"a": 2}])
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n'
    file.write_text('{"a"')
    AppendLog(file).append_json_lines([{"a": 3}])
    assert file.read_text() == '{"a": 3}\n'


def test_a_file_without_lines_is_not_made(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "a.jsonl")
    log.append_json_lines([])
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_can_do_without_is_let_go_on_a_full_disk_only(caplog) -> None:
    with best_effort("a picture"):
        raise OSError(errno.EDQUOT, "quota")
    assert caplog.messages == ["a picture is not written: quota"]
    with pytest.raises(PermissionError), best_effort("a picture"):
        raise OSError(errno.EACCES, "not yours")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b'"a"', b'{"a":', b"[" * 100_000, b"\xff\xfe", b"\xef\xbb\xbf\xff"]
)
def test_what_is_no_object_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "science.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"science\.json is damaged \(") as caught:
        read_json(tmp_path / "science.json")
    assert "\n" not in str(caught.value)


def test_a_folder_has_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "job.json").mkdir()
    for use in (read_json, lambda file: write_atomic(file, b"{}")):
        with pytest.raises(CheckpointError, match=r"job\.json is a folder, and a file is to be there"):
            use(tmp_path / "job.json")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_reserves_no_space_is_written_to_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS before 4.2. The C library's posix_fallocate would write a byte into every 4 KiB of the file."""

    def refuse(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(atomic, "_C_LIBRARY", SimpleNamespace(fallocate=refuse))
    with (tmp_path / "file").open("wb") as stream:
        reserve_space(stream.fileno(), 1 << 30)
        assert os.fstat(stream.fileno()).st_size == 0


def test_space_is_reserved_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("wb") as stream:
        reserve_space(stream.fileno(), 1 << 20)
        assert os.fstat(stream.fileno()).st_blocks * 512 >= 1 << 20
        with pytest.raises(OSError, match=r"No space left|File too large"):
            reserve_space(stream.fileno(), 1 << 60)
    monkeypatch.setattr(atomic, "_C_LIBRARY", SimpleNamespace())  # as on macOS
    with (tmp_path / "other").open("wb") as stream:
        reserve_space(stream.fileno(), 1 << 20)
