"""The runs in a folder at a time, and the stages of its pipelines that have not begun."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foveal.errors import CheckpointError, FovealError
from foveal.runs.job_lookup import JobLookup
from foveal.runs.live_status import TABLE_BYTES, RunStatus, read_status
from foveal.runs.pipeline import PlannedStage, read_pipeline_stages
from foveal.runs.record import explain_no_run, is_run, list_runs, name_path, read_run
from foveal.slurm import SlurmJobStatus

_LIVE_STATES = ("running", "waiting")
_UNKNOWN_SECONDS = 3600.0  # an attempt whose state is unknown counts as live so long after its last sign


@dataclass(frozen=True)
class StageNotBegun:
    """A stage of a pipeline without a run directory yet; job: what Slurm says of its job."""

    planned: PlannedStage
    job: SlurmJobStatus | None


@dataclass(frozen=True)
class UnreadableRun:
    """A run directory that cannot be read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Overview:
    """What is in a folder: runs in the order of their first attempts. A folder that is a run holds itself alone."""

    folder: Path
    is_run: bool
    runs: tuple[RunStatus, ...]
    not_begun: tuple[StageNotBegun, ...] = ()
    unreadable: tuple[UnreadableRun, ...] = ()

    def is_live(self, now: float) -> bool:
        """Whether anything may still change: a run is under way, or a stage will begin by itself."""
        for run in self.runs:
            is_uncertain = (
                run.state == "unknown" and now - (run.last_sign_at or run.started_at or 0.0) < _UNKNOWN_SECONDS
            )
            # A preemption: the attempt has ended before its job is back in the queue.
            is_requeued = run.state == "saved-and-left" and run.job is not None and run.job.has_processes
            if run.state in _LIVE_STATES or is_uncertain or is_requeued:
                return True
        if any(stage.job is not None and (stage.job.is_pending or stage.job.has_processes) for stage in self.not_begun):
            return True
        # A pipeline on one machine starts its next stage some seconds after the one before has finished.
        is_chain = any(stage.planned.job is None for stage in self.not_begun)
        last_sign_at = max((_find_last_sign(run) for run in self.runs), default=now)
        is_complete = all(run.state == "finished" for run in self.runs)
        return is_chain and is_complete and now - last_sign_at < _UNKNOWN_SECONDS


def read_overview(folder: Path, now: float, jobs: JobLookup | None = None) -> Overview:
    """Return the run, or the runs and stages, in a folder at ``now``, unix seconds.

    Raises: CheckpointError if the folder holds neither, or is a run that cannot be read.
    """
    if is_run(folder):
        return Overview(folder, True, (read_status(read_run(folder), now, jobs),))
    stages = list(_read_stages(folder))
    found = dict.fromkeys(run.resolve() for run in list_runs(folder)) if folder.is_dir() else {}
    begun = dict.fromkeys(stage.run_dir.resolve() for stage in stages if is_run(stage.run_dir))
    if not found and not stages:
        raise CheckpointError(explain_no_run(folder))
    runs: list[RunStatus] = []
    unreadable: list[UnreadableRun] = []
    for run in found | begun:
        try:
            runs.append(read_status(read_run(_shorten(run, folder)), now, jobs, TABLE_BYTES))
        except (FovealError, OSError, ValueError) as error:
            unreadable.append(UnreadableRun(run, name_path(run, error)))
    runs.sort(key=lambda status: status.first_started_at or 0.0)
    waiting = [
        StageNotBegun(stage, jobs.find_by_id(stage.job) if jobs is not None and stage.job else None)
        for stage in stages
        if not is_run(stage.run_dir)
    ]
    return Overview(folder, False, tuple(runs), tuple(waiting), tuple(unreadable))


def _find_last_sign(run: RunStatus) -> float:
    """Return when a run wrote its newest row or heartbeat, or was finished; unix seconds."""
    signs = [run.last_sign_at, run.started_at]
    with contextlib.suppress(OSError):
        signs.append((run.path / "finished.json").stat().st_mtime)
    return max(filter(None, signs), default=0.0)


def _read_stages(folder: Path) -> Iterator[PlannedStage]:
    """Yield the stages of the pipeline that a folder is, or of those in it. A damaged list is passed over."""
    try:
        folders = [folder, *sorted(child for child in folder.iterdir() if (child / "pipeline.json").exists())]
    except OSError:
        return
    for each in folders:
        try:
            yield from read_pipeline_stages(each)
        except (CheckpointError, OSError):
            continue


def _shorten(run: Path, folder: Path) -> Path:
    """Return the path of a run through the folder, as it was typed, if it lies there."""
    resolved = folder.resolve()
    return folder / run.relative_to(resolved) if run.is_relative_to(resolved) else run
