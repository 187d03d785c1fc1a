"""The ``foveal`` command. A command is imported when it is run."""

import sys
from typing import Annotated, NoReturn

import typer

from foveal import __version__
from foveal.commands.lazy import Entry, lazy_group
from foveal.errors import FovealError
from foveal.interrupt import (
    COMMAND_INTERRUPTED,
    INTERRUPTED_EXIT_CODE,
    exit_at_once_on_interrupt,
    is_first_local_rank,
    report_error,
)
from foveal.redact import redact_tracebacks

_HELP = """\
Pretraining of vision transformers: masked autoencoders, distillation, fine-tuning.

\b
First, with images of yours:
  foveal data pack folder IMAGES --out data/mine
  foveal init pretrain --data data/mine --minutes 10 --out mine.yaml
  foveal train pretrain mine.yaml

\b
Or with images that come along:
  foveal data pack digits --out data/digits
  foveal train pretrain digits
"""
_TRAIN, _USE, _RUNS, _CLUSTER = "Train", "Use a trained model", "Look at runs", "Before a large run"
COMMANDS = {
    "data": Entry("foveal.data.tools.cli:app", "Pack images into shards; index, verify and display shards.", _TRAIN),
    "init": Entry("foveal.commands.init.cli:init_command", "Write a config that fits data, machine and time.", _TRAIN),
    "config": Entry("foveal.commands.config:app", "List and print the configs that ship, rewrite old ones.", _TRAIN),
    "train": Entry("foveal.commands.train:train_command", "Pretrain, distil or fine-tune by a config.", _TRAIN, True),
    "predict": Entry("foveal.inference.predict_cli:predict_command", "Classes, masks or boxes of images.", _USE),
    "embed": Entry("foveal.inference.embed_cli:embed_command", "Features of images, in files.", _USE),
    "neighbours": Entry("foveal.inference.embed_cli:neighbours_command", "The nearest images of an image.", _USE),
    "inspect": Entry("foveal.inspect.encoder.cli:inspect_command", "Pictures of an encoder's inside.", _USE),
    "export": Entry("foveal.convert.cli:export_command", "Hand a model over to timm, transformers or ONNX.", _USE),
    "status": Entry("foveal.commands.status:status_command", "What runs are doing: step, time left, rates.", _RUNS),
    "runs": Entry("foveal.commands.runs:runs_command", "List runs with their best number.", _RUNS),
    "report": Entry("foveal.report.cli:report_command", "Write what a run or pipeline did as an HTML page.", _RUNS),
    "compare": Entry("foveal.report.cli:compare_command", "Differing settings and results of several runs.", _RUNS),
    "attempts": Entry("foveal.commands.attempts:attempts", "List every start of a run and why it ended.", _RUNS),
    "lineage": Entry("foveal.commands.lineage:lineage", "Show what a model was made from, back to the data.", _RUNS),
    "track": Entry("foveal.commands.track:app", "Upload to MLflow the part of a run that it lacks.", _RUNS),
    "plan": Entry("foveal.forecast.cli:plan_command", "Forecast memory, time and traffic on a cluster.", _CLUSTER),
    "doctor": Entry("foveal.doctor.cli:doctor_command", "Check that the nodes of a job are fit to train.", _CLUSTER),
}

app = typer.Typer(cls=lazy_group(COMMANDS), no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"foveal {__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def _root_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Print the version, or run a command."""


def main() -> NoReturn:
    """Run a command; a FovealError and Ctrl-C print one sentence and set the exit code."""
    redact_tracebacks()
    is_stage = sys.argv[1:2] == ["train"]
    try:
        if is_stage:  # a stage has exit codes, signals and last sentences of its own: no library between
            with exit_at_once_on_interrupt(on_stderr=is_first_local_rank()):
                from foveal.commands.train import train
            train(sys.argv[2:])
        app()
    except FovealError as error:
        report_error(str(error))
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED_EXIT_CODE and not is_stage:  # typer's answer to Ctrl-C
            report_error(COMMAND_INTERRUPTED)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
