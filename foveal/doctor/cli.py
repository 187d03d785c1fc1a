"""`foveal doctor`: the command line."""

from typing import Annotated

import typer

from foveal.forecast.cli import resolve_stage_name


def doctor_command(
    config: Annotated[str | None, typer.Argument(help="The run that is to come: a YAML file, or its name.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    stage: Annotated[str | None, typer.Option(help="pretrain, distill or finetune; default: CONFIG's folder.")] = None,
    slowest: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of its peers' median rate that will do.")
    ] = 0.8,
    joining: Annotated[float, typer.Option(min=1.0, help="Seconds until every rank must have come.")] = 180.0,
) -> None:
    """Are these nodes fit to train? A minute at most, once all ranks have come.

    Exit code 6 and `bad nodes: ...` if one is not, 2 if CONFIG is wrong.
    """
    from foveal.doctor.runner import PreflightOptions, run_preflight

    run_preflight(
        PreflightOptions(
            None if config is None else resolve_stage_name(config, stage),
            config or "",
            overrides or [],
            slowest,
            joining,
        )
    )
