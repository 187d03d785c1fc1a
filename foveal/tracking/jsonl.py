"""``metrics.jsonl``: one JSON object a step, in the run directory, before anything else hears of it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveal.files import force
from foveal.tracking.tracker import Row, Status


class Jsonl:
    """Appends rows. On opening, rows past the step that the run resumes from are void and are dropped."""

    def __init__(self, file: Path, start: int) -> None:
        kept: list[Row] = []
        if file.exists():
            kept = [row for row in read_rows(file) if row["step"] <= start]
            draft = file.with_name(f".{file.name}.draft")
            draft.write_text("".join(_line(row) for row in kept))
            force(draft)
            draft.replace(file)
        self.last: Row = next((row for row in reversed(kept) if "loss" in row), {})
        self._results = {_place(row) for row in kept if "loss" not in row}
        self._stream = file.open("a")

    def settings(self, flat: dict[str, Any], tags: dict[str, str]) -> None:
        """Nothing: the run directory holds config.yaml."""

    def rows(self, rows: Sequence[Row]) -> None:
        self._stream.writelines(_line(row) for row in rows)
        self._stream.flush()
        os.fsync(self._stream.fileno())  # a checkpoint that follows is on disk, and so must be the rows before it

    def results(self, results: Row, step: int) -> None:
        """A row of their own, unless an attempt that was killed right after has left the same."""
        row = {"step": step, **results}
        if _place(row) not in self._results:
            self.rows([row])

    def file(self, path: Path) -> None:
        """Nothing: the file is in the run directory."""

    def close(self, status: Status) -> None:
        self._stream.close()


def _place(row: Row) -> tuple[float, frozenset[str]]:
    """What a row of results is about: its step and its names."""
    return row["step"], frozenset(row)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def read_rows(file: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
