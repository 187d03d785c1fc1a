"""The start of a stage with valid settings: join the other ranks, plan, open the run directory, train."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from foveal.data.storage.listing import list_files_if
from foveal.distributed.gpu_allocation import check_slurm_gpus
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.preemption import Preemption, handle_stop_signals, ignore_stop_signals
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.world import World, init_world
from foveal.redact import redact
from foveal.timeouts import call_with_timeout
from foveal.training.config import StageConfig
from foveal.training.report import wrap_lines
from foveal.training.run_directory import keep_rules_of_run, open_run
from foveal.training.stage import Stage

_REPORT_SECONDS = 120.0  # a folder of runs may be large or hang, and srun ends rank 0 five minutes after the others
_log = logging.getLogger("foveal")


def join_and_run(stage: Stage[Any, Any], cfg: StageConfig, launch_env: LaunchEnv) -> None:
    """Run a stage in this process's place among the launched ranks."""
    if (idle_gpus := check_slurm_gpus(launch_env)) and launch_env.local_rank == 0:
        _log.warning(idle_gpus)
    identity = RunIdentity.from_launch_env(launch_env, stage.name, cfg, cfg.run.dir)
    with init_world(cfg.engine.timeout_minutes * 60, identity) as world:
        world.barrier()  # rank 0 may still prepare the inputs of a default config
        if world.rank:
            logging.getLogger().handlers[0].setLevel(logging.ERROR)  # other ranks log to their own files
        run_stage(stage, cfg, world)
        ignore_stop_signals()  # the run is complete: a late signal must not turn it into a failure


def run_stage(stage: Stage[Any, Any], cfg: StageConfig, world: World) -> None:
    """Run a stage on the ranks of a world."""
    cfg = keep_rules_of_run(cfg, world)
    with handle_stop_signals(world) as preemption:
        if stage.functions.dispatch_runs is None:
            _execute_run(stage, world, preemption, cfg)
        else:
            stage.functions.dispatch_runs(cfg, world, partial(_execute_run, stage, world, preemption))


def _execute_run(stage: Stage[Any, Any], world: World, preemption: Preemption, cfg: StageConfig) -> bool:
    """Execute one run of a stage and return whether it is finished, by this attempt or an earlier one.

    Raises: RankConflictError if science differs between ranks, for example the data that a node sees.
    """
    with list_files_if(world.local_rank == 0):
        plan = world.run_all_or_raise(lambda: stage.functions.build_plan(cfg, world.size))
    world.check_equal_on_ranks({"run.dir": cfg.run.dir, **plan.science_settings()})
    with open_run(stage.name, plan, world, preemption) as run:
        if run is None:
            return True
        lines = run.plan.summary_lines()
        for line in wrap_lines(lines) if sys.stderr.isatty() else lines:  # whole lines where a reader searches them
            _log.info(line)
        stage.functions.train(run.plan, run)
    if run.is_finished and world.rank == 0 and plan.cfg.log.report and not run.is_part:
        try:
            call_with_timeout(_REPORT_SECONDS, lambda: _write_reports(run.path, plan.cfg.run.pipeline))
        except TimeoutError as error:
            _log.warning("%s is finished, and its report is not written (%s)", run.path, error)
    return run.is_finished


def _write_reports(run_dir: Path, pipeline_dir: str | None) -> None:
    """Write the report of a finished run, and that of its pipeline, which the stage that finishes last completes.

    The run is closed and lacks nothing: whatever goes wrong here is one warning.
    """
    curves = None
    with _warn_instead(run_dir, f"{run_dir} is finished, and its report"):
        from foveal.report.report import write_report_at_end  # jinja2, at the end of a run

        file, curves = write_report_at_end(run_dir)
        _log.info("report    %s", file)
    if pipeline_dir is None:
        return
    with _warn_instead(Path(pipeline_dir), f"{run_dir} is finished, and the report of its pipeline"):
        from foveal.report.report import write_report_of_pipeline

        _log.info("report    %s", write_report_of_pipeline(Path(pipeline_dir), run_dir, curves))


@contextmanager
def _warn_instead(folder: Path, subject: str) -> Iterator[None]:
    """Log whatever ends the block as a warning with the command that writes the report of the folder."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a page must not end a run that is finished
        problem = f"{type(error).__name__}: {redact(str(error))}"
        _log.warning("%s is not written (%s); foveal report %s writes it later", subject, problem, folder)
