"""The ``foveal`` command. The stages have doors of their own (``python -m pretrain.run``)."""

import sys
from typing import Annotated, NoReturn

import typer

from foveal import __version__
from foveal.data.cli import app as data
from foveal.errors import FovealError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data, name="data", help="Build, index and look at shards.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foveal {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Self-supervised pretraining of vision transformers. Training: python -m pretrain.run, distill.run, finetune.run."""


def main() -> NoReturn:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    try:
        app()
    except FovealError as error:
        typer.echo(f"foveal: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)
