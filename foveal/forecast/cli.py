"""`foveal plan`: the command line."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.errors import ConfigError
from foveal.forecast.slurm_limits import Partition, Request, partition_named, request_of, seconds_of

STAGES = ("pretrain", "distill", "finetune")


def stage_of(config: str, stage: str | None) -> str:
    """The stage that a config is of: the one given, or that of its folder. Errors: ConfigError."""
    if stage is not None:
        if stage not in STAGES:
            raise ConfigError(f"--stage {stage} does not exist; there are {', '.join(STAGES)}")
        return stage
    folder = Path(config).parent.name
    if folder in STAGES:
        return folder
    found = [each for each in STAGES if Path("configs", each, f"{config}.yaml").is_file()]
    if len(found) != 1:
        raise ConfigError(f"which stage {config} is of cannot be seen from its place; give --stage {'|'.join(STAGES)}")
    return found[0]


def stage_named(name: str) -> Any:
    """A stage by name: the stages import foveal, so foveal finds them only when it is asked to."""
    return importlib.import_module(f"{name}.run").STAGE


def plan_command(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one in configs/STAGE/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node; one rank each.")] = 1,
    stage: Annotated[str | None, typer.Option(help="pretrain, distill or finetune; default: CONFIG's folder.")] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, a100-40, l40s, h100, h200, b200.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of a GPU, if not --gpu's.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="TFLOP/s of a GPU at best, if not --gpu's.")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of that which is reached.")] = 0.4,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition; default: its default.")] = None,
    time: Annotated[
        str | None, typer.Option(help="A job's time as sbatch takes it; default: the job script's.")
    ] = None,
    write_speed: Annotated[float, typer.Option(help="GB/s that all ranks write to the run directory.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What CONFIG needs and takes on so many GPUs, and what will not do; needs no GPU. Exit code 2 if it cannot run."""
    from foveal.forecast.forecast import Forecast, Machine
    from foveal.forecast.gpu_specs import gpu_named
    from foveal.forecast.problems import problems_of
    from foveal.forecast.report import lines_of, tree_of
    from foveal.training.cli import load

    found = stage_named(stage_of(config, stage))
    cfg = load(found.config, found.name, config, overrides or [])
    card = None if gpu is None else gpu_named(gpu)
    rate = peak_tflops or (card.rate(cfg.engine) if card else None)
    size = gpu_memory or (card.gigabytes if card else None)
    machine = Machine(
        nodes,
        gpus_per_node,
        mfu,
        write_speed * 1e9,
        rate=None if rate is None else rate * 1e12,
        memory=None if size is None else size * 1e9,
    )
    forecast = Forecast(found, found.plan(cfg, machine.ranks), machine)
    slurm, request = partition_named(partition), request_of(found.name)
    limits = _limits(slurm, request, time)
    problems = problems_of(forecast, limits, slurm, None if time else request)
    if as_json:
        typer.echo(json.dumps(tree_of(forecast, limits, slurm, problems), indent=1))
    else:
        for line in lines_of(forecast, limits, slurm):
            typer.echo(line)
        for problem in problems:
            typer.echo(f"{'cannot' if problem.fatal else 'beware'}    {problem.sentence}")
    if any(problem.fatal for problem in problems):
        raise typer.Exit(2)


def _limits(slurm: Partition | None, request: Request | None, time: str | None) -> Any:
    """A job's time: as given, else as its script asks, else what the partition gives; never more than it allows."""
    from foveal.forecast.problems import Limits

    asked, whose = (request.time, request.script) if request else (None, "nobody")
    if time is not None:
        asked, whose = seconds_of(time), "--time"
        if asked is None:
            raise ConfigError(f"--time {time} is no time; write minutes, H:M:S or D-H:M:S, as for sbatch")
    if slurm is not None:
        allowed = slurm.longest if asked is not None else slurm.default or slurm.longest
        if allowed is not None and (asked is None or asked > allowed):
            asked, whose = allowed, f"partition {slurm.name}"
    return Limits(asked, request.notice if request else None, whose)
