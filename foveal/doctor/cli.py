"""`foveal doctor`: the command line."""

from typing import Annotated

import typer

from foveal.forecast.cli import resolve_stage_name


def doctor_command(
    config: Annotated[
        str | None,
        typer.Argument(
            help="Config of the run that will start: a YAML file or its name. Without it only the nodes are checked."
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    stage: Annotated[
        str | None, typer.Option(help="pretrain, distill or finetune. Default: the folder of CONFIG.")
    ] = None,
    slowest: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Lowest accepted matrix product rate, as a fraction of the other ranks' median."
        ),
    ] = 0.8,
    joining: Annotated[float, typer.Option(min=1.0, help="Seconds within which every rank must join.")] = 180.0,
) -> None:
    """Check that the nodes of this job are fit to train. Takes half a minute once all ranks have joined.

    Exit code 6 and `bad nodes: ...` if a node is not fit, 2 if CONFIG is wrong, 5 if storage or network do not answer.
    """
    from foveal.doctor.runner import PreflightOptions, run_preflight_and_exit

    run_preflight_and_exit(
        PreflightOptions(
            None if config is None else resolve_stage_name(config, stage),
            config or "",
            overrides or [],
            slowest,
            joining,
        )
    )
