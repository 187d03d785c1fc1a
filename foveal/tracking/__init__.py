"""Where a run's numbers go: its own directory first, and from there to MLflow, which training never waits for."""

import uuid
from functools import partial
from pathlib import Path

from foveal.tracking.courier import Courier, Posted
from foveal.tracking.delivery import Delivery, Store
from foveal.tracking.jsonl import Jsonl
from foveal.tracking.tail import Tail
from foveal.tracking.tracker import Row, Tracker, TrackingConfig, as_shown


def open_tracker(path: Path, cfg: TrackingConfig, pipeline: str | None, start: int) -> tuple[Tracker, Row]:
    """The tracker of an attempt that begins at a step, and the last row of a step up to there (empty: there is none).

    ``path`` is the run's directory, ``pipeline`` that of its pipeline. Nothing here waits for MLflow: it is imported,
    asked and told by a thread.
    """
    kept = Jsonl(path, start)
    if cfg.uri is None:
        return kept, kept.last
    return Posted(kept, courier_of(path, cfg, pipeline, kept.tail())), kept.last


def courier_of(path: Path, cfg: TrackingConfig, pipeline: str | None, tail: Tail) -> Courier:
    """The courier of a run directory, not yet on its way."""
    assert cfg.uri is not None
    connect = partial(_connected, cfg, path, Path(pipeline) if pipeline else None, uuid.uuid4().hex)
    return Courier(Delivery(path, tail, connect), path, as_shown(cfg.uri), cfg.patience_seconds)


def _connected(cfg: TrackingConfig, path: Path, pipeline: Path | None, opened: str) -> Store:
    """The run in MLflow's store, made where the store has none. Errors: whatever MLflow raises."""
    from foveal.tracking.mlflow import MLflow

    return MLflow(cfg, path, pipeline, opened)
