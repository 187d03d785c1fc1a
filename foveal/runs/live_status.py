"""What can be said about a run at a time: progress, rates, evaluations, checkpoints, its job. Nothing is written.

A run that is under way changes while it is read: files vanish, appear and grow. What cannot be read is None, never an
error, except for the files without which nothing is known of a run (``read_run``).
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.checkpoint.retention import CheckpointDirectory
from foveal.errors import CheckpointError
from foveal.redact import redact
from foveal.renames import translate_metrics
from foveal.runs.best_result import BestResult, find_best_result
from foveal.runs.job_lookup import JobLookup
from foveal.runs.recent_rows import LossTrend, RecentRows, summarize_rows
from foveal.runs.record import NESTED_FOLDERS, RunRecord, read_run
from foveal.runs.run_state import StateReport, StatusState, find_state
from foveal.slurm import SlurmJobStatus
from foveal.tracking.tail import MAX_TAIL_BYTES, read_last_rows
from foveal.training.lease import read_relevant_start_steps

_MIN_STALL_SECONDS, _STALL_FACTOR = 120.0, 5.0  # no row for five times the longest gap between rows
_CHUNK_BYTES = 1 << 20
TABLE_BYTES = 1 << 16  # of the rows of each of many runs


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint; saved_at: unix seconds."""

    step: int
    saved_at: float | None
    path: Path


@dataclass(frozen=True)
class Evaluation:
    """The results of the evaluation after a step, by logged name."""

    step: int
    results: Mapping[str, float]


@dataclass(frozen=True)
class NestedProgress:
    """How far a run of trials, folds or probes is. total: None if no plan says it. current: the ones under way."""

    noun: str
    num_finished: int
    total: int | None
    current: tuple["RunStatus", ...] = ()
    seconds_left: float | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run at a time. Times are unix seconds, durations seconds; None: not known.

    reason: why the newest attempt ended, or the evidence for the state. stop_step: where the newest attempt ends, which is
    below ``total_steps`` under run.stop_at_step. is_stalled: the run is alive and has written no row for much longer than
    usual. epoch: that of the newest step, from 1. first_started_at, started_at: of the first and the newest attempt.
    last_sign_at: the newest row or heartbeat. duration_seconds: of all attempts. last_end: why the newest attempt that
    ended did so.
    """

    path: Path
    name: str
    stage: str
    state: StatusState
    reason: str
    is_stalled: bool
    step: int | None
    total_steps: int | None
    stop_step: int | None
    epoch: int | None
    num_epochs: int | None
    rows: RecentRows
    first_started_at: float | None
    started_at: float | None
    last_sign_at: float | None
    heartbeat_at: float | None
    seconds_left: float | None
    duration_seconds: float
    checkpoint: SavedCheckpoint | None
    newest_evaluation: Evaluation | None
    best: BestResult | None
    num_attempts: int
    last_end: str
    num_refused_updates: int
    num_rollbacks: int
    num_quarantined: int
    host: str | None
    num_ranks: int | None
    job: SlurmJobStatus | None
    nested: NestedProgress | None
    exports: tuple[Path, ...] = field(default=())

    @property
    def fraction(self) -> float | None:
        """The finished part of the run, in [0, 1]."""
        if self.state == "finished":
            return 1.0
        if self.nested is not None:
            return self.nested.num_finished / self.nested.total if self.nested.total else None
        return None if self.step is None or not self.total_steps else min(self.step / self.total_steps, 1.0)

    @property
    def trend(self) -> LossTrend | None:
        """The mean losses of the newest steps and of as many before."""
        return self.rows.trend


def read_status(
    record: RunRecord, now: float, jobs: JobLookup | None = None, max_bytes: int = MAX_TAIL_BYTES
) -> RunStatus:
    """Return the status of a run at ``now``, unix seconds; ``jobs``: asks Slurm, None: Slurm is not asked.

    Of metrics.jsonl the last ``max_bytes`` are read: less for one of many runs.
    """
    last, plan = record.attempts[-1] if record.attempts else None, record.plan
    job = jobs.find(last.holder) if jobs is not None and last is not None and not record.finished else None
    report = find_state(record, job, now)
    started_at = last.started_at if last is not None else None
    rows = _read_rows(record.path, started_at or 0.0, max_bytes)
    nested = _read_nested(record, report.state, now)
    step = _find_step(record, rows)
    ends = [attempt.reason for attempt in record.attempts if attempt.reason]
    evaluations = {**_read_saved_evaluations(record.path), **rows.evaluations}
    newest = max(evaluations, default=None)
    steps_per_epoch = plan.steps_per_epoch if plan is not None and nested is None else 0
    return RunStatus(
        path=record.path,
        name=record.name,
        stage=record.stage,
        state=report.state,
        reason=redact(report.evidence),
        is_stalled=_is_stalled(report.state, rows, nested, now),
        step=step,
        total_steps=plan.total_steps if plan is not None else None,
        stop_step=plan.stop_step if plan is not None else None,
        epoch=math.ceil(step / steps_per_epoch) if step and steps_per_epoch else None,
        num_epochs=plan.total_steps // steps_per_epoch if plan is not None and steps_per_epoch else None,
        rows=rows,
        first_started_at=record.attempts[0].started_at if record.attempts else None,
        started_at=started_at,
        last_sign_at=max(filter(None, [rows.written_at, report.heartbeat_at]), default=None),
        heartbeat_at=report.heartbeat_at,
        seconds_left=_estimate_seconds_left(record, report, rows, nested, now),
        duration_seconds=_sum_durations(record, report, rows, now),
        checkpoint=_find_checkpoint(record.path),
        newest_evaluation=None if newest is None else Evaluation(newest, evaluations[newest]),
        best=find_best_result(evaluations, record.settings, record.finished, rows.training_names),
        num_attempts=len(record.attempts),
        last_end=redact(ends[-1]) if ends else "",
        num_refused_updates=_count_lines(record.path / "refused.jsonl"),
        num_rollbacks=_count_lines(record.path / "rollbacks.jsonl"),
        num_quarantined=_count_lines(record.path / "quarantine.jsonl"),
        host=last.holder.host if last is not None and last.holder is not None else None,
        num_ranks=last.holder.ranks if last is not None and last.holder is not None else None,
        job=job,
        nested=nested,
        exports=record.exports if record.finished else (),
    )


def _read_rows(run_dir: Path, since: float, max_bytes: int) -> RecentRows:
    try:
        return summarize_rows(read_last_rows(run_dir / "metrics.jsonl", max_bytes), since)
    except OSError:  # a network file system that does not answer now
        return RecentRows()


def _find_step(record: RunRecord, rows: RecentRows) -> int | None:
    summary_step = record.finished.get("summary", {}).get("step")
    if isinstance(summary_step, int | float):
        return int(summary_step)
    last = record.attempts[-1] if record.attempts else None
    recorded = [] if last is None else [last.end_step, last.start_step]
    return next((step for step in [rows.step, *recorded] if step is not None), None)


def _is_stalled(state: StatusState, rows: RecentRows, nested: NestedProgress | None, now: float) -> bool:
    """Return whether a live run has been silent for much longer than between its rows. The first row may take any time."""
    if state != "running" or nested is not None or rows.written_at is None or rows.longest_gap_seconds is None:
        return False
    return now - rows.written_at > max(_MIN_STALL_SECONDS, _STALL_FACTOR * rows.longest_gap_seconds)


def _estimate_seconds_left(
    record: RunRecord, report: StateReport, rows: RecentRows, nested: NestedProgress | None, now: float
) -> float | None:
    """Return the time to the attempt's last step at the recent pace; of nested runs, at the mean of the finished ones."""
    if report.state != "running":
        return None
    if nested is not None:
        return nested.seconds_left
    if record.plan is None or rows.step is None or rows.seconds_per_step is None or rows.written_at is None:
        return None
    since = max(now - rows.written_at, 0.0)
    return max((record.plan.stop_step - rows.step) * rows.seconds_per_step - since, 0.0)


def _sum_durations(record: RunRecord, report: StateReport, rows: RecentRows, now: float) -> float:
    """Return the seconds of all attempts; a killed one lasted up to its last sign of life."""
    total = math.fsum(attempt.duration_seconds or 0.0 for attempt in record.attempts)
    last = record.attempts[-1] if record.attempts else None
    if last is None or last.duration_seconds is not None:
        return total
    end = now if report.state == "running" else max(filter(None, [rows.written_at, report.heartbeat_at]), default=0.0)
    return total + max(end - last.started_at, 0.0)


def _find_checkpoint(run_dir: Path) -> SavedCheckpoint | None:
    """Return the newest checkpoint that no later attempt made void."""
    with contextlib.suppress(OSError):
        directory = CheckpointDirectory(run_dir / "checkpoints", 0, read_relevant_start_steps(run_dir))
        valid = [folder for folder in directory.list_checkpoints() if not directory.is_invalidated_by_attempt(folder)]
        if valid:
            return SavedCheckpoint(int(valid[-1].name.split("-")[1]), _modified_at(valid[-1]), valid[-1])
    return None


def _modified_at(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return None


def _read_saved_evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the evaluations up to the newest checkpoint, which keeps them all; a table of rows may be too long to read."""
    checkpoint = _find_checkpoint(run_dir)
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        if checkpoint is not None:
            scores = json.loads((checkpoint.path / "state.json").read_bytes()).get("scores", {})
            return {int(step): translate_metrics(results) for step, results in scores.items()}
    return {}


def _count_lines(file: Path) -> int:
    count = 0
    with contextlib.suppress(OSError), file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            count += chunk.count(b"\n")
    return count


# --- runs that consist of runs ---


def _read_nested(record: RunRecord, state: StatusState, now: float) -> NestedProgress | None:
    folders = record.nested
    planned = record.plan.num_runs if record.plan is not None and record.plan.num_runs > 1 else None
    if not folders and planned is None:
        return _read_probes(record)
    noun = (folders[0].parent.name if folders else _nested_folder_of(record)).removesuffix("s")
    finished = [folder for folder in folders if (folder / "finished.json").exists()]
    current = tuple(_read_current(folders, now)) if state == "running" else ()
    left = None
    if planned is not None and finished and current:
        seconds = [each for each in map(_read_total_seconds, finished) if each is not None]
        if seconds:
            remaining = math.fsum(seconds) / len(seconds) * (planned - len(finished)) / len(current)
            left = max(remaining - max(each.duration_seconds for each in current), 0.0)
    return NestedProgress(noun, len(finished), planned, current, left)


def _nested_folder_of(record: RunRecord) -> str:
    return NESTED_FOLDERS[1 if record.settings.get("cross_validation.count") is not None else 0]


def _read_probes(record: RunRecord) -> NestedProgress | None:
    num_finished = len(list((record.path / "probes").glob("*.json")))
    return NestedProgress("probe", num_finished, num_finished if record.finished else None) if num_finished else None


def _read_current(folders: tuple[Path, ...], now: float) -> Iterator[RunStatus]:
    """Yield the nested runs that are under way."""
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            if not (folder / "finished.json").exists():
                status = read_status(read_run(folder), now, max_bytes=TABLE_BYTES)
                if status.state == "running":
                    yield status


def _read_total_seconds(run_dir: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        seconds: Any = json.loads((run_dir / "finished.json").read_bytes()).get("total_seconds")
        return float(seconds) if isinstance(seconds, int | float) else None
    return None
