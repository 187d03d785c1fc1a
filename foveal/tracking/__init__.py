"""Tracking: metrics are written to the run directory first and uploaded to MLflow in the background."""

import logging
import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from foveal.atomic import write_json
from foveal.redact import redact
from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.nested import SyncWithNested
from foveal.tracking.nested_tracker import OuterTracker
from foveal.tracking.sqlite_store import parse_sqlite_path, resolve_store_of_run
from foveal.tracking.sync import RemoteRun, RunSync
from foveal.tracking.sync_facts import FactsSync
from foveal.tracking.tail import MetricsTail, read_json_or_empty
from foveal.tracking.tracker import AttemptState, MetricRow, Tracker, TrackingConfig
from foveal.tracking.uploader import Uploader

_log = logging.getLogger(__name__)


def open_tracker(
    run_dir: Path,
    cfg: TrackingConfig,
    pipeline_dir: str | None,
    start_step: int,
    attempt_number: int = 0,
    check_lease: Callable[[], None] = lambda: None,
    outer_tracker: Tracker | None = None,
) -> tuple[Tracker, MetricRow]:
    """Open the tracker of an attempt, and return the last row up to ``start_step`` with it (empty: there is none).

    ``pipeline_dir`` is the directory of the run's pipeline, if any. ``check_lease`` raises if another attempt has taken
    the run over. ``outer_tracker`` is that of the run that contains this one, whose uploader then delivers both. Nothing
    here waits for MLflow: a thread imports and contacts it.
    """
    jsonl_tracker = JsonlTracker(run_dir, start_step, attempt_number, check_lease)
    tracker: Tracker = jsonl_tracker
    if cfg.uri is not None:
        cfg = keep_store_of_run(run_dir, cfg)
        sync = _build_sync(run_dir, cfg, pipeline_dir, jsonl_tracker.open_tail())
        tracker = OuterTracker(jsonl_tracker, _build_uploader(run_dir, cfg, sync), sync)
    elif isinstance(outer_tracker, OuterTracker):
        tracker = outer_tracker.add_nested(run_dir, jsonl_tracker)
    return tracker, jsonl_tracker.last_training_row


def keep_store_of_run(run_dir: Path, cfg: TrackingConfig) -> TrackingConfig:
    """Return the settings with the SQLite store that the run has already, although it is started in another folder."""
    assert cfg.uri is not None
    uri = resolve_store_of_run(cfg.uri, read_json_or_empty(run_dir / "mlflow.json").get("file"))
    if uri == cfg.uri:
        return cfg
    _log.info("tracking: %s goes on in %s, its store since its first attempt", run_dir, parse_sqlite_path(uri))
    return cfg.model_copy(update={"uri": uri})


def build_uploader(
    run_dir: Path,
    cfg: TrackingConfig,
    pipeline_dir: str | None,
    tail: MetricsTail,
    *,
    compares_nested: bool = False,
) -> Uploader:
    """Build the uploader of a run directory and its nested runs; its thread starts with the first ``notify``.

    ``compares_nested``: also the nested runs that are noted as delivered are compared with the store.
    """
    sync = _build_sync(run_dir, cfg, pipeline_dir, tail, compares_nested=compares_nested)
    return _build_uploader(run_dir, cfg, sync)


def _build_uploader(run_dir: Path, cfg: TrackingConfig, sync: SyncWithNested) -> Uploader:
    return Uploader(sync, run_dir, redact(cfg.uri or ""), cfg.flush_timeout_seconds)


def _build_sync(
    run_dir: Path, cfg: TrackingConfig, pipeline_dir: str | None, tail: MetricsTail, *, compares_nested: bool = False
) -> SyncWithNested:
    connect = partial(_connect_mlflow, cfg, run_dir, Path(pipeline_dir) if pipeline_dir else None, uuid.uuid4().hex)
    facts = FactsSync(run_dir, cfg, f"MLflow at {redact(cfg.uri or '')}")
    return SyncWithNested(
        run_dir,
        tail,
        connect,
        facts,
        lambda folder, rows: RunSync(folder, rows, partial(_connect_mlflow, cfg, folder, run_dir, uuid.uuid4().hex)),
        trusts_notes=not compares_nested,
    )


def report_end_without_tracker(
    run_dir: Path, cfg: TrackingConfig, pipeline_dir: str | None, state: AttemptState, reason: str
) -> None:
    """Record the end of an attempt that never opened its tracker, in the run's tags and in MLflow.

    Without it a monitor of the run would see the previous attempt's state "running" for ever. A run without a previous
    attempt needs no correction. MLflow is waited for at most ``tracking.flush_timeout_seconds``.
    """
    tags_file, rows_file = run_dir / "tags.json", run_dir / "metrics.jsonl"
    if not tags_file.exists() or not rows_file.exists():
        return
    write_json(tags_file, read_json_or_empty(tags_file) | {"state": state, "why_stopped": redact(reason)})
    if cfg.uri is not None:
        cfg = keep_store_of_run(run_dir, cfg)
        build_uploader(run_dir, cfg, pipeline_dir, MetricsTail(os.open(rows_file, os.O_RDONLY), rows_file)).close()


def _connect_mlflow(cfg: TrackingConfig, run_dir: Path, parent_dir: Path | None, creation_token: str) -> RemoteRun:
    """Resume or create the run in MLflow, below that of its pipeline or outer run. Raises: whatever MLflow raises."""
    # MLflow reads it on import: what a cluster runs is not reported to anybody.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from foveal.tracking.mlflow import MLflowRun

    return MLflowRun(cfg, run_dir, parent_dir, creation_token)
