"""Where a run's numbers go: its own directory first, and from there to MLflow, which training never waits for."""

import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from foveal.atomic import write_json
from foveal.redact import redact
from foveal.tracking.jsonl import Jsonl
from foveal.tracking.sync import Delivery, Store
from foveal.tracking.tail import Tail, read_json
from foveal.tracking.tracker import Row, State, Tracker, TrackingConfig
from foveal.tracking.uploader import Courier, Posted


def open_tracker(
    path: Path,
    cfg: TrackingConfig,
    pipeline: str | None,
    start: int,
    attempt: int = 0,
    fence: Callable[[], None] = lambda: None,
) -> tuple[Tracker, Row]:
    """The tracker of an attempt that begins at a step, and the last row of a step up to there (empty: there is none).

    ``path`` is the run's directory, ``pipeline`` that of its pipeline; ``fence`` raises where the run is another
    attempt's. Nothing here waits for MLflow: it is imported, asked and told by a thread.
    """
    kept = Jsonl(path, start, attempt, fence)
    if cfg.uri is None:
        return kept, kept.last
    return Posted(kept, courier_of(path, cfg, pipeline, kept.tail())), kept.last


def courier_of(path: Path, cfg: TrackingConfig, pipeline: str | None, tail: Tail) -> Courier:
    """The courier of a run directory, not yet on its way."""
    assert cfg.uri is not None
    connect = partial(_connected, cfg, path, Path(pipeline) if pipeline else None, uuid.uuid4().hex)
    return Courier(Delivery(path, tail, connect), path, redact(cfg.uri), cfg.patience_seconds)


def report_end(path: Path, cfg: TrackingConfig, pipeline: str | None, state: State, why: str) -> None:
    """The end of an attempt that never opened its tracker: the run's tags say so, and MLflow within its patience.

    Whoever watches the state of a run would else see the last attempt's "running" for ever. Of a run that had no attempt
    before there is nothing to correct.
    """
    tags, rows = path / "tags.json", path / "metrics.jsonl"
    if not tags.exists() or not rows.exists():
        return
    write_json(tags, read_json(tags) | {"state": state, "why_stopped": redact(why)})
    if cfg.uri is not None:
        courier_of(path, cfg, pipeline, Tail(os.open(rows, os.O_RDONLY), rows)).close()


def _connected(cfg: TrackingConfig, path: Path, pipeline: Path | None, opened: str) -> Store:
    """The run in MLflow's store, made where the store has none. Errors: whatever MLflow raises."""
    os.environ.setdefault(
        "MLFLOW_DISABLE_TELEMETRY", "true"
    )  # read when it is imported: nobody is told what a cluster runs
    from foveal.tracking.mlflow import MLflow

    return MLflow(cfg, path, pipeline, opened)
