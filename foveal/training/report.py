"""The report at the end of a run: its results, its duration, where its files are, and the next command to type."""

import logging
import math
import shlex
import textwrap
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.atomic import read_json, write_json
from foveal.data.config import DataConfig, expand_path
from foveal.data.format.manifest import read_manifest
from foveal.errors import CheckpointError, FovealError
from foveal.quantities import format_count, format_duration
from foveal.redact import redact
from foveal.renames import translate_metrics
from foveal.tracking.tail import read_step_rows
from foveal.training.config import StageConfig
from foveal.training.fork_source import list_checkpoints
from foveal.training.lease import list_attempts

_WIDTH, _LABEL_WIDTH = 80, 10
_MAX_AVERAGED_STEPS = 100
_STAGES_WITH_NEXT = ("pretrain", "distill")  # their exports are what fine-tuning starts from
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunReport:
    """What a finished run has to say. ``results`` are by logged name; unknown facts are None.

    ``first_loss``: of step 1 or the first step of a fork. ``last_loss``: mean over the last ``averaged_steps``.
    """

    stage_name: str
    run_dir: Path
    results: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int | None = None
    first_step: int = 1
    first_loss: float | None = None
    last_loss: float | None = None
    averaged_steps: int = 1
    training_seconds: float = 0.0
    evaluation_seconds: float | None = None
    total_seconds: float | None = None
    num_attempts: int = 1
    images_per_second: float | None = None
    num_nested_runs: int = 0
    exports: tuple[Path, ...] = ()
    data_options: str = ""  # of foveal init
    pictures: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    num_refused_updates: int = 0
    tracking_uri: str | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines of at most 80 characters, longer only for paths and commands."""
        labelled = {
            "finished": self._describe_duration() or ["earlier"],
            "loss": self._describe_loss(),
            "results": format_results(self.results),
            "note": [part for note in self.notes for part in _wrap(note)],
            "refused": [f"{self.num_refused_updates} updates: refused.jsonl"] if self.num_refused_updates else [],
            "run": [f"{self.run_dir}{f' and {self.num_nested_runs} in it' if self.num_nested_runs else ''}"],
            "export": [str(folder) for folder in self.exports],
            "pictures": [f"{self.pictures[-1].parent}/ ({format_count(len(self.pictures), 'file')})"]
            if self.pictures
            else [],
            "kept": [str(self.checkpoint)] if self.checkpoint else [],
            "curves": [_describe_tracking(self.tracking_uri)] if self.tracking_uri else [],
            "next": self._describe_next(),
        }
        return [
            f"{label if number == 0 else '':<{_LABEL_WIDTH}}{text}"
            for label, texts in labelled.items()
            for number, text in enumerate(texts)
        ]

    def _describe_duration(self) -> list[str]:
        steps = f"{self.num_steps:,} steps" if self.num_steps else ""
        total = f"in {format_duration(self.total_seconds)}" if self.total_seconds is not None else ""
        attempts = f"of {self.num_attempts} attempts" if self.num_attempts > 1 else ""
        rate = f" at {self.images_per_second:,.0f} images/s" if self.images_per_second is not None else ""
        parts = [f"training {format_duration(self.training_seconds)}{rate}"] if self.num_steps else []
        if self.evaluation_seconds:
            parts.append(f"evaluating {format_duration(self.evaluation_seconds)}")
        return list(filter(None, [" ".join(filter(None, [steps, total, attempts])), ", ".join(parts)]))

    def _describe_loss(self) -> list[str]:
        if self.first_loss is None or self.last_loss is None:
            return []
        last = (
            f"over the last {self.averaged_steps} steps" if self.averaged_steps > 1 else f"at step {self.num_steps:,}"
        )
        return [f"{self.first_loss:.4f} at step {self.first_step:,}, {self.last_loss:.4f} {last}"]

    def _describe_next(self) -> list[str]:
        if self.stage_name not in _STAGES_WITH_NEXT or not self.exports:
            return []
        return [f"foveal init finetune {self.data_options} --init {shlex.quote(str(self.exports[0]))}"]


def write_finished(
    run_dir: Path,
    results: Mapping[str, Any],
    last_row: Mapping[str, Any],
    science: Mapping[str, Any],
    notes: Sequence[str] = (),
    *,
    training_seconds: float,
    evaluation_seconds: float,
    attempt_seconds: float,
) -> Path:
    """Write finished.json, the results and notes about them first, and return its path.

    ``training_seconds`` are those of all attempts, ``evaluation_seconds`` and ``attempt_seconds`` of this one.
    """
    earlier_attempts = [record.duration_seconds or 0.0 for record in list_attempts(run_dir)]
    facts = {
        "summary": {**results, **last_row, **results},
        **({"notes": list(notes)} if notes else {}),
        "seconds": round(training_seconds, 3),
        "evaluation_seconds": round(evaluation_seconds, 3),
        "total_seconds": round(attempt_seconds + sum(earlier_attempts), 3),
        "science": science,
    }
    write_json(run_dir / "finished.json", facts)
    return run_dir / "finished.json"


def log_report(stage_name: str, run_dir: Path, cfg: StageConfig) -> None:
    """Log the report of a finished run. A file that cannot be read costs the report, not the run."""
    try:
        lines = read_report(stage_name, run_dir, cfg).lines()
    except (OSError, CheckpointError) as error:
        _log.warning("%s is finished; its report cannot be written (%s)", run_dir, error)
        return
    for line in lines:
        _log.info("%s", line)


def read_report(stage_name: str, run_dir: Path, cfg: StageConfig) -> RunReport:
    """Return the report of a finished run from its directory. Raises: OSError, CheckpointError for damaged files."""
    facts = read_json(run_dir / "finished.json")
    summary = translate_metrics(facts.get("summary", {}))
    num_rows, first_row, last_rows = 0, {}, deque(maxlen=_MAX_AVERAGED_STEPS)
    for row in read_step_rows(run_dir / "metrics.jsonl"):
        if "loss" in row:
            num_rows, first_row = num_rows + 1, first_row or row
            last_rows.append(row)
    averaged_losses = [row["loss"] for row in last_rows][-max(1, min(num_rows // 20, _MAX_AVERAGED_STEPS)) :]
    training_names = last_rows[-1].keys() if last_rows else set()
    num_steps, seconds = int(summary.get("step", 0)) or None, facts.get("seconds", 0.0)
    checkpoints, refused = list_checkpoints(run_dir), run_dir / "refused.jsonl"
    return RunReport(
        stage_name,
        run_dir,
        {name: value for name, value in summary.items() if name not in training_names},
        num_steps=num_steps,
        first_step=int(first_row.get("step", 1)),
        first_loss=first_row.get("loss"),
        last_loss=math.fsum(averaged_losses) / len(averaged_losses) if averaged_losses else None,
        averaged_steps=len(averaged_losses),
        training_seconds=seconds,
        evaluation_seconds=facts.get("evaluation_seconds"),
        total_seconds=facts.get("total_seconds"),
        num_attempts=len(list_attempts(run_dir)),
        images_per_second=num_steps * cfg.batch.global_size / seconds if num_steps and seconds else None,
        num_nested_runs=len(list(run_dir.glob("*/*/finished.json"))),
        data_options=_write_data_options(cfg.data),
        exports=tuple(sorted(card.parent for card in (run_dir / "export").rglob("card.json"))),
        pictures=tuple(sorted((run_dir / "pictures").glob("*.png"))),
        checkpoint=checkpoints[-1] if checkpoints else None,
        num_refused_updates=len(refused.read_bytes().splitlines()) if refused.exists() else 0,
        tracking_uri=cfg.tracking.uri,
        notes=tuple(facts.get("notes", ())),
    )


def wrap_lines(lines: Iterable[str]) -> list[str]:
    """Break the lines of a plan at 80 characters; the rest of a line is indented like its text."""
    return [
        f"{line[:_LABEL_WIDTH] if number == 0 else '':<{_LABEL_WIDTH}}{part}"
        for line in lines
        for number, part in enumerate(_wrap(line[_LABEL_WIDTH:]))
    ]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH - _LABEL_WIDTH, break_long_words=False, break_on_hyphens=False)


def format_results(results: Mapping[str, Any]) -> list[str]:
    """Return all results in columns of 70 characters: first those with a spread over seeds or folds, as a table."""
    spread = [name.removesuffix("_lowest") for name in results if name.endswith("_lowest")]
    spread = [name for name in spread if f"{name}_highest" in results and {name, f"{name}_mean"} & results.keys()]
    std = ["std"] if any(f"{name}_std" in results for name in spread) else []
    columns = ["mean", *std, "lowest", "highest"]
    rows = [[name, *(results.get(f"{name}_{column}", results.get(name)) for column in columns)] for name in spread]
    in_table = {f"{name}_{column}" for name in spread for column in columns} | set(spread)
    pairs = [(name, format_value(value)) for name, value in results.items() if name not in in_table]
    return _format_table(columns, rows) + _flow_pairs(pairs)


def format_value(value: Any) -> str:
    """Return a result as text: whole numbers as they are, others with four digits after the point."""
    if not isinstance(value, float):
        return str(value)
    if value.is_integer() and abs(value) > 1:
        return f"{value:.0f}"
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.4g}"


def _format_table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    cells = [["", *columns], *([row[0], *map(format_value, row[1:])] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]


def _flow_pairs(pairs: list[tuple[str, str]]) -> list[str]:
    """Return names and values in as many columns as fit."""
    if not pairs:
        return []
    name_width, value_width = (max(len(pair[at]) for pair in pairs) for at in (0, 1))
    cell_width = name_width + value_width + 2
    per_line = max(1, (_WIDTH - _LABEL_WIDTH + 4) // (cell_width + 4))
    cells = [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in pairs]
    return ["    ".join(cells[start : start + per_line]) for start in range(0, len(cells), per_line)]


def _write_data_options(data: DataConfig) -> str:
    """Return the options of ``foveal init`` that name a data set; a placeholder if its images have no labels."""
    with suppress(OSError, FovealError):  # a manifest behind a URL is not read for this
        manifest = read_manifest(Path(expand_path(data.index or data.path, "data.path")))
        if not manifest.classes and len(manifest.fields) == 1:
            return "--data LABELLED_DATA"
    return shlex.join(["--data", data.path, *(["--index", data.index] if data.index else [])])


def _describe_tracking(uri: str) -> str:
    return redact(uri) if uri.startswith("http") else f"mlflow ui --backend-store-uri {redact(uri)}"
