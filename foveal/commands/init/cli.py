"""Command line of `foveal init`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveal.atomic import write_atomic
from foveal.errors import ConfigError
from foveal.forecast.cli import STAGE_NAMES, import_stage
from foveal.strict_yaml import parse_yaml

if TYPE_CHECKING:  # torch and timm come after the options
    from foveal.commands.init.data_facts import DataFacts
    from foveal.commands.init.draft import Draft
    from foveal.commands.init.recipe import Request

_DEFAULT_MINUTES = {True: 60.0, False: 10.0}  # with GPUs, and on CPUs
_MIN_SECONDS = 30.0  # a start takes half of it
_CHECKED_RANKS = (1, 2)


def init_command(
    stage: Annotated[str, typer.Argument(help="pretrain, distill or finetune.")],
    data: Annotated[str, typer.Option("--data", help="Folder or URL of indexed shards, as data.path.")],
    index: Annotated[str | None, typer.Option("--index", help="As data.index; default: --data.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; default: NAME-STAGE.yaml, by the name of the data.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the run. Default: 10 on a CPU, 60 with GPUs.")] = None,
    hours: Annotated[float | None, typer.Option(help="Time for the run, in hours.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the run: one per GPU.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU of the run, for a forecast: a100, h100, ... Default: measure on this machine."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="micro, tiny, small, base, large, or timm's name. Default: by data and hardware.")
    ] = None,
    init: Annotated[str | None, typer.Option("--init", help="finetune: export to start from.")] = None,
    teacher: Annotated[str | None, typer.Option(help="distill: export of the model that teaches.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="finetune: classification, multilabel, segmentation, detection. Default: by the labels."),
    ] = None,
    samples_per_class: Annotated[
        int | None, typer.Option(min=1, help="finetune: labelled images of each class to use. Default: all.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="finetune: train from --init and from scratch, on three seeds each.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented config of a stage that fits a data set, this machine and a time budget."""
    options = {"init": init, "teacher": teacher, "task": task, "samples_per_class": samples_per_class}
    _check_options(stage, options)
    if compare and init is None:
        raise ConfigError("--compare sets a pretrained encoder against training from scratch: give --init EXPORT too")
    asked_seconds = _parse_budget(minutes, hours)
    from foveal.commands.init.data_facts import read_data_facts
    from foveal.commands.init.recipe import Request
    from foveal.commands.init.speed import has_gpu
    from foveal.forecast.gpu_specs import find_gpu_spec

    if gpu is not None:
        find_gpu_spec(gpu)
    file = out or Path(f"{Path(data.rstrip('/')).name.removesuffix('-shards') or 'data'}-{stage}.yaml")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: give --out a file, such as {file / f'{stage}.yaml'}")
    if file.exists() and not force:
        raise ConfigError(f"{file} exists: give --out another name, or --force to replace it")
    on_gpu = gpu is not None or has_gpu()
    seconds = asked_seconds or 60 * _DEFAULT_MINUTES[on_gpu]
    request = Request(stage, seconds, ranks, on_gpu, model, **options, compare=compare)
    facts = read_data_facts(data, index)
    _write_config(facts, request, gpu, file)


def _parse_budget(minutes: float | None, hours: float | None) -> float | None:
    """Return the seconds that were asked for, if any. Raises: ConfigError."""
    if minutes is not None and hours is not None:
        raise ConfigError("--minutes and --hours exclude each other: give one of them")
    seconds = minutes * 60 if minutes is not None else hours * 3600 if hours is not None else None
    if seconds is not None and not _MIN_SECONDS <= seconds < math.inf:
        raise ConfigError(f"a run of {seconds:g} seconds is too short or endless: give --minutes 0.5 or more")
    return seconds


def _check_options(stage: str, options: dict[str, Any]) -> None:
    """Raise ConfigError for an unknown stage, and for options of another one."""
    if stage not in STAGE_NAMES:
        raise ConfigError(f"stage {stage} does not exist; there are {', '.join(STAGE_NAMES)}")
    owners = {"teacher": "distill"} | dict.fromkeys(("init", "task", "samples_per_class"), "finetune")
    for name, owner in owners.items():
        if options[name] is not None and stage != owner:
            raise ConfigError(f"--{name.replace('_', '-')} is for {owner}, and this is {stage}: leave it out")


def _write_config(facts: "DataFacts", request: "Request", gpu: str | None, file: Path) -> None:
    """Draft the config, measure its speed, set its length, check and write it, and print what it is."""
    from foveal.commands.init.schedule import format_seconds, set_schedule
    from foveal.commands.init.speed import forecast_speed, measure_speed
    from foveal.training.report import wrap_lines

    stage, draft = import_stage(request.stage), _draft(facts, request)
    first_plan = _plan(stage, draft.to_yaml([]), file, request.ranks)
    if gpu is None:
        typer.echo("measuring the speed of the model ...", err=True)
        speed = measure_speed(stage, first_plan, facts)
    else:
        speed = forecast_speed(stage, first_plan, gpu)
    length = set_schedule(draft, facts, request, speed, first_plan.steps_per_epoch)
    batch_size, command = first_plan.cfg.batch.global_size, _next_command(request, file)
    header = [
        f"Written by `foveal init {request.stage}`: {facts.num_train:,} images, {format_seconds(request.seconds)}.",
        f"Command:  {command}",
        f"Speed:    {speed.step_seconds:.2g} s for a step of {batch_size} images, {speed.source}",
    ]
    text = draft.to_yaml(header)
    ranks = sorted({request.ranks, *(number for number in _CHECKED_RANKS if batch_size % number == 0)})
    plans = {number: _plan(stage, text, file, number) for number in ranks}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.encode())
    note = f" ({length.note})" if length.note else ""
    time_line = f"time      about {format_seconds(length.seconds)}{note}: {header[2].removeprefix('Speed:    ')}"
    for line in wrap_lines([*plans[request.ranks].summary_lines(), time_line]):
        typer.echo(line)
    typer.echo(f"checked   for {' and '.join(map(str, ranks))} rank{'s' if ranks != [1] else ''}")
    typer.echo(f"written   {file}")
    typer.echo(f"next      {command}")


def _next_command(request: "Request", file: Path) -> str:
    """Return the command that starts the run: of one process, or of several on one node."""
    if request.ranks == 1:
        return f"foveal train {request.stage} {file}"
    return f"foveal train {request.stage} {file} --processes {request.ranks}"


def _draft(facts: "DataFacts", request: "Request") -> "Draft":
    if request.stage == "pretrain":
        from foveal.commands.init.pretrain_recipe import draft_pretraining

        return draft_pretraining(facts, request)
    if request.stage == "distill":
        from foveal.commands.init.distill_recipe import draft_distillation

        return draft_distillation(facts, request)
    from foveal.commands.init.finetune_recipe import draft_finetuning

    return draft_finetuning(facts, request)


def _plan(stage: Any, text: str, file: Path, ranks: int) -> Any:
    """Return the plan of a config's text, as --check makes it. Raises: FovealError, as a start."""
    cfg = stage.config_class.from_dict(parse_yaml(text), str(file))
    run = cfg.run.model_copy(update={"dir": f"runs/{file.stem}"})
    return stage.functions.build_plan(cfg.model_copy(update={"run": run}), ranks)
