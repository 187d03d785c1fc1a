"""`foveal plan`: the command line."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.errors import ConfigError
from foveal.forecast.slurm_limits import (
    JobScriptRequest,
    SlurmPartition,
    find_slurm_partition,
    parse_slurm_time,
    read_job_script_request,
)

STAGE_NAMES = ("pretrain", "distill", "finetune")


def resolve_stage_name(config: str, stage: str | None) -> str:
    """The stage that a config is of: the one given, or that of its folder. Raises: ConfigError."""
    if stage is not None:
        if stage not in STAGE_NAMES:
            raise ConfigError(f"--stage {stage} does not exist; there are {', '.join(STAGE_NAMES)}")
        return stage
    folder = Path(config).parent.name
    if folder in STAGE_NAMES:
        return folder
    found = [each for each in STAGE_NAMES if Path("configs", each, f"{config}.yaml").is_file()]
    if len(found) != 1:
        raise ConfigError(
            f"which stage {config} is of cannot be seen from its place; give --stage {'|'.join(STAGE_NAMES)}"
        )
    return found[0]


def import_stage(name: str) -> Any:
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
    from foveal.forecast.forecast import ClusterSpec, Forecast
    from foveal.forecast.gpu_specs import find_gpu_spec
    from foveal.forecast.problems import find_problems
    from foveal.forecast.report import forecast_to_dict, format_forecast
    from foveal.training.cli import load_config

    found = import_stage(resolve_stage_name(config, stage))
    cfg = load_config(found.config, found.name, config, overrides or [])
    card = None if gpu is None else find_gpu_spec(gpu)
    rate = peak_tflops or (card.peak_tflops(cfg.engine) if card else None)
    size = gpu_memory or (card.memory_gb if card else None)
    machine = ClusterSpec(
        nodes,
        gpus_per_node,
        mfu,
        write_speed * 1e9,
        peak_flops_per_second=None if rate is None else rate * 1e12,
        gpu_memory_bytes=None if size is None else size * 1e9,
    )
    forecast = Forecast(found, found.plan(cfg, machine.world_size), machine)
    slurm, request = find_slurm_partition(partition), read_job_script_request(found.name)
    limits = _job_limits(slurm, request, time)
    problems = find_problems(forecast, limits, slurm, None if time else request)
    if as_json:
        typer.echo(json.dumps(forecast_to_dict(forecast, limits, slurm, problems), indent=1))
    else:
        for line in format_forecast(forecast, limits, slurm):
            typer.echo(line)
        for problem in problems:
            typer.echo(f"{'cannot' if problem.fatal else 'beware'}    {problem.sentence}")
    if any(problem.fatal for problem in problems):
        raise typer.Exit(2)


def _job_limits(slurm: SlurmPartition | None, request: JobScriptRequest | None, time: str | None) -> Any:
    """A job's time: as given, else as its script asks, else what the partition gives; never more than it allows."""
    from foveal.forecast.problems import JobLimits

    asked, whose = (request.time_seconds, request.script) if request else (None, "nobody")
    if time is not None:
        asked, whose = parse_slurm_time(time), "--time"
        if asked is None:
            raise ConfigError(f"--time {time} is no time; write minutes, H:M:S or D-H:M:S, as for sbatch")
    if slurm is not None:
        allowed = slurm.longest if asked is not None else slurm.default or slurm.longest
        if allowed is not None and (asked is None or asked > allowed):
            asked, whose = allowed, f"partition {slurm.name}"
    return JobLimits(asked, request.notice_seconds if request else None, whose)
