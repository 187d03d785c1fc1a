"""``foveal attempts RUN``: every start of a run, and why it stopped."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from foveal.errors import CheckpointError
from foveal.training.lease import list_attempts


def attempts(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """Every start of a run: job, node, steps, seconds, and why it stopped."""
    told = list_attempts(run)
    if not told:
        raise CheckpointError(f"{run} holds no attempts; give the directory of a run (run.dir)")
    table = Table(box=None)
    for column in ("attempt", "started", "where", "ranks", "steps", "seconds", "code", "why it stopped"):
        table.add_column(column, overflow="fold")
    for each in told:
        who = each.holder
        job = f"job {who.job} on " if who and who.job else ""
        table.add_row(
            str(each.number),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.started_at)),
            f"{job}{who.nodes or who.host}" if who else "?",
            str(who.ranks) if who else "?",
            f"{_format_number(each.start_step)} to {_format_number(each.end_step)}",
            _format_number(each.duration_seconds),
            _format_number(each.exit_code),
            each.reason or "(no word: it runs, or was killed)",
        )
    Console(width=160).print(table)


def _format_number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"
