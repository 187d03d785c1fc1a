"""Where a run's numbers go: its own directory first, and from there to MLflow, which training never waits for."""

import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from foveal.atomic import write_json
from foveal.redact import redact
from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.sync import RemoteRun, RunSync
from foveal.tracking.tail import MetricsTail, read_json_or_empty
from foveal.tracking.tracker import AttemptState, MetricRow, Tracker, TrackingConfig
from foveal.tracking.uploader import Uploaded, Uploader


def open_tracker(
    run_dir: Path,
    cfg: TrackingConfig,
    pipeline_dir: str | None,
    start_step: int,
    attempt: int = 0,
    check_lease: Callable[[], None] = lambda: None,
) -> tuple[Tracker, MetricRow]:
    """The tracker of an attempt that begins at a step, and the last row of a step up to there (empty: there is none).

    ``path`` is the run's directory, ``pipeline`` that of its pipeline; ``fence`` raises where the run is another
    attempt's. Nothing here waits for MLflow: it is imported, asked and told by a thread.
    """
    kept = JsonlTracker(run_dir, start_step, attempt, check_lease)
    if cfg.uri is None:
        return kept, kept.last_row
    return Uploaded(kept, build_uploader(run_dir, cfg, pipeline_dir, kept.open_tail())), kept.last_row


def build_uploader(run_dir: Path, cfg: TrackingConfig, pipeline_dir: str | None, tail: MetricsTail) -> Uploader:
    """The courier of a run directory, not yet on its way."""
    assert cfg.uri is not None
    connect = partial(_connect_mlflow, cfg, run_dir, Path(pipeline_dir) if pipeline_dir else None, uuid.uuid4().hex)
    return Uploader(RunSync(run_dir, tail, connect), run_dir, redact(cfg.uri), cfg.patience_seconds)


def report_attempt_end(
    run_dir: Path, cfg: TrackingConfig, pipeline_dir: str | None, state: AttemptState, reason: str
) -> None:
    """The end of an attempt that never opened its tracker: the run's tags say so, and MLflow within its patience.

    Whoever watches the state of a run would else see the last attempt's "running" for ever. Of a run that had no attempt
    before there is nothing to correct.
    """
    tags, rows = run_dir / "tags.json", run_dir / "metrics.jsonl"
    if not tags.exists() or not rows.exists():
        return
    write_json(tags, read_json_or_empty(tags) | {"state": state, "why_stopped": redact(reason)})
    if cfg.uri is not None:
        build_uploader(run_dir, cfg, pipeline_dir, MetricsTail(os.open(rows, os.O_RDONLY), rows)).close()


def _connect_mlflow(cfg: TrackingConfig, path: Path, pipeline: Path | None, opened: str) -> RemoteRun:
    """The run in MLflow's store, made where the store has none. Raises: whatever MLflow raises."""
    os.environ.setdefault(
        "MLFLOW_DISABLE_TELEMETRY", "true"
    )  # read when it is imported: nobody is told what a cluster runs
    from foveal.tracking.mlflow import MLflowRun

    return MLflowRun(cfg, path, pipeline, opened)
