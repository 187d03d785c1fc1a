"""metrics.jsonl: what is written is on disk, what is void is dropped, what is an earlier attempt's is nobody's."""

import errno
import json
import logging
import os
import time
from pathlib import Path

import pytest
from points import row

from foveal.errors import CheckpointError
from foveal.tracking.jsonl import JsonlTracker, read_rows_without_time
from foveal.tracking.tracker import AttemptState


def use(tracker: JsonlTracker, first: int, last: int, state: AttemptState = "finished") -> None:
    """An attempt, from the first step to the last."""
    tracker.log_settings({"optim.lr": 0.1}, {"ranks": "2"})
    tracker.log_rows([row(step) for step in range(first, last + 1)])
    tracker.log_results_once({"val_top1": 0.5}, last)
    tracker.close(state)


def test_jsonl_drops_what_came_after_the_checkpoint_and_keeps_the_rest_to_the_letter(tmp_path: Path) -> None:
    use(JsonlTracker(tmp_path, 0), 1, 6)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    before = file.stat().st_ino
    JsonlTracker(tmp_path, 4).close("saved-and-left")
    assert file.read_text().splitlines() == lines[:4]
    assert file.stat().st_ino != before
    JsonlTracker(tmp_path, 0).close("saved-and-left")
    assert file.read_text() == ""
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "changed_settings.json",
        "metrics.jsonl",
        "settings.json",
        "tags.json",
    ]


def test_jsonl_forgets_a_line_that_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    use(JsonlTracker(tmp_path, 0), 1, 6)
    whole = file.read_text()
    rows = read_rows_without_time(file)
    for end in (len(whole) - 1, len(whole) - 5, whole.index("\n", 30) + 1, whole.index("\n", 30), 3):
        file.write_text(whole[:end])
        assert read_rows_without_time(file) == rows[: whole[:end].count("\n")]
    file.write_text(whole[:-9])
    tracker = JsonlTracker(tmp_path, 6)
    assert tracker.last_training_row == row(6)
    tracker.log_rows([row(7)])
    tracker.close("finished")
    assert [found["step"] for found in read_rows_without_time(file)] == [1, 2, 3, 4, 5, 6, 7]


def test_rows_have_their_time_and_readers_do_not_see_it(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, 0)
    given = row(1)
    tracker.log_rows([given])
    tracker.log_rows([row(2)])
    assert given == row(1)
    assert read_rows_without_time(tmp_path / "metrics.jsonl") == [row(1), row(2)]
    first, second = (json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 1.7e9 < first <= second
    tracker.close("finished")


def test_a_run_that_goes_back_cuts_its_own_file_and_no_other(tmp_path: Path) -> None:
    file, old = tmp_path / "metrics.jsonl", JsonlTracker(tmp_path, 0)
    old.log_rows([row(step) for step in range(1, 8)])
    old.log_results_once({"val_top1": 0.5}, 6)
    inode = file.stat().st_ino
    old.rewind(4)
    assert old.last_training_row == row(4)
    assert file.stat().st_ino == inode
    old.log_rows([row(5)])
    old.log_results_once({"val_top1": 0.7}, 5)
    assert [found["step"] for found in read_rows_without_time(file)] == [1, 2, 3, 4, 5, 5]
    new = JsonlTracker(tmp_path, 4)
    new.log_settings({}, {"attempt": "2"})
    new.log_rows([row(5)])
    old.log_rows([row(6)])
    old.rewind(0)
    old.close("superseded")
    assert [found["step"] for found in read_rows_without_time(file)] == [1, 2, 3, 4, 5]
    new.close("finished")
    assert json.loads((tmp_path / "tags.json").read_text()) == {
        "attempt": "2",
        "state": "finished",
        "why_stopped": "finished",
    }


def test_what_comes_after_a_run_went_back_is_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the milliseconds of a store, whatever the clock says; of two attempts as of one."""
    now = 1.8e9
    monkeypatch.setattr(time, "time", lambda: now)
    tracker = JsonlTracker(tmp_path, 0)
    tracker.log_rows([row(1), row(2)])
    (tmp_path / "rollbacks.jsonl").write_text(json.dumps({"time": now, "to": 1}) + "\n")
    tracker.rewind(1)
    tracker.log_rows([row(2)])
    tracker.close("failed")
    again = JsonlTracker(tmp_path, 2)
    now -= 60
    again.log_rows([row(3)])
    again.close("finished")
    times = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times == [1.8e9, 1.8e9 + 0.001, 1.8e9 + 0.001]


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """One warning; the rows are there when there is room again, and none is torn."""
    tracker, write, full = JsonlTracker(tmp_path, 0), os.write, [False]

    def writes(descriptor: int, data: bytes) -> int:
        if full[0]:
            write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "no room")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", writes)
    for step in range(1, 7):
        full[0] = step in (3, 4, 5)
        tracker.log_rows([row(step)])
        assert [found["step"] for found in read_rows_without_time(tmp_path / "metrics.jsonl")] == list(
            range(1, 3 if full[0] else step + 1)
        )
    full[0] = True
    tracker.log_rows([row(7), row(8)])
    tracker.rewind(7)
    full[0] = False
    tracker.close("finished")
    assert read_rows_without_time(tmp_path / "metrics.jsonl") == [row(step) for step in range(1, 8)]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2


def test_any_other_trouble_with_the_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = JsonlTracker(tmp_path, 0)

    def fails(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        with pytest.raises(OSError, match="broken"):
            tracker.log_rows([row(1)])
    tracker.close("failed")
    assert read_rows_without_time(tmp_path / "metrics.jsonl") == [row(1)]


@pytest.mark.parametrize("line", ["5", "{}", '{"step": "a"}', "[" * 100_000, "\x00"])
def test_a_damaged_row_is_one_sentence(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged \("):
        read_rows_without_time(tmp_path / "metrics.jsonl")
