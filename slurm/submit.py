"""Chain stages: ``python slurm/submit.py PIPELINE [--cluster slurm|local] [key=value ...]``.

A pipeline is a YAML list of ``{name, stage, config, set: {dotted: value}, from: {dotted: name}}``. ``from`` sets a setting
to the export folder of an earlier stage of the list (``name/student``: the export of one of several students) and makes
this stage depend on it. All configs are validated before anything is started. Overrides are ``<name>.<dotted>=value`` for
one stage and ``slurm.<option of sbatch>=value`` for every job (array: for the jobs with folds).
"""

import argparse
import contextlib
import difflib
import io
import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml

from distill.config import DistillConfig
from finetune.config import FinetuneConfig
from foveal.distributed.local_launch import run_local_ranks
from foveal.errors import ConfigError, FovealError, LaunchError
from foveal.interrupt import INTERRUPTED_EXIT_CODE
from foveal.runs.pipeline import PlannedStage, write_pipeline
from foveal.slurm import can_submit_jobs, cancel_jobs, parse_sbatch_options
from foveal.strict_yaml import parse_yaml, read_yaml
from foveal.training.config import StageConfig
from foveal.training.config_files import find_config, is_path, list_configs
from foveal.training.config_mistakes import locate_config
from pretrain.config import PretrainConfig

_STAGES: dict[str, tuple[type[StageConfig], str]] = {
    "pretrain": (PretrainConfig, "slurm/pretrain_mae.sh"),
    "distill": (DistillConfig, "slurm/distill.sh"),
    "finetune": (FinetuneConfig, "slurm/finetune.sh"),
}
_KEYS = ("name", "stage", "config", "set", "from")
_log = logging.getLogger("foveal.submit")


@dataclass(frozen=True)
class PipelineStage:
    """One element of a pipeline file."""

    name: str
    stage: str
    config: str
    settings: Mapping[str, Any]
    export_source_by_setting: Mapping[str, str]  # setting -> stage whose export it gets, or stage/student


@dataclass(frozen=True)
class StageJob:
    """One stage, ready to start: ``python -m <stage>.run CONFIG OVERRIDES`` after its dependencies."""

    name: str
    stage: str
    config_path: Path
    overrides: tuple[str, ...]
    depends_on: tuple[str, ...]
    run_dir: Path
    num_processes: int | None
    has_folds: bool = False  # folds are shared by the tasks of a Slurm array

    @property
    def python_args(self) -> list[str]:
        """The arguments of ``python``."""
        return ["-m", f"{self.stage}.run", str(self.config_path), *self.overrides]


# --- from a file to jobs ---


def _find_pipeline(name_or_path: str) -> Path:
    """Return the file of a pipeline, searched as configs are. Raises: ConfigError for an unknown name."""
    file = find_config("pipelines", name_or_path)
    if file is None and not is_path(name_or_path):
        names = list(list_configs("pipelines"))
        raise ConfigError(f"there is no pipeline '{name_or_path}'{_suggest_nearest(name_or_path, names)}")
    return file or Path(name_or_path)


def read_pipeline(file: Path) -> list[PipelineStage]:
    """Read the stages of a pipeline file. Raises: ConfigError, naming the file and the element."""
    elements = read_yaml(file)
    if not isinstance(elements, list) or not elements:
        raise ConfigError(f"{file}: a list of stages is expected, each with {', '.join(_KEYS)}")
    entries = [_parse_stage(element, f"{file}: element {number}") for number, element in enumerate(elements, 1)]
    names = [entry.name for entry in entries]
    for number, entry in enumerate(entries):
        if entry.name in names[:number]:
            raise ConfigError(f"{file}: '{entry.name}' names two stages; give each its own name")
        for key, source in entry.export_source_by_setting.items():
            name = source.partition("/")[0]
            if name not in names[:number]:
                hint = "it comes later: list it first"
                hint = hint if name in names else f"there is no such stage{_suggest_nearest(name, names)}"
                raise ConfigError(f"{file}: stage '{entry.name}': from.{key} wants '{name}', but {hint}")
    return entries


def _parse_stage(element: Any, where: str) -> PipelineStage:
    if not isinstance(element, dict):
        raise ConfigError(f"{where}: a mapping with {', '.join(_KEYS)} is expected, this is {type(element).__name__}")
    for key in element:
        if key not in _KEYS:
            raise ConfigError(f"{where}: '{key}' is not a key of a stage; there are {', '.join(_KEYS)}")
    for key in ("name", "stage", "config"):
        if not isinstance(element.get(key), str):
            raise ConfigError(f"{where}: {key} is missing or not text")
    name, stage = element["name"], element["stage"]
    if not name.replace("-", "").replace("_", "").isalnum() or name == "slurm":
        raise ConfigError(f"{where}: '{name}' cannot be a stage's name; use letters, digits, - and _, and not 'slurm'")
    if stage not in _STAGES:
        raise ConfigError(f"{where}: there is no stage '{stage}'{_suggest_nearest(stage, list(_STAGES))}")
    settings, inputs = element.get("set") or {}, element.get("from") or {}
    if not isinstance(settings, dict) or not isinstance(inputs, dict):
        raise ConfigError(
            f"{where}: set and from are mappings, of settings to values and of settings to names of stages"
        )
    return PipelineStage(
        name, stage, element["config"], settings, {str(key): str(value) for key, value in inputs.items()}
    )


def build_jobs_and_options(pipeline_file: Path, overrides: Sequence[str]) -> tuple[list[StageJob], dict[str, str]]:
    """Return a pipeline's jobs, each validated with the exact strings it will be started with, and the sbatch options.

    ``run.dir`` is runs/<pipeline>/<name> unless ``set`` or an override states another; the stage's config is ignored.
    Raises: ConfigError, naming the pipeline, the stage and the setting.
    """
    jobs: dict[str, StageJob] = {}
    exports: dict[str, tuple[str, ...]] = {}
    entries = read_pipeline(pipeline_file)
    overrides_by_stage = _group_overrides(overrides, [*(entry.name for entry in entries), "slurm"])
    for entry in entries:
        settings = {
            "run.dir": f"runs/{pipeline_file.stem}/{entry.name}",
            "run.pipeline": f"runs/{pipeline_file.stem}",
            **entry.settings,
        }
        inputs = {key: source.partition("/") for key, source in entry.export_source_by_setting.items()}
        settings |= {
            key: f"{jobs[name].run_dir}/export{slash}{student}" for key, (name, slash, student) in inputs.items()
        }
        texts = (
            *(f"{key}={_format_override_value(value)}" for key, value in settings.items()),
            *overrides_by_stage[entry.name],
        )
        try:
            config = locate_config(entry.stage, entry.config)
            cfg = _STAGES[entry.stage][0].load(config, texts)
            exports[entry.name] = cfg.export_subfolders
            if wrong := next((name for name, _, student in inputs.values() if student not in exports[name]), None):
                sources = ", ".join(f"{wrong}/{student}" if student else wrong for student in exports[wrong])
                raise ConfigError(f"the exports of '{wrong}' are named {sources}")
            if cfg.run.fresh or cfg.run.dir is None:
                raise ConfigError("run.fresh=true and run.dir=null leave the name of the export open; set run.dir")
        except ConfigError as error:
            raise ConfigError(f"{pipeline_file}: stage '{entry.name}': {error}") from None
        job = StageJob(
            name=entry.name,
            stage=entry.stage,
            config_path=config,
            overrides=texts,
            depends_on=tuple(dict.fromkeys(name for name, _, _ in inputs.values())),
            run_dir=Path(cfg.run.dir),
            num_processes=cfg.run.processes,
            has_folds=isinstance(cfg, FinetuneConfig) and cfg.cross_validation is not None,
        )
        if same := [other.name for other in jobs.values() if other.run_dir == job.run_dir]:
            raise ConfigError(
                f"{pipeline_file}: '{same[0]}' and '{job.name}' have the same run.dir {job.run_dir}; give each its own"
            )
        jobs[job.name] = job
    options = {name: value for name, _, value in (text.partition("=") for text in overrides_by_stage["slurm"])}
    if "array" in options and not any(job.has_folds for job in jobs.values()):
        raise ConfigError(f"{pipeline_file}: slurm.array is for the stages that have folds, and none has; leave it out")
    return list(jobs.values()), options


def _group_overrides(overrides: Sequence[str], names: list[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or "=" in name or "=" not in rest:
            raise ConfigError(f"'{override}' is not an override of a pipeline; write <stage>.<dotted.key>=value")
        if name not in grouped:
            raise ConfigError(f"'{override}': there is no stage '{name}'{_suggest_nearest(name, names)}")
        grouped[name].append(rest)
    return grouped


def _format_override_value(value: Any) -> str:
    """Format a value as the right-hand side of an override, which the stage parses as YAML."""
    try:
        if isinstance(value, str) and parse_yaml(value) == value:
            return value
    except (yaml.YAMLError, ConfigError):
        pass
    return json.dumps(value, ensure_ascii=False, default=str)


def _suggest_nearest(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f". Did you mean '{close[0]}'?" if close else f"; there are {', '.join(words)}"


def _record_stages(folder: Path, jobs: Sequence[StageJob], ids: Mapping[str, str] = MappingProxyType({})) -> None:
    """Record the stages for ``foveal status``, which can then show those that have not begun."""
    try:
        write_pipeline(folder, [PlannedStage(job.name, job.stage, job.run_dir, ids.get(job.name)) for job in jobs])
    except (OSError, FovealError) as error:
        _log.warning("%s: the list of stages is not written (%s)", folder, error)


# --- on Slurm ---


def submit_jobs(jobs: Sequence[StageJob], log_dir: Path, sbatch_options: Mapping[str, str]) -> dict[str, str]:
    """Submit all jobs with their dependencies, or none; return their ids by name.

    Raises: LaunchError if sbatch is missing or refuses a job.
    """
    if not can_submit_jobs():
        raise LaunchError(
            "there is no sbatch and srun here; submit from a login node, or run the chain here with --cluster local"
        )
    ids: dict[str, str] = {}
    for job in jobs:
        script = Path(_STAGES[job.stage][1])
        if not script.exists():
            raise LaunchError(f"{Path.cwd()} has no {script}; call submit.py in the root of the repository")
        options = {
            name.replace("-", "_"): value for name, value in sbatch_options.items() if name != "array" or job.has_folds
        }
        resources = read_sbatch_options(script) | options
        conditions = [f"afterok:{':'.join(ids[name] for name in job.depends_on)}"] if job.depends_on else []
        conditions += [resources["dependency"]] if "dependency" in resources else []
        if conditions:
            resources |= {"dependency": ",".join(conditions), "kill_on_invalid_dep": "yes"}
        try:
            ids[job.name] = _submit_command(
                log_dir, resources, ["bash", str(script), str(job.config_path), *job.overrides]
            )
        except LaunchError as error:
            if ids:
                cancel_jobs(ids.values())
            raise LaunchError(f"{job.name}: {error}{'; the jobs before it are cancelled' if ids else ''}") from None
        wait = f" after {', '.join(f'{ids[name]} ({name})' for name in job.depends_on)}" if job.depends_on else ""
        sys.stdout.write(f"{ids[job.name]} {job.name}{wait} -> {job.run_dir}\n")
    return ids


def read_sbatch_options(script: Path) -> dict[str, str]:
    """Read the options of a script's #SBATCH lines, where a stage's resources are stated; a bare option is 'true'."""
    options = parse_sbatch_options(script.read_text())
    if options.other_words:
        raise LaunchError(f"{script}: '{options.other_words[0]}' in an #SBATCH line: write options as --name=value")
    return dict(options.values)


def _submit_command(folder: Path, resources: Mapping[str, str], command: Sequence[str]) -> str:
    """Submit a command line with submitit and return the job's id.

    The batch script runs the stage's own job script, so a chained job equals ``sbatch slurm/<stage>.sh``: submitit's
    pickled function, srun line and signal handler (USR2) are not used. Options that submitit does not know go through its
    ``additional_parameters``.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    folder.mkdir(parents=True, exist_ok=True)
    executor = SlurmExecutor(folder)
    options = {name: True if value == "true" else value for name, value in resources.items() if value != "false"}
    executor.update_parameters(use_srun=False, stderr_to_stdout=True, wckey=None, additional_parameters=options)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            return executor._submit_command(f"exec {shlex.join(command)}").job_id  # noqa: SLF001 - the public one pickles
    except (FailedJobError, FailedSubmissionError) as error:
        raise LaunchError(f"sbatch refused the job: {' '.join(str(error).split())}") from None


# --- on this machine ---


def run_jobs_locally(jobs: Sequence[StageJob]) -> int:
    """Run the jobs one after another on this machine; return 0, or the exit code of the first that did not finish."""
    for number, job in enumerate(jobs, 1):
        processes = job.num_processes or _count_devices()
        _log.info("[%d/%d] %s -> %s (processes: %d)", number, len(jobs), job.name, job.run_dir, processes)
        started = time.time()
        code = run_local_ranks(job.python_args, processes)
        if code == INTERRUPTED_EXIT_CODE:
            _log.error("foveal: stopped in stage '%s': start again to continue", job.name)
        elif code:
            after = "" if number == len(jobs) else "; nothing after it was started"
            _log.error("foveal: stage '%s' ended with exit code %d%s%s", job.name, code, _name_log(job, started), after)
        elif not (job.run_dir / "finished.json").exists():
            code = LaunchError.exit_code
            _log.error(
                "foveal: stage '%s' left before its end; the same command goes on from its checkpoint in %s",
                job.name,
                job.run_dir,
            )
        if code:
            return code
    return 0


def _name_log(job: StageJob, started: float) -> str:
    """Return the log of rank 0 in parentheses if the stage has written one since it was started."""
    log = job.run_dir / "logs" / "rank-000.log"
    return f" (log: {log})" if log.exists() and log.stat().st_mtime >= started else ""


def _count_devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Validate, then submit or run; a mistake of the user is one sentence and exit code 2."""
    logging.basicConfig(format="%(message)s")
    _log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(prog="submit.py", description="Chain the stages of a pipeline.")
    parser.add_argument("pipeline", help="a YAML list of stages, or NAME for configs/pipelines/NAME.yaml")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="where (default: slurm)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="<stage>.<key>=value, slurm.<option>=value")
    options = parser.parse_intermixed_args(argv)
    try:
        pipeline = _find_pipeline(options.pipeline)
        jobs, sbatch = build_jobs_and_options(pipeline, options.overrides)
        folder = Path("runs", pipeline.stem)
        if options.cluster == "slurm":
            _record_stages(folder, jobs, submit_jobs(jobs, folder / "slurm", sbatch))
            sys.exit(0)
        if sbatch:
            _log.warning("--cluster local asks nothing of Slurm: slurm.%s is ignored", ", slurm.".join(sbatch))
        _record_stages(folder, jobs)
        sys.exit(run_jobs_locally(jobs))
    except KeyboardInterrupt:
        sys.stderr.write("foveal: stopped: start again to continue\n")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except FovealError as error:
        sys.stderr.write(f"foveal: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
