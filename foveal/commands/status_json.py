"""``foveal status --json``: keys that stay. docs/status.md lists them."""

import math
from collections.abc import Mapping
from typing import Any

from foveal.commands.status_lines import printable
from foveal.runs.best_result import BestResult
from foveal.runs.live_status import NestedProgress, RunStatus
from foveal.runs.overview import Overview
from foveal.slurm import SlurmJobStatus


def encode_overview(overview: Overview, now: float) -> dict[str, Any]:
    """Return a folder as JSON has it: the same keys for one run and for many. ``now``: unix seconds."""
    return {
        "path": str(overview.folder),
        "time": now,
        "runs": [encode_status(run) for run in overview.runs],
        "not_begun": [
            {
                "path": str(stage.planned.run_dir),
                "name": stage.planned.name,
                "stage": stage.planned.stage,
                "job": encode_job(stage.job),
            }
            for stage in overview.not_begun
        ],
        "unreadable": [{"path": str(run.path), "reason": printable(run.reason)} for run in overview.unreadable],
    }


def encode_status(status: RunStatus) -> dict[str, Any]:
    """Return a run as JSON has it. null: not known, or not finite."""
    rows, trend, saved, newest = status.rows, status.trend, status.checkpoint, status.newest_evaluation
    tree = {
        "path": str(status.path),
        "name": status.name,
        "stage": status.stage,
        "state": status.state,
        "reason": status.reason,
        "stalled": status.is_stalled,
        "step": status.step,
        "total_steps": status.total_steps,
        "stop_step": status.stop_step,
        "fraction": status.fraction,
        "epoch": status.epoch,
        "epochs": status.num_epochs,
        "seconds_left": status.seconds_left,
        "duration_seconds": status.duration_seconds,
        "started_at": status.started_at,
        "last_row_at": rows.written_at,
        "heartbeat_at": status.heartbeat_at,
        "loss": rows.loss,
        "mean_loss": trend.mean if trend else None,
        "mean_loss_before": trend.mean_before if trend else None,
        "mean_loss_steps": trend.num_steps if trend else None,
        "lr": rows.lr,
        "images_per_second": rows.images_per_second,
        "data_wait": rows.data_wait,
        "checkpoint": {"step": saved.step, "saved_at": saved.saved_at, "path": str(saved.path)} if saved else None,
        "evaluation": {"step": newest.step, "results": dict(newest.results)} if newest else None,
        "best": encode_best(status.best),
        "attempts": status.num_attempts,
        "last_end": status.last_end,
        "refused_updates": status.num_refused_updates,
        "rollbacks": status.num_rollbacks,
        "quarantined_samples": status.num_quarantined,
        "host": status.host,
        "ranks": status.num_ranks,
        "job": encode_job(status.job),
        "parts": _encode_nested(status.nested),
        "exports": [str(export) for export in status.exports],
    }
    return replace_nonfinite(tree)


def encode_best(best: BestResult | None) -> dict[str, Any] | None:
    """Return the best result as JSON has it."""
    if best is None:
        return None
    return {
        "metric": best.metric,
        "value": best.value,
        "step": best.step,
        "higher_is_better": best.higher_is_better,
    }


def encode_job(job: SlurmJobStatus | None) -> dict[str, Any] | None:
    """Return a Slurm job as JSON has it."""
    if job is None:
        return None
    return {
        "id": job.job_id,
        "state": job.state,
        "reason": job.reason,
        "nodes": job.nodes,
        "seconds_left": job.time_left if job.is_running else None,
    }


def replace_nonfinite(tree: Any) -> Any:
    """Return a tree with None in place of NaN and infinities, for which JSON has no words."""
    if isinstance(tree, Mapping):
        return {name: replace_nonfinite(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [replace_nonfinite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _encode_nested(nested: NestedProgress | None) -> dict[str, Any] | None:
    if nested is None:
        return None
    return {
        "noun": nested.noun,
        "finished": nested.num_finished,
        "total": nested.total,
        "current": [
            {"name": each.name, "step": each.step, "total_steps": each.total_steps, "loss": each.rows.loss}
            for each in nested.current
        ],
    }
