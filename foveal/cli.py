"""The ``foveal`` command. Stages have commands of their own (``python -m pretrain.run``)."""

import sys
from typing import Annotated, NoReturn

import typer

from foveal import __version__
from foveal.commands.attempts import attempts
from foveal.commands.config import app as config
from foveal.commands.track import app as track
from foveal.data.tools.cli import app as data
from foveal.doctor.cli import doctor_command
from foveal.errors import FovealError
from foveal.forecast.cli import plan_command
from foveal.redact import redact_tracebacks

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(attempts)
app.add_typer(config, name="config", help="Rewrite config files under the names of this version.")
app.add_typer(data, name="data", help="Build, index, verify and display shards.")
app.add_typer(track, name="track", help="Upload to MLflow the part of a run that it lacks.")
app.command("plan")(plan_command)
app.command("doctor")(doctor_command)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"foveal {__version__}")
        raise typer.Exit


@app.callback()
def _root_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pretraining of vision transformers. To train: python -m pretrain.run, distill.run or finetune.run."""


def main() -> NoReturn:
    """Run a command; a FovealError prints one sentence and sets the exit code."""
    redact_tracebacks()
    try:
        app()
    except FovealError as error:
        typer.echo(f"foveal: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
