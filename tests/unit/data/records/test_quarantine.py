"""The quarantine of bad samples and its limits."""

from pathlib import Path

import pytest

from foveal.data.records.quarantine import Quarantine, QuarantineEntry, rewind_entries
from foveal.errors import DataError


def entry(step: int, key: str, split: str = "train") -> QuarantineEntry:
    return {"step": step, "split": split, "shard": "d/a.tar", "key": key, "offset": 512, "reason": "cut short"}


def test_a_sample_stands_in_the_list_once(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(file, {"train": 2}, [])
    quarantine.add_entries([entry(3, "a"), entry(3, "b")], is_writer=True)
    quarantine.add_entries([entry(9, "a")], is_writer=True)
    assert len(quarantine) == 2
    assert rewind_entries(file, 100) == [entry(3, "a"), entry(3, "b")]


def test_a_sample_is_the_same_after_its_set_was_copied_elsewhere(tmp_path: Path) -> None:
    old_entry = entry(3, "a") | {"shard": "before/a.tar"}
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", {"train": 1}, [old_entry])
    quarantine.add_entries([entry(9, "a") | {"shard": "after/a.tar"}], is_writer=True)
    assert len(quarantine) == 1


def test_entries_past_a_resume_are_void(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    Quarantine(file, {"train": 9}, []).add_entries([entry(3, "a"), entry(8, "b")], is_writer=True)
    with file.open("a") as stream:
        stream.write('{"step": 9, "spl')
    assert rewind_entries(file, 5) == [entry(3, "a")]
    Quarantine(file, {"train": 9}, []).add_entries([entry(4, "b\u2028c\x85")], is_writer=True)
    assert rewind_entries(file, 5) == [entry(3, "a"), entry(4, "b\u2028c\x85")]
    assert rewind_entries(file, 3) == [entry(3, "a")]
    assert rewind_entries(file, 100) == [entry(3, "a")]


def test_more_than_allowed_stop_the_run_and_are_written_down_first(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(file, {"train": 2, "val": 0.5}, [entry(1, "a"), entry(1, "b")])
    quarantine.check_limits()
    quarantine.add_entries([entry(2, "b"), entry(2, "c")], is_writer=True)
    with pytest.raises(
        DataError, match=r"3 samples of split 'train' do not decode, and data.max_bad_fraction allows 2; .*'c'"
    ):
        quarantine.check_limits()
    assert [line["key"] for line in rewind_entries(file, 100)] == ["c"]
    val_quarantine = Quarantine(file, {"train": 2, "val": 0.5}, [])
    val_quarantine.add_entries([entry(2, "d", "val")], is_writer=False)
    with pytest.raises(
        DataError, match=r"1 samples of split 'val' do not decode, and data.max_bad_fraction allows 0.5"
    ):
        val_quarantine.check_limits()
