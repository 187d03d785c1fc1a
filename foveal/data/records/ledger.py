"""Ledger of consumed samples: one row per slot and step, written from the batches that the training loop received.

``ledger/attempt-0003.json`` has the first step and the data of an attempt; ``attempt-0003-rank-0002.rows`` has the rows
of one rank in the order of its slots: three int64 (step from 1, sample key of the slot, sample key of its replacement
or -1). A sample key is id + epoch * number of ids. Rows past the start of a later attempt are void.
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
    """Writer of one rank's rows in one attempt; rows are buffered until ``flush``."""

    def __init__(self, ledger_folder: Path, attempt: int, rank: int) -> None:
        self._rows: list[np.ndarray] = []
        file = ledger_rows_path(ledger_folder, attempt, rank)
        self._file = AppendLog(file, FileIO(file, "xb"))

    def add_batch(self, step: int, batch: Batch) -> None:
        """Buffer the rows of one microbatch of a step; steps count from 1."""
        rows = np.empty(len(batch.sample_keys), dtype=ROW_DTYPE)
        rows["step"], rows["draw"], rows["by"] = step, batch.sample_keys.cpu().numpy(), -1
        for bad_sample in batch.bad_samples:
            rows[bad_sample.row] = (step, bad_sample.sample_key, bad_sample.replacement_key)
        self._rows.append(rows)

    def flush(self) -> None:
        """Force the rows to disk; before a checkpoint, so that the ledger has every step that the checkpoint has."""
        microbatches, self._rows = self._rows, []
        self._file.append(b"".join(rows.tobytes() for rows in microbatches))

    def close(self) -> None:
        """Flush the buffered rows and close the file."""
        self.flush()
        self._file.close()


def list_attempts(ledger_folder: Path) -> list[int]:
    """Return the numbers of the attempts in a ledger, ascending."""
    return sorted(int(file.stem.removeprefix("attempt-")) for file in ledger_folder.glob("attempt-*.json"))


def begin_attempt(ledger_folder: Path, metadata: dict[str, Any]) -> int:
    """Write the metadata of a new attempt and return its number; called on rank 0."""
    ledger_folder.mkdir(parents=True, exist_ok=True)
    number = max(list_attempts(ledger_folder), default=0) + 1
    write_json(attempt_metadata_path(ledger_folder, number), {"format": FORMAT_VERSION} | metadata)
    return number


def read_attempt_metadata(ledger_folder: Path, attempt: int) -> dict[str, Any]:
    """Read the metadata that ``begin_attempt`` wrote."""
    return json.loads(attempt_metadata_path(ledger_folder, attempt).read_text())


def attempt_metadata_path(ledger_folder: Path, attempt: int) -> Path:
    """Return the file of an attempt's metadata."""
    return ledger_folder / f"attempt-{attempt:04d}.json"


def ledger_rows_path(ledger_folder: Path, attempt: int, rank: int) -> Path:
    """Return the file of a rank's rows."""
    return ledger_folder / f"attempt-{attempt:04d}-rank-{rank:04d}.rows"
