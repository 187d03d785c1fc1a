"""``foveal runs [DIR]``: the runs of a folder with their best number."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveal.atomic import format_bytes
from foveal.commands.status import STYLES, find_default_folder, name_in
from foveal.commands.status_json import encode_best, replace_nonfinite
from foveal.commands.status_lines import describe_best, describe_position, describe_state
from foveal.errors import CheckpointError, ConfigError
from foveal.quantities import format_duration
from foveal.redact import printable
from foveal.runs.job_lookup import JobLookup
from foveal.runs.listing import ListedRun, RunListing, list_with_status, sort_runs
from foveal.runs.live_status import RunStatus
from foveal.runs.record import STAGES, explain_no_run, is_run

_WIDE = 110  # columns of a terminal from which data and model are shown
_LOWER, _HIGHER = "↓", "↑"


def runs_command(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="A folder of runs; else ./runs.")] = None,
    sort: Annotated[Literal["date", "metric", "name"], typer.Option("--sort", help="Order of the rows.")] = "date",
    stage: Annotated[str | None, typer.Option("--stage", help="Only runs of this stage.")] = None,
    all_runs: Annotated[bool, typer.Option("--all", help="Also the trials and folds inside runs.")] = False,
    size: Annotated[bool, typer.Option("--size", help="Also the size on disk.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List runs with stage, state, step and their best number (lower is better for losses, higher for the rest)."""
    folder = folder or find_default_folder()
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"--stage {stage}: there is no such stage; there are {', '.join(STAGES)}")
    listing = list_with_status(folder, time.time(), JobLookup(), stage=stage, with_nested=all_runs, with_size=size)
    is_empty = not listing.runs and not listing.unreadable
    if is_empty and not (stage and folder.is_dir()):
        raise CheckpointError(explain_no_run(folder))
    runs = sort_runs(listing.runs, sort)
    if as_json:
        tree = encode_listing(folder, runs, listing)
        typer.echo(json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False))
        return
    console = Console(highlight=False)
    console.print(_build_table(runs, folder, is_wide=console.width >= _WIDE, with_size=size))
    for _, reason in listing.unreadable:
        console.print(Text(printable(reason), style="red"))


def encode_listing(folder: Path, runs: list[ListedRun], listing: RunListing) -> dict[str, Any]:
    """Return a list of runs as JSON has it, with keys that stay; docs/status.md lists them."""
    tree = {
        "path": str(folder),
        "runs": [_encode_run(run) for run in runs],
        "unreadable": [{"path": str(path), "reason": printable(reason)} for path, reason in listing.unreadable],
    }
    return replace_nonfinite(tree)


def _encode_run(run: ListedRun) -> dict[str, Any]:
    status = run.status
    return {
        "path": str(status.path),
        "name": status.name,
        "stage": status.stage,
        "state": status.state,
        "step": status.step,
        "total_steps": status.total_steps,
        "best": encode_best(status.best),
        "started_at": status.first_started_at,
        "duration_seconds": status.duration_seconds,
        "data": run.data,
        "model": run.model,
        "outer": None if run.outer is None else str(run.outer),
        "bytes": run.num_bytes,
    }


def _build_table(runs: list[ListedRun], folder: Path, *, is_wide: bool, with_size: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ["run", "stage", "state", "step", "best", "started"]
    columns += ["time", "data", "model"] if is_wide else []
    columns += ["size"] if with_size else []
    for column in columns:
        is_number = column in ("step", "time", "size")
        may_fold = column in ("run", "model") or (column == "best" and not is_wide)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=not may_fold)
    for run in runs:
        cells = _format_cells(run, folder if not is_run(folder) else folder.parent)
        table.add_row(*(cells[column] for column in columns))
    return table


def _format_cells(run: ListedRun, folder: Path) -> dict[str, Text]:
    status, best = run.status, run.status.best
    arrow = "" if best is None else _HIGHER if best.higher_is_better else _LOWER
    started = status.first_started_at
    return {
        "run": name_in(status.path, folder),
        "stage": Text(printable(status.stage)),
        "state": Text(describe_state(status), style=STYLES.get(status.state, "")),
        "step": Text(_format_step(status)),
        "best": Text(f"{describe_best(best)} {arrow}".strip()),
        "started": Text("" if started is None else _format_date(started, time.time())),
        "time": Text(" ".join(format_duration(status.duration_seconds).split()[:2])),
        "data": Text(printable(run.data)),
        "model": Text(printable(run.model)),
        "size": Text("" if run.num_bytes is None else format_bytes(run.num_bytes)),
    }


def _format_step(status: RunStatus) -> str:
    """Return where a run is; of a finished one, where it ended."""
    is_done = status.state == "finished" and status.nested is None and status.step is not None
    return f"{status.step:,}" if is_done else describe_position(status)


def _format_date(then: float, now: float) -> str:
    """Return day and time of a time; of one in another year, the date."""
    date, today = time.localtime(then), time.localtime(now)
    return time.strftime("%b %d %H:%M" if date.tm_year == today.tm_year else "%Y-%m-%d", date)
