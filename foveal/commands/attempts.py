"""``foveal attempts RUN``: every start of a run and why it ended."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.atomic import read_json
from foveal.errors import (
    AttemptSupersededError,
    BadNodeError,
    CheckpointError,
    ConfigError,
    RestartLoopError,
    TrainingDivergedError,
    TrainingHungError,
)
from foveal.quantities import format_duration
from foveal.redact import printable
from foveal.runs.results import is_result
from foveal.training.lease import AttemptRecord, list_attempts
from foveal.training.lease_holder import current_holder, get_liveness_and_reason
from foveal.training.lineage import read_fork

_KIND_BY_CODE = {
    0: "",  # the reason says it: finished, or saved and left
    1: "failed: ",
    ConfigError.exit_code: "refused: ",
    TrainingDivergedError.exit_code: "diverged: ",
    AttemptSupersededError.exit_code: "superseded: ",
    TrainingHungError.exit_code: "hung: ",
    BadNodeError.exit_code: "bad node: ",
    RestartLoopError.exit_code: "no progress: ",
}
_MAX_RESULTS = 4


def attempts(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """List every start of a run: node, steps, time, exit code, and why it ended; of a fork also where it began."""
    records = list_attempts(run)
    if not records:
        raise CheckpointError(_explain_no_attempts(run))
    results = _format_results(run)
    table = Table(box=None, pad_edge=False)
    for column in ("attempt", "started", "ranks", "steps", "time", "code", "where"):
        table.add_column(column, justify="right" if column in ("ranks", "time", "code") else "left", overflow="fold")
    for record in records:
        table.add_row(*(Text(printable(cell)) for cell in _format_cells(record)))
    console = Console(highlight=False)
    if (fork := read_fork(run)) is not None:
        for line in fork.summary_lines():
            console.print(printable(line), markup=False)
    console.print(table)
    console.print()
    for record in records:
        is_last = record is records[-1]
        is_finish = is_last and record.exit_code == 0 and (run / "finished.json").exists()
        # Versions before 0.2 recorded no reason of an attempt that finished or reached run.stop_at_step.
        end = "finished" if is_finish and not record.reason else _describe_end(record, is_last=is_last)
        words = f"{record.number}: {end}{f' ({results})' if is_finish and results else ''}"
        console.print(printable(words), markup=False, soft_wrap=True)


def _explain_no_attempts(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; a run begins with its first start, in run.dir"
    if not folder.is_dir():
        return f"{folder} is a file; give the directory of a run (run.dir)"
    if runs := sorted(file.parent.parent for file in folder.glob("*/attempts/0001.json")):
        return f"{folder} is no run, it holds {len(runs)}: {', '.join(map(str, runs[:3]))}{' ...' * (len(runs) > 3)}"
    return f"{folder} is no run that was ever started (it holds no attempts); give the directory of a run (run.dir)"


def _format_cells(record: AttemptRecord) -> list[str]:
    holder = record.holder
    job = f"job {holder.job} on " if holder and holder.job else ""
    return [
        str(record.number),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started_at)),
        str(holder.ranks) if holder else "?",
        f"{_format_number(record.start_step)} to {_format_number(record.end_step)}",
        "?" if record.duration_seconds is None else format_duration(record.duration_seconds),
        _format_number(record.exit_code),
        f"{job}{holder.nodes or holder.host}" if holder else "?",
    ]


def _describe_end(record: AttemptRecord, *, is_last: bool) -> str:
    """Return what an attempt did, in a phrase."""
    if record.exit_code is not None:
        reason = record.reason or ("finished, or reached run.stop_at_step" if record.exit_code == 0 else "no reason")
        return f"{_KIND_BY_CODE.get(record.exit_code, '')}{reason}"
    if not is_last:
        return "killed, or its node was lost: it left no record of its end"
    is_alive, reason = get_liveness_and_reason(record.holder, current_holder(1)) if record.holder else (None, "")
    if is_alive:
        return "running"
    if is_alive is None:
        return "no record of its end: it is running on another host, or was killed there"
    return f"killed by a signal, or its node was lost: {reason}"


def _format_results(run: Path) -> str:
    """Return the first results of a finished run; "" for any other."""
    file = run / "finished.json"
    if not file.exists():
        return ""
    facts = read_json(file)
    metrics: dict[str, Any] = facts.get("results") or facts.get("summary") or {}
    results = {name: value for name, value in metrics.items() if is_result(name, value)}
    # A summary begins with what was evaluated; those of versions before 0.2 began with the last step's own numbers.
    is_evaluated_last = next(iter(metrics), "") == "step"
    shown = list(results.items())[-_MAX_RESULTS:] if is_evaluated_last else list(results.items())[:_MAX_RESULTS]
    return ", ".join(f"{name} {value:.4g}" for name, value in shown)


def _format_number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"
