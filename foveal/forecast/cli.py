"""Command line of `foveal plan`."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.errors import ConfigError
from foveal.forecast.slurm_limits import JobScriptTimes, find_slurm_partition, read_job_script_times
from foveal.slurm import SlurmPartition, parse_sbatch_time

STAGE_NAMES = ("pretrain", "distill", "finetune")


def resolve_stage_name(config: str, stage: str | None) -> str:
    """Return the stage of a config: as given, or from its folder. Raises: ConfigError if unknown or ambiguous."""
    if stage is not None:
        if stage not in STAGE_NAMES:
            raise ConfigError(f"--stage {stage} does not exist; there are {', '.join(STAGE_NAMES)}")
        return stage
    folder = Path(config).parent.name
    if folder in STAGE_NAMES:
        return folder
    candidates = [name for name in STAGE_NAMES if Path("configs", name, f"{config}.yaml").is_file()]
    if len(candidates) != 1:
        raise ConfigError(f"the folder of {config} does not determine its stage; give --stage {'|'.join(STAGE_NAMES)}")
    return candidates[0]


def import_stage(name: str) -> Any:
    """Return a stage by name. The import is dynamic, because stages import foveal and never the reverse."""
    return importlib.import_module(f"{name}.run").STAGE


def plan_command(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one in configs/STAGE/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node, one rank each.")] = 1,
    stage: Annotated[
        str | None, typer.Option(help="pretrain, distill or finetune; default: from CONFIG's folder.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="GPU model: a100, a100-40, l40s, h100, h200, b200.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GPU memory in GB; default: from --gpu.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="Peak TFLOP/s of a GPU; default: from --gpu.")] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Model FLOPs utilisation, a fraction of the peak.")
    ] = 0.4,
    partition: Annotated[str | None, typer.Option(help="Slurm partition; default: Slurm's default.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit of a job, as for sbatch; default: from the job script.")
    ] = None,
    write_speed: Annotated[float, typer.Option(help="Write bandwidth to the run directory, all ranks, in GB/s.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast memory, time and traffic of CONFIG on a cluster, without a GPU. Exit code 2 if it cannot run."""
    from foveal.training.cli import load_config

    planned_stage = import_stage(resolve_stage_name(config, stage))
    cfg = load_config(planned_stage.config_class, planned_stage.name, config, overrides or [])
    from foveal.forecast.forecast import ClusterSpec, Forecast  # with torch: after the settings
    from foveal.forecast.gpu_specs import find_gpu_spec
    from foveal.forecast.problems import find_problems
    from foveal.forecast.report import forecast_to_dict, format_forecast
    from foveal.training.run_directory import preview_fork

    gpu_spec = None if gpu is None else find_gpu_spec(gpu)
    tflops = peak_tflops or (gpu_spec.peak_tflops(cfg.engine) if gpu_spec else None)
    memory_gb = gpu_memory or (gpu_spec.memory_gb if gpu_spec else None)
    cluster = ClusterSpec(
        nodes,
        gpus_per_node,
        mfu,
        write_speed * 1e9,
        gpu_flops_per_second=None if tflops is None else tflops * 1e12,
        gpu_memory_bytes=None if memory_gb is None else memory_gb * 1e9,
    )
    plan = preview_fork(planned_stage.functions.build_plan(cfg, cluster.world_size))
    forecast = Forecast(planned_stage, plan, cluster)
    slurm, request = find_slurm_partition(partition), read_job_script_times(planned_stage.name)
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


def _job_limits(slurm: SlurmPartition | None, request: JobScriptTimes | None, time: str | None) -> Any:
    """Return a job's time limit: --time, else the job script's, else the partition's default; at most its maximum."""
    from foveal.forecast.problems import JobLimits

    seconds, source = (request.time_limit_seconds, request.script) if request else (None, "nobody")
    if time is not None:
        seconds, source = parse_sbatch_time(time), "--time"
        if seconds is None:
            raise ConfigError(f"--time {time} is not a time; write minutes, H:M:S or D-H:M:S, as for sbatch")
    if slurm is not None:
        limit = slurm.longest if seconds is not None else slurm.default or slurm.longest
        if limit is not None and (seconds is None or seconds > limit):
            seconds, source = limit, f"partition {slurm.name}"
    return JobLimits(seconds, request.notice_seconds if request else None, source)
