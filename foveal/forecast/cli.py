"""Command line of `foveal plan`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from foveal.errors import CheckpointError, ConfigError, DataError
from foveal.forecast.slurm_limits import JobScriptTimes, find_slurm_partition, read_job_script_times
from foveal.slurm import SlurmPartition, parse_sbatch_time
from foveal.training.config_mistakes import locate_stage
from foveal.training.stage import STAGE_NAMES, import_stage


def resolve_stage_name(config: str, stage: str | None) -> str:
    """Return the stage of a config: as given, or by its folder, name or settings. Raises: ConfigError."""
    if stage is not None:
        if stage not in STAGE_NAMES:
            raise ConfigError(f"--stage {stage} does not exist; there are {', '.join(STAGE_NAMES)}")
        return stage
    return locate_stage(config)


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
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Model FLOPs utilisation, a fraction of the peak; default: measured to hoped for."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many training images, without data: none are read.")
    ] = None,
    bytes_per_image: Annotated[int | None, typer.Option(min=1, help="With --images: mean bytes of an image.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="With --images: number of classes.")] = None,
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
    from foveal.forecast.mfu import mfu_range
    from foveal.forecast.problems import Problem, find_problems
    from foveal.forecast.report import forecast_to_dict, format_forecast

    stated = _stated_data(images, bytes_per_image, classes)
    cluster = ClusterSpec(
        nodes,
        gpus_per_node,
        write_bytes_per_second=write_speed * 1e9,
        **mfu_range(mfu, cfg.engine.precision),
        **_describe_gpus(cfg, gpu, gpu_memory, peak_tflops),
    )
    slurm, request = find_slurm_partition(partition), read_job_script_times(planned_stage.name)
    limits = _job_limits(slurm, request, time)
    with _open_plan(planned_stage, cfg, cluster.world_size, stated) as (plan, run_problem):
        forecast = Forecast(planned_stage, plan, cluster, stated)
        problems = find_problems(forecast, limits, slurm, None if time else request)
        problems += [Problem(False, f"run: {run_problem}")] if run_problem else []
        if as_json:
            typer.echo(json.dumps(forecast_to_dict(forecast, limits, slurm, problems), indent=1))
        else:
            lines = [f"{'cannot' if problem.fatal else 'beware'}    {problem.sentence}" for problem in problems]
            typer.echo("\n".join([*format_forecast(forecast, limits, slurm), *lines]))
    if any(problem.fatal for problem in problems):
        raise typer.Exit(2)


def _stated_data(images: int | None, bytes_per_image: int | None, classes: int | None) -> Any:
    """Return the data that the command line states; None if the plan reads data. Raises: ConfigError."""
    from foveal.forecast.stated_data import StatedData

    if images is not None:
        return StatedData(images, bytes_per_image, classes)
    if bytes_per_image is not None or classes is not None:
        raise ConfigError("--bytes-per-image and --classes describe data that are not read: give --images as well")
    return None


def _describe_gpus(cfg: Any, gpu: str | None, memory_gb: float | None, tflops: float | None) -> dict[str, Any]:
    """Return peak rate and memory of a GPU: as stated, else of its model. Raises: ConfigError for an unknown model."""
    from foveal.forecast.gpu_specs import find_gpu_spec

    if gpu is not None:
        spec = find_gpu_spec(gpu, ", or give --gpu-memory and --peak-tflops")
        tflops, memory_gb = tflops or spec.peak_tflops(cfg.engine), memory_gb or spec.memory_gb
    return {
        "gpu_flops_per_second": None if tflops is None else tflops * 1e12,
        "gpu_memory_bytes": None if memory_gb is None else memory_gb * 1e9,
    }


@contextmanager
def _open_plan(stage: Any, cfg: Any, world_size: int, stated: Any) -> Iterator[tuple[Any, str | None]]:
    """Yield the plan, on data as stated if they are, and what a start would object to in the run directory.

    Raises: ConfigError, DataError, ExportError, CheckpointError.
    """
    from foveal.forecast.stated_data import open_stated_data
    from foveal.training.run_directory import inspect_run_dir, keep_rules_of_run

    if stated is not None:
        with open_stated_data(cfg.data, stated) as data:
            try:
                plan = stage.functions.build_plan(cfg.model_copy(update={"data": data}), world_size)
            except DataError as error:
                reason = str(error).replace(data.path, cfg.data.path)
                raise ConfigError(
                    f"--images, --bytes-per-image and --classes do not suffice, give them all or plan with the data at "
                    f"hand: {reason}"
                ) from None
            yield plan, None
        return
    plan, problem = stage.functions.build_plan(keep_rules_of_run(cfg), world_size), None
    try:
        path, is_finished, plan = inspect_run_dir(plan)
        problem = f"{path} is finished, so that a start would do nothing" if is_finished else None
    except CheckpointError as error:
        if cfg.run.fork is not None:
            raise
        problem = str(error)
    yield plan, problem


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
