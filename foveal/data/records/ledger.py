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

from foveal.atomic import Growing, write_json
from foveal.data.batch import Batch

FORMAT = 1
ROW = np.dtype([("step", "<i8"), ("draw", "<i8"), ("by", "<i8")])


class Ledger:
    """The rows of one rank in one attempt; they reach the disk with ``flush``."""

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self._rows: list[np.ndarray] = []
        file = rows_file(folder, attempt, rank)
        self._file = Growing(file, FileIO(file, "xb"))

    def add(self, step: int, batch: Batch) -> None:
        """What one micro-batch of a step held; step counts from 1."""
        rows = np.empty(len(batch.draws), dtype=ROW)
        rows["step"], rows["draw"], rows["by"] = step, batch.draws.cpu().numpy(), -1
        for bad in batch.bad:
            rows[bad.row] = (step, bad.draw, bad.by)
        self._rows.append(rows)

    def flush(self) -> None:
        """Force the rows to disk: a checkpoint that follows finds everything before it written down."""
        rows, self._rows = self._rows, []
        self._file.add(b"".join(each.tobytes() for each in rows))

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._file.close()


def attempts(folder: Path) -> list[int]:
    """The numbers of the attempts that a ledger holds, ascending."""
    return sorted(int(file.stem.removeprefix("attempt-")) for file in folder.glob("attempt-*.json"))


def begin_attempt(folder: Path, facts: dict[str, Any]) -> int:
    """Write down that an attempt begins, on rank 0; its number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max(attempts(folder), default=0) + 1
    write_json(facts_file(folder, number), {"format": FORMAT} | facts)
    return number


def read_facts(folder: Path, attempt: int) -> dict[str, Any]:
    """What ``begin_attempt`` wrote."""
    return json.loads(facts_file(folder, attempt).read_text())


def facts_file(folder: Path, attempt: int) -> Path:
    """Where an attempt's facts are."""
    return folder / f"attempt-{attempt:04d}.json"


def rows_file(folder: Path, attempt: int, rank: int) -> Path:
    """Where a rank's rows are."""
    return folder / f"attempt-{attempt:04d}-rank-{rank:04d}.rows"
