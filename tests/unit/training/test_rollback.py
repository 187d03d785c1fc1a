"""Refused updates: counted in a row, rolled back without their batches, and given up at the limit."""

import json
from pathlib import Path

import pytest
import torch

from foveal.errors import CheckpointError, TrainingDivergedError
from foveal.training.config import RecoveryConfig
from foveal.training.rollback import RollbackController, read_rollbacks


def observe(recovery: RollbackController, step: int, *, applied: bool) -> bool:
    """Add the update of a step, read it, and return whether the run has to roll back."""
    recovery.add_update(step, torch.tensor(applied))
    assert recovery.read_updates(step) == ([] if applied else [step])
    return recovery.is_due


def refused(recovery: RollbackController, *steps: int) -> list[bool]:
    return [observe(recovery, step, applied=False) for step in steps]


def test_only_refusals_in_a_row_count(tmp_path: Path) -> None:
    recovery = RollbackController(tmp_path, RecoveryConfig(rollback_after_skips=3), [], [])
    assert refused(recovery, 5, 6) == [False, False]
    assert not recovery.last_update_applied
    assert not observe(recovery, 7, applied=True)
    assert recovery.last_update_applied
    assert refused(recovery, 8, 9, 10) == [False, False, True]


@pytest.mark.parametrize("steps_in_flight", [0, 1, 8])
def test_a_streak_ends_where_it_does_however_late_it_is_read(steps_in_flight: int, tmp_path: Path) -> None:
    """The steps after it, applied or refused, are void: nobody reads them, and their batches are not skipped."""
    recovery = RollbackController(tmp_path, RecoveryConfig(rollback_after_skips=2), [], [])
    refused_steps = []
    for step in range(1, 12):
        recovery.add_update(step, torch.tensor(step not in (2, 4, 5, 6, 8)))
        refused_steps += recovery.read_updates(step - steps_in_flight)
        assert recovery.is_due == (step - steps_in_flight >= 5)
    refused_steps += recovery.read_updates(11)
    assert refused_steps == [2, 4, 5]
    recovery.record_rollback_or_raise(3, is_writer=True)
    assert recovery.skipped_batches == [3, 4]
    assert recovery.read_updates(11) == [] and not recovery.is_due


def test_going_back_passes_over_the_refused_batches(tmp_path: Path) -> None:
    """Step 8 takes batch 7 (steps count from 1, batches from 0), or batch 8 after a skipped batch."""
    recovery = RollbackController(tmp_path, RecoveryConfig(rollback_after_skips=2), [3], [])
    refused(recovery, 8, 9)
    recovery.record_rollback_or_raise(4, is_writer=True)
    assert recovery.skipped_batches == [3, 8, 9]
    assert recovery.last_update_applied
    refused(recovery, 8, 9)  # the same steps, on the batches after the skipped ones
    recovery.record_rollback_or_raise(4, is_writer=True)
    assert recovery.skipped_batches == [3, 8, 9, 10, 11]
    assert [entry["batches"] for entry in read_rollbacks(tmp_path)] == [[8, 9], [10, 11]]


def test_a_run_that_is_killed_after_going_back_remembers_it(tmp_path: Path) -> None:
    recovery = RollbackController(tmp_path, RecoveryConfig(rollback_after_skips=1, max_rollbacks=1), [], [])
    refused(recovery, 2)
    recovery.record_rollback_or_raise(0, is_writer=True)
    with (tmp_path / "rollbacks.jsonl").open("a") as stream:
        stream.write('{"time": 1, "to": 0, "batc')  # a kill in the middle of a line
    again = RollbackController(
        tmp_path, RecoveryConfig(rollback_after_skips=1, max_rollbacks=1), [], read_rollbacks(tmp_path)
    )
    assert again.skipped_batches == [1]
    refused(again, 2)
    with pytest.raises(TrainingDivergedError, match=r"in the 1 steps 2 to 2, after 1 roll-backs"):
        again.record_rollback_or_raise(0, is_writer=True)
    more = RollbackController(
        tmp_path, RecoveryConfig(rollback_after_skips=1, max_rollbacks=2), [], read_rollbacks(tmp_path)
    )
    refused(more, 3)
    more.record_rollback_or_raise(0, is_writer=True)
    assert [entry["batches"] for entry in read_rollbacks(tmp_path)] == [[1], [3]], (
        "a record after half a line would be unreadable"
    )


def test_one_rank_writes(tmp_path: Path) -> None:
    for is_writer in (False, True):
        recovery = RollbackController(tmp_path, RecoveryConfig(rollback_after_skips=1), [], [])
        refused(recovery, 1)
        recovery.record_rollback_or_raise(0, is_writer=is_writer)
    lines = (tmp_path / "rollbacks.jsonl").read_text().splitlines()
    assert [json.loads(line)["refused"] for line in lines] == [[1]]


@pytest.mark.parametrize(
    "text", ["[]", "5", '{"to": 3}', '{"batches": "all"}', '{"batches": ["a"]}', "[" * 100_000, "\x00"]
)
def test_a_damaged_journal_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "rollbacks.jsonl").write_text(text + "\n")
    with pytest.raises(CheckpointError, match=r"rollbacks\.jsonl is damaged"):
        read_rollbacks(tmp_path)


def test_a_folder_in_place_of_the_journal(tmp_path: Path) -> None:
    (tmp_path / "rollbacks.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"rollbacks\.jsonl is a folder"):
        read_rollbacks(tmp_path)
