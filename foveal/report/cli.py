"""``foveal report RUN|PIPELINE`` and ``foveal compare RUN RUN...``."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.report.report import REPORT_FILE, write_report


def report_command(
    path: Annotated[Path, typer.Argument(help="A run directory, or the folder of a pipeline.")],
    out: Annotated[Path | None, typer.Option(help=f"The file to write. Default: {REPORT_FILE} in PATH.")] = None,
) -> None:
    """Write what a run or a pipeline did into one HTML file that loads nothing from elsewhere.

    The run may be under way, killed or finished; nothing of it is changed.
    """
    typer.echo(str(write_report(path, out)))
