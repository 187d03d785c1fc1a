"""``foveal status [RUN|PIPELINE|DIR]``: what a run, or the runs of a folder, are doing, from any shell."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from foveal.commands.status_json import encode_overview
from foveal.commands.status_lines import (
    describe_best,
    describe_not_begun,
    describe_position,
    describe_state,
    describe_status,
    format_age_coarsely,
    format_path,
)
from foveal.errors import CheckpointError, ConfigError
from foveal.quantities import format_duration
from foveal.redact import printable
from foveal.runs.job_lookup import JobLookup
from foveal.runs.live_status import RunStatus
from foveal.runs.overview import Overview, read_overview
from foveal.runs.record import is_run

_DEFAULT_INTERVAL = 2.0  # seconds
_DEFAULT_FOLDER = Path("runs")
_BAR_WIDTH = 40
_MAX_FAILED_LOOKS = 10  # in a row, of --watch
STYLES = {
    "running": "green",
    "waiting": "yellow",
    "saved-and-left": "yellow",
    "unknown": "yellow",
    "killed": "red",
    "failed": "red",
    "diverged": "red",
}


def status_command(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="RUN|PIPELINE|DIR", help="A run, or a folder of runs; else ./runs.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh until all has ended, every 2 seconds; --watch 5: every 5.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with --watch one per line.")] = False,
) -> None:
    """Say what a run is doing: state, step, time left, loss, rates, checkpoint; of a folder: all of its runs."""
    target, interval = _parse_words(words or [], is_watching=watch)
    if not watch:
        _print_overview(_look(target, JobLookup()), Console(highlight=False), as_json=as_json, indent=1)
        return
    try:
        _watch(target, interval, Console(highlight=False), as_json=as_json)
    except KeyboardInterrupt:  # the way to end it
        raise typer.Exit(0) from None


def _parse_words(words: Sequence[str], *, is_watching: bool) -> tuple[Path, float]:
    """Return the folder and the seconds between two looks: with --watch a number that is no path, in any order.

    Raises: ConfigError.
    """
    numbers = [word for word in words if is_watching and _is_number(word) and not Path(word).exists()]
    paths = [word for word in words if word not in numbers]
    if len(paths) > 1 or len(numbers) > 1:
        raise ConfigError(f"one run or folder is expected, this is {len(words)}: {' '.join(words)}")
    interval = float(numbers[0]) if numbers else _DEFAULT_INTERVAL
    if not 0.1 <= interval <= 86400:
        raise ConfigError(f"--watch {numbers[0]}: seconds from 0.1 to 86400 are expected")
    return (Path(paths[0]) if paths else find_default_folder()), interval


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def find_default_folder() -> Path:
    """Return the working directory if it is a run, else ./runs. Raises: CheckpointError."""
    here = Path()
    if is_run(here):
        return here
    if _DEFAULT_FOLDER.is_dir():
        return _DEFAULT_FOLDER
    raise CheckpointError(f"{here.absolute()} is no run and has no folder runs: name a run, or a folder of runs")


def _watch(target: Path, interval: float, console: Console, *, as_json: bool) -> None:
    """Show the folder again and again, in place on a terminal, until nothing in it changes any more."""
    jobs = _RenewedLookup(max(interval, 10.0))  # a queue of thousands of jobs is not to be asked every second
    if as_json or not console.is_terminal:
        _repeat(
            target, interval, jobs, lambda overview: _print_overview(overview, console, as_json=as_json, indent=None)
        )
        return
    with Live(console=console, auto_refresh=False) as live:
        _repeat(
            target,
            interval,
            jobs,
            lambda overview: live.update(render_overview(overview, time.time(), with_bar=True), refresh=True),
        )


def _repeat(target: Path, interval: float, jobs: "_RenewedLookup", show: Callable[[Overview], None]) -> None:
    """Show the folder until nothing in it is live. Storage that does not answer for some looks is looked at again."""
    num_failures = _MAX_FAILED_LOOKS  # the first look must succeed
    while True:
        try:
            overview = _look(target, jobs.get())
        except CheckpointError:
            if num_failures >= _MAX_FAILED_LOOKS:
                raise
            num_failures += 1
        else:
            num_failures = 0
            show(overview)
            if not overview.is_live(time.time()):
                return
        time.sleep(interval)


def _look(target: Path, jobs: JobLookup) -> Overview:
    """Return what a folder holds now. Raises: CheckpointError."""
    try:
        return read_overview(target, time.time(), jobs)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be read ({error})") from None


class _RenewedLookup:
    """Asks Slurm anew after some seconds, not at each look."""

    def __init__(self, max_age_seconds: float) -> None:
        self._max_age, self._made_at, self._lookup = max_age_seconds, time.monotonic(), JobLookup()

    def get(self) -> JobLookup:
        """Return the answers of the last seconds, or a lookup without any."""
        if time.monotonic() - self._made_at > self._max_age:
            self._made_at, self._lookup = time.monotonic(), JobLookup()
        return self._lookup


def _print_overview(overview: Overview, console: Console, *, as_json: bool, indent: int | None) -> None:
    now = time.time()
    if as_json:
        typer.echo(json.dumps(encode_overview(overview, now), indent=indent, ensure_ascii=False, allow_nan=False))
    else:
        console.print(render_overview(overview, now, with_bar=console.is_terminal))
        if indent is None:
            console.print()


def render_overview(overview: Overview, now: float, *, with_bar: bool = False) -> RenderableType:
    """Return a run as labelled lines, after a bar of its progress, or a folder as a table."""
    return _render_run(overview.runs[0], now, with_bar=with_bar) if overview.is_run else _render_table(overview, now)


def _render_run(status: RunStatus, now: float, *, with_bar: bool) -> RenderableType:
    stage = f" ({status.stage})" if status.stage else ""
    path = status.path if status.path != Path() else Path(status.name)
    title = Text(f"{format_path(path)}{printable(stage)}", style="bold", overflow="fold")
    lines = Table.grid(padding=(0, 1))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    if with_bar and status.fraction is not None:
        lines.add_row("", ProgressBar(total=1.0, completed=status.fraction, width=_BAR_WIDTH))
    for label, text in describe_status(status, now):
        style = STYLES.get(status.state, "") if label == "state" else ""
        lines.add_row(Text(label, style="dim"), Text(text, style=style))
    return Group(title, lines)


def _render_table(overview: Overview, now: float) -> RenderableType:
    rows = [_format_row(run, overview.folder, now) for run in overview.runs]
    for stage in overview.not_begun:
        name, words = name_in(stage.planned.run_dir, overview.folder), Text(describe_not_begun(stage), style="dim")
        rows.append({"run": name, "stage": Text(printable(stage.planned.stage)), "state": words})
    has_stages_of_other_names = any(row["run"].plain.rpartition("/")[2] != row["stage"].plain for row in rows)
    columns = [name for name in rows[0] if any(row.get(name) for row in rows)] if rows else []
    table = Table(box=None, pad_edge=False)
    shown = [name for name in columns if name != "stage" or has_stages_of_other_names]
    for name in shown:
        is_number = name in ("step", "left", "seen")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for row in rows:
        table.add_row(*(row.get(name, Text()) for name in shown))
    reasons = [
        Text(f"{name_in(run.path, overview.folder)}: {printable(run.reason)}")
        for run in overview.runs
        if run.state in ("failed", "diverged", "killed") and run.reason
    ]
    reasons += [Text(printable(run.reason), style="red") for run in overview.unreadable]
    return Group(table, *([Text(""), *reasons] if reasons else []))


def _format_row(run: RunStatus, folder: Path, now: float) -> dict[str, Text]:
    loss = f"loss {run.rows.loss:.4f}" if run.rows.loss is not None else ""
    return {
        "run": name_in(run.path, folder),
        "stage": Text(printable(run.stage)),
        "state": Text(describe_state(run), style=STYLES.get(run.state, "")),
        "step": Text(describe_position(run)),
        "best or loss": Text(describe_best(run.best) or loss),
        "left": Text(format_duration(run.seconds_left) if run.seconds_left is not None else ""),
        "seen": Text(format_age_coarsely(run.last_sign_at, now)),
    }


def name_in(path: Path, folder: Path) -> Text:
    """Return the path of a run inside of a folder."""
    return Text(format_path(path.relative_to(folder) if path.is_relative_to(folder) else path))
