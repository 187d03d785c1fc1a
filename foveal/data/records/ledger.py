"""The record of what a run consumed: one row for every slot of every step, as the loop saw it and not as it was planned.

``ledger/attempt-0003.json`` says where an attempt began and what it drew from; ``attempt-0003-rank-0002.rows`` has the
rows of one rank: three int64 (step from 1, the draw that stood there, the draw that took its place or -1), in the order
of its slots. A draw is id + epoch * ids. Rows past the step that a later attempt began at are void.
"""

import json
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from foveal.atomic import AppendLog, write_json
from foveal.data.batch import Batch

FORMAT_VERSION = 1
ROW_DTYPE = np.dtype([("step", "<i8"), ("draw", "<i8"), ("by", "<i8")])


class LedgerWriter:
    """The rows of one rank in one attempt; they reach the disk with ``flush``."""

    def __init__(self, ledger_folder: Path, attempt: int, rank: int) -> None:
        self._rows: list[np.ndarray] = []
        file = ledger_rows_path(ledger_folder, attempt, rank)
        self._file = AppendLog(file, FileIO(file, "xb"))

    def add_batch(self, step: int, batch: Batch) -> None:
        """What one micro-batch of a step held; step counts from 1."""
        rows = np.empty(len(batch.sample_keys), dtype=ROW_DTYPE)
        rows["step"], rows["draw"], rows["by"] = step, batch.sample_keys.cpu().numpy(), -1
        for bad in batch.bad_samples:
            rows[bad.row] = (step, bad.sample_key, bad.replacement_key)
        self._rows.append(rows)

    def flush(self) -> None:
        """Force the rows to disk: a checkpoint that follows finds everything before it written down."""
        rows, self._rows = self._rows, []
        self._file.append(b"".join(each.tobytes() for each in rows))

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._file.close()


def list_attempts(ledger_folder: Path) -> list[int]:
    """The numbers of the attempts that a ledger holds, ascending."""
    return sorted(int(file.stem.removeprefix("attempt-")) for file in ledger_folder.glob("attempt-*.json"))


def begin_attempt(ledger_folder: Path, metadata: dict[str, Any]) -> int:
    """Write down that an attempt begins, on rank 0; its number."""
    ledger_folder.mkdir(parents=True, exist_ok=True)
    number = max(list_attempts(ledger_folder), default=0) + 1
    write_json(attempt_metadata_path(ledger_folder, number), {"format": FORMAT_VERSION} | metadata)
    return number


def read_attempt_metadata(ledger_folder: Path, attempt: int) -> dict[str, Any]:
    """What ``begin_attempt`` wrote."""
    return json.loads(attempt_metadata_path(ledger_folder, attempt).read_text())


def attempt_metadata_path(ledger_folder: Path, attempt: int) -> Path:
    """Where an attempt's facts are."""
    return ledger_folder / f"attempt-{attempt:04d}.json"


def ledger_rows_path(ledger_folder: Path, attempt: int, rank: int) -> Path:
    """Where a rank's rows are."""
    return ledger_folder / f"attempt-{attempt:04d}-rank-{rank:04d}.rows"
