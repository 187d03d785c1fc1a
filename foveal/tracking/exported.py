"""The exports of a run as a tracking store describes them, and the note of what the store calls them.

``mlflow_models.json`` in a run directory: the store's run to {folder of the export: ``LoggedExport``}. A copy of the
directory, or another store, has another run, and so no entry of the original's.
"""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveal.atomic import read_json, write_json
from foveal.errors import CheckpointError
from foveal.runs.results import is_result
from foveal.tracking.mlflow_names import name_metric
from foveal.tracking.tail import read_json_or_empty, read_step_rows, to_milliseconds
from foveal.tracking.tracker import MetricPoint

_NOTE = "mlflow_models.json"
_MAX_ENCODER_FACTS = 14
_SMALL_FILES = ("card.json", "README.md")


@dataclass(frozen=True)
class LoggedExport:
    """An export that a store has as a model. identity: of weights and head. is_complete: nothing is left to send."""

    model_id: str
    identity: str
    sha256: str
    step: int
    is_complete: bool = False
    has_weights: bool = False


@dataclass(frozen=True)
class Export:
    """An export. name: its folder in the run, as ``export/student``. folder: its path."""

    name: str
    folder: Path
    card: dict[str, Any]

    @property
    def sha256(self) -> str:
        """The sha256 of the weights of the encoder, or of the whole model of a foreign head."""
        return str(self.card.get("sha256", ""))

    @property
    def identity(self) -> str:
        """What tells an export from the one that replaces it: the sha256 of weights and head, and the step."""
        return "-".join(filter(None, (self.sha256, self._head_sha256, str(self.step))))

    @property
    def has_head(self) -> bool:
        """Whether the head has a file of its own, beside the encoder's."""
        return bool(self._head_sha256)

    @property
    def _head_sha256(self) -> str:
        return str(self.card.get("head_sha256") or "")

    @property
    def stage(self) -> str:
        return str(self.card.get("stage", ""))

    @property
    def step(self) -> int:
        return int(self.card.get("step", 0))

    @property
    def facts(self) -> dict[str, str]:
        """What the encoder is, in few words: its name and sizes."""
        encoder = {name: value for name, value in self.card.get("encoder", {}).items() if value not in (None, "", [])}
        facts = {name: str(value) for name, value in list(encoder.items())[:_MAX_ENCODER_FACTS]}
        return facts | {"step": str(self.step), "stage": self.stage}

    @property
    def small_files(self) -> list[Path]:
        """The files that are sent without the weights."""
        return [file for name in _SMALL_FILES if (file := self.folder / name).exists()]

    def read_description(self) -> str:
        """Return the model card without its YAML front matter; empty without one."""
        file = self.folder / "README.md"
        text = file.read_text() if file.exists() else ""
        if text.startswith("---\n") and (end := text.find("\n---\n", 3)) > 0:
            text = text[end + len("\n---\n") :]
        return text.strip()

    def find_points(self, run_dir: Path) -> list[MetricPoint]:
        """Return the points of the card's metrics as the run's rows have them, so that none is a second one.

        Rates, waits and other numbers of a step that are no results are left out.
        """
        wanted = {name: value for name, value in self.card.get("metrics", {}).items() if is_result(name, value)}
        points: dict[str, MetricPoint] = {}
        for row in read_step_rows(run_dir / "metrics.jsonl"):
            if row["step"] != self.step or "time" not in row:
                continue
            for name, value in row.items():
                if wanted.get(name) == value:
                    key = name_metric(name, of_step="loss" in row)
                    points[key] = (key, value, to_milliseconds(row["time"]), self.step)
        return list(points.values())


def list_exports(run_dir: Path) -> list[Export]:
    """Return the exports of a run; one whose card cannot be read or is no card, or is gone by then, is left out."""
    exports = []
    for file in sorted((run_dir / "export").rglob("card.json")):
        if not file.parent.name.startswith("."):  # the draft of one that is being written
            with contextlib.suppress(OSError, CheckpointError, ValueError, TypeError, AttributeError):
                export = Export(file.parent.relative_to(run_dir).as_posix(), file.parent, read_json(file))
                _ = export.identity, export.facts  # raises for a card with values of other types
                exports.append(export)
    return exports


def read_logged_exports(run_dir: Path, store_run_id: str) -> dict[str, LoggedExport]:
    """Return what a store's run has as models, by the name of the export; empty if nothing, or another run's, is noted."""
    try:
        entries = read_json_or_empty(run_dir / _NOTE).get(store_run_id, {})
        return {name: LoggedExport(**entry) for name, entry in entries.items()}
    except (CheckpointError, OSError, TypeError, AttributeError):
        return {}  # half a copy: the store is asked


def write_logged_export(run_dir: Path, store_run_id: str, name: str, entry: LoggedExport) -> None:
    """Note what a store's run calls an export."""
    try:
        note = read_json_or_empty(run_dir / _NOTE)
    except CheckpointError:
        note = {}
    note.setdefault(store_run_id, {})[name] = asdict(entry)
    write_json(run_dir / _NOTE, note)
