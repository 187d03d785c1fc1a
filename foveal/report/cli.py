"""``foveal report RUN|PIPELINE`` and ``foveal compare RUN RUN...``."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.redact import printable
from foveal.report.compare import Comparison, Row, compare_runs, write_comparison
from foveal.report.report import REPORT_FILE, write_report

_CELL_WIDTH = 40


def report_command(
    path: Annotated[Path, typer.Argument(help="A run directory, or the folder of a pipeline.")],
    out: Annotated[Path | None, typer.Option(help=f"The file to write. Default: {REPORT_FILE} in PATH.")] = None,
) -> None:
    """Write what a run or a pipeline did into one HTML file that loads nothing from elsewhere.

    The run may be under way, killed or finished; nothing of it is changed.
    """
    typer.echo(str(write_report(path, out)))


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Two to eight run directories.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write a page with the curves, for example compare.html.")
    ] = None,
) -> None:
    """Print the settings in which runs differ, science first, and their results side by side; a star marks the best."""
    comparison = compare_runs(runs, out)
    for title, rows in (
        ("settings that decide the result", comparison.science),
        ("settings of the machine", comparison.machine),
        ("results", comparison.results),
        ("the runs", comparison.facts),
    ):
        if rows:
            typer.echo("\n".join(_format_table(title, comparison, rows)) + "\n")
    if not comparison.science:
        typer.echo("no setting that decides the result differs")
    if out is not None:
        write_comparison(comparison, out)
        typer.echo(str(out))


def _format_table(title: str, comparison: Comparison, rows: tuple[Row, ...]) -> list[str]:
    """Return a table as lines; a cell that is longer than a column is cut."""
    cells = [[title, *comparison.names]] + [
        [row.name, *(f"{cell} *" if at in row.best else cell for at, cell in enumerate(row.cells))] for row in rows
    ]
    cells = [[_fit(cell) for cell in row] for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _fit(cell: str) -> str:
    flat = printable(" ".join(cell.split()))
    return flat if len(flat) <= _CELL_WIDTH else f"{flat[: _CELL_WIDTH - 1]}…"
