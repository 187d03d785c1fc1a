"""The ledger, and its audit, which reads nothing but the ledger."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks, stage_named

from foveal.data.batch import BadSample, Batch
from foveal.data.records.audit import audit_epochs, find_first_differing_step, format_audit_report, open_ledger
from foveal.data.records.ledger import ROW_DTYPE, LedgerWriter, begin_attempt, ledger_rows_path
from foveal.errors import DataError

SAMPLES, BATCH = 20, 4
Rows = dict[int, list[int]]  # step: the sample keys in its slots


def change_source(run: Path, changes: dict) -> None:
    file = run / "ledger" / "attempt-0001.json"
    tree = json.loads(file.read_text())
    tree["sources"][0] |= changes
    file.write_text(json.dumps(tree))


def make_batch(planned_keys: list[int], bad_samples: tuple[BadSample, ...] = ()) -> Batch:
    labels = torch.tensor(planned_keys)
    keys = labels.clone()
    for bad in bad_samples:
        keys[bad.row] = bad.replacement_key
    images = torch.zeros(len(planned_keys), 1, 2, 2)
    return Batch(images, labels, keys % SAMPLES, keys, labels >= 0, 0, 0, 0, bad_samples)


def write(
    run: Path, start: int, steps: Rows, ranks: int = 2, microbatches: int = 1, bad: tuple[BadSample, ...] = ()
) -> Path:
    """Write the ledger of one attempt; ``bad`` are in the first microbatch of the first rank's first step."""
    source = {"path": "/nowhere", "index": None, "split": "train", "samples": SAMPLES, "digest": ""}
    metadata = {"start": start, "skipped": [], "ranks": ranks, "batch": BATCH, "steps_per_epoch": 5}
    attempt = begin_attempt(run / "ledger", metadata | {"sources": [source]})
    for rank in range(ranks):
        ledger = LedgerWriter(run / "ledger", attempt, rank)
        rows_per_rank = BATCH // ranks
        size = rows_per_rank // microbatches
        for position, (step, keys) in enumerate(steps.items()):
            rank_keys = keys[rank * rows_per_rank : (rank + 1) * rows_per_rank]
            for number in range(microbatches):
                is_first = (position, rank, number) == (0, 0, 0)
                batch = make_batch(rank_keys[number * size : (number + 1) * size], bad if is_first else ())
                ledger.add_batch(step, batch)
        ledger.close()
    return run


def epochs(steps: int, seed: int = 0) -> Rows:
    """Epochs of 5 steps with every sample once."""
    rng = np.random.default_rng(seed)
    keys = np.concatenate([epoch * SAMPLES + rng.permutation(SAMPLES) for epoch in range(-(-steps // 5))])
    return {step + 1: keys[step * BATCH : (step + 1) * BATCH].tolist() for step in range(steps)}


def test_every_epoch_is_counted(tmp_path: Path) -> None:
    audits = audit_epochs(open_ledger(write(tmp_path, 0, epochs(12))))
    assert [(audit.epoch, audit.samples_by_times_seen) for audit in audits] == [
        (0, (0, 20, 0, 0)),
        (1, (0, 20, 0, 0)),
        (2, (12, 8, 0, 0)),
    ]
    assert not any(audit.duplicate_split_positions or audit.num_replaced for audit in audits)


def test_a_sample_seen_twice_is_named(tmp_path: Path) -> None:
    rows = epochs(5)
    rows[4][1] = rows[2][0]
    lines, passes = format_audit_report(write(tmp_path, 0, rows), None)
    assert not passes
    assert f"  sample {rows[2][0]} of split 'train' in epoch 0, at the steps 2, 4" in lines
    (audit,) = audit_epochs(open_ledger(tmp_path))
    assert audit.samples_by_times_seen == (1, 18, 1, 0)


@pytest.mark.parametrize("place", [{"index": "$NOT_SET_ANYWHERE"}, {"path": "digits"}])
def test_a_duplicate_is_said_where_its_name_is_not_to_be_had(tmp_path: Path, digits: Path, place: dict) -> None:
    """The index path needs a variable that is not set here; or the path now holds other data."""
    rows = epochs(5)
    rows[4][1] = rows[2][0]
    change_source(write(tmp_path, 0, rows), place | ({"path": str(digits)} if "path" in place else {}))
    lines, passes = format_audit_report(tmp_path, None)
    assert not passes
    assert lines[-1] == f"  sample {rows[2][0]} of split 'train' in epoch 0, at the steps 2, 4"


def test_an_epoch_that_comes_again_later_is_not_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveal.data.records.audit._ROWS_PER_READ", 8)
    rows = epochs(10)
    rows |= {step: rows[step - 10] for step in range(11, 16)}
    lines, passes = format_audit_report(write(tmp_path, 0, rows), None)
    assert not passes
    assert lines[-1].startswith("epoch 0 came again after it was over")


def test_no_file_is_kept_open(tmp_path: Path) -> None:
    """A run on 64 ranks with 20 attempts has more files than a process may open."""
    rows = epochs(5)
    for step in range(5):
        write(tmp_path, step, {step + 1: rows[step + 1]}, ranks=4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    (audit,) = audit_epochs(open_ledger(tmp_path))
    assert audit.samples_by_times_seen == (0, 20, 0, 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_stand_in_is_no_duplicate(tmp_path: Path) -> None:
    rows = epochs(5)
    bad = BadSample(1, rows[1][1], rows[3][0], "train", "s", "k", 0, "cut")
    (audit,) = audit_epochs(open_ledger(write(tmp_path, 0, rows, bad=(bad,))))
    assert audit.samples_by_times_seen == (1, 19, 0, 0)
    assert (audit.num_replaced, audit.num_replacements, audit.duplicate_split_positions) == (1, 1, ())


def test_rows_past_a_resume_are_void(tmp_path: Path) -> None:
    rows = epochs(20)
    write(tmp_path / "killed", 0, {step: rows[step] for step in range(1, 9)})
    wrong = {step: [(key + 1) % SAMPLES for key in rows[step]] for step in range(7, 16)}
    write(tmp_path / "killed", 6, wrong, ranks=4)
    write(tmp_path / "killed", 6, {step: rows[step] for step in range(7, 21)}, ranks=1, microbatches=4)
    write(tmp_path / "reference", 0, rows, ranks=2, microbatches=2)
    killed, reference = open_ledger(tmp_path / "killed"), open_ledger(tmp_path / "reference")
    assert [(attempt.after_step, attempt.last_step) for attempt in killed.attempts] == [(0, 6), (6, 20)]
    assert find_first_differing_step(killed, reference) is None
    lines, passes = format_audit_report(tmp_path / "killed", tmp_path / "reference")
    assert passes
    assert lines[-1].endswith("in the steps 1 to 20 that both have")


@pytest.mark.parametrize("step", [1, 7, 20])
def test_one_slot_that_differs_is_found(tmp_path: Path, step: int) -> None:
    rows = epochs(20)
    write(tmp_path / "one", 0, rows)
    rows[step][2], rows[step][3] = rows[step][3], rows[step][2]  # the same samples in other slots
    write(tmp_path / "other", 0, rows, ranks=4)
    assert find_first_differing_step(open_ledger(tmp_path / "one"), open_ledger(tmp_path / "other")) == step
    lines, passes = format_audit_report(tmp_path / "one", tmp_path / "other")
    assert not passes
    assert lines[-1].endswith(f"step {step} is the first that consumed other samples")


def test_what_a_kill_tore_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, epochs(10))
    file = ledger_rows_path(tmp_path / "ledger", 1, 1)
    file.write_bytes(file.read_bytes()[: -ROW_DTYPE.itemsize - 5])
    assert open_ledger(tmp_path).last_step == 9


def test_rows_that_must_be_there_are_missed(tmp_path: Path) -> None:
    rows = epochs(10)
    write(tmp_path, 0, {step: rows[step] for step in range(1, 6)})
    write(tmp_path, 5, {step: rows[step] for step in range(6, 11)})
    file = ledger_rows_path(tmp_path / "ledger", 1, 1)
    data, row_size = file.read_bytes(), ROW_DTYPE.itemsize
    file.write_bytes(data[:-row_size])
    with pytest.raises(DataError, match=r"has no rows of the steps 5 to 5: files are missing"):
        open_ledger(tmp_path)
    file.write_bytes(data[: 2 * row_size] + data[4 * row_size :] + data[: 2 * row_size])
    with pytest.raises(DataError, match=r"attempt-0001-rank-0001.rows is damaged"):
        audit_epochs(open_ledger(tmp_path))


def test_no_ledger_and_nothing_to_compare_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no ledger: train with data.ledger=true"):
        open_ledger(tmp_path)
    (tmp_path / "comparison" / "trials").mkdir(parents=True)
    with pytest.raises(DataError, match=r"audit one of .*comparison/trials"):
        open_ledger(tmp_path / "comparison")
    first_run, second_run = write(tmp_path / "one", 0, epochs(3)), write(tmp_path / "other", 3, epochs(6) | {})
    metadata = second_run / "ledger" / "attempt-0001.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"batch": 8}))
    with pytest.raises(DataError, match=r"damaged|batches of 4"):
        format_audit_report(first_run, second_run)


def test_other_data_is_not_identical(tmp_path: Path) -> None:
    first_run, second_run = write(tmp_path / "one", 0, epochs(3)), write(tmp_path / "other", 0, epochs(3))
    change_source(second_run, {"digest": "another"})
    with pytest.raises(DataError, match=r"are of other data"):
        format_audit_report(first_run, second_run)


def test_steps_of_an_attempt_without_a_ledger_are_missed(
    one_rank: Ranks, configs: dict[str, Path], tmp_path: Path
) -> None:
    """Rows past the checkpoint that an attempt without a ledger resumed from are void too."""
    run = tmp_path / "run"

    def train(stop: int, *, ledger: bool) -> None:
        overrides = ["engine.kind=plain", "checkpoint.every=5", f"run.stop_at_step={stop}"]
        overrides.append(f"data.ledger={str(ledger).lower()}")
        one_rank.train(stage_named("pretrain"), configs["pretrain"], run, *overrides)

    train(10, ledger=True)
    shutil.rmtree(next((run / "checkpoints").glob("step-00000010-*")))
    train(10, ledger=False)
    assert open_ledger(run).last_step == 5
    train(15, ledger=True)
    with pytest.raises(DataError, match=r"has no rows of the steps 6 to 10"):
        open_ledger(run)
