"""``foveal attempts RUN``: every start of a run and why it ended."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from foveal.errors import CheckpointError
from foveal.training.lease import list_attempts
from foveal.training.lineage import read_fork


def attempts(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """List every start of a run: job, node, steps, seconds, and why it stopped; of a fork also where it began."""
    records = list_attempts(run)
    if not records:
        raise CheckpointError(f"{run} holds no attempts; give the directory of a run (run.dir)")
    table = Table(box=None)
    for column in ("attempt", "started", "where", "ranks", "steps", "seconds", "code", "why it stopped"):
        table.add_column(column, overflow="fold")
    for record in records:
        holder = record.holder
        job = f"job {holder.job} on " if holder and holder.job else ""
        table.add_row(
            str(record.number),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started_at)),
            f"{job}{holder.nodes or holder.host}" if holder else "?",
            str(holder.ranks) if holder else "?",
            f"{_format_number(record.start_step)} to {_format_number(record.end_step)}",
            _format_number(record.duration_seconds),
            _format_number(record.exit_code),
            record.reason or "(no record of its end: it is running, or was killed)",
        )
    console = Console(width=160)
    if (fork := read_fork(run)) is not None:
        for line in fork.summary_lines():
            console.print(line, markup=False, highlight=False)
    console.print(table)


def _format_number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"
