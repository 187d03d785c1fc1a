"""Run directories without a training: what an attempt leaves in one, written by the product's own writers."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from foveal.atomic import encode_json_lines
from foveal.runs.record import PlannedRun, write_plan
from foveal.training.lease import Lease, acquire_lease
from foveal.training.lease_holder import LeaseHolder, current_holder

SETTINGS = {"data": {"path": "data/digits"}, "model": {"name": "vit_tiny_patch16_224"}, "mask_ratio": 0.75}


def make_run(
    run: Path,
    *,
    stage: str = "pretrain",
    total_steps: int = 100,
    stop_step: int | None = None,
    num_runs: int = 1,
    rows: Iterable[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    finished: Mapping[str, Any] | None = None,
) -> Path:
    """A run directory in which no attempt has begun; ``finished``: the summary of a finished run."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(dict(SETTINGS if settings is None else settings)))
    (run / "science.json").write_text("{}")
    write_plan(run, PlannedRun(stage, total_steps, stop_step or total_steps, 10, 1, num_runs))
    (run / "metrics.jsonl").write_bytes(encode_json_lines(rows))
    if finished is not None:
        (run / "finished.json").write_text(json.dumps({"summary": finished, "seconds": 5.0, "total_seconds": 8.0}))
    return run


def steps(first: int, last: int, *, begin: float, seconds: float = 1.0, every: int = 10) -> list[dict[str, Any]]:
    """Rows of steps whose loss is 1/step; rows are written together, ``every`` so many steps, ``seconds`` each."""
    rows: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        written_with = min(last, (step + every - 1) // every * every)
        row = {"step": step, "loss": 1 / step, "lr": 1e-3, "time": begin + (written_with - first + 1) * seconds}
        rates = {"images_per_second": 100.0 + step, "data_wait": 0.25} if step == written_with else {}
        rows.append(row | rates)
    return rows


def begin_attempt(run: Path, start_step: int = 0, **facts: Any) -> Lease:
    """An attempt of this process, or of another one that ``facts`` describe (host, pid, job, ...). The caller ends it."""
    lease = acquire_lease(run, current_holder(2), max_attempts_without_progress=99, heartbeat_timeout_seconds=0.05)
    lease.record_start(start_step)
    if facts:
        change_holder(run, lease.number, **facts)
    return lease


def change_holder(run: Path, number: int, **facts: Any) -> None:
    """Let an attempt be one of another process."""
    file = run / "attempts" / f"{number:04d}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def end_attempt(run: Path, reason: str = "finished", code: int = 0, step: int | None = None) -> None:
    """A whole attempt that recorded its end."""
    begin_attempt(run).record_end_and_release(reason, code, step)


def leave_without_word(run: Path, *, host: str = "elsewhere", beat_age: float = 0.0, **facts: Any) -> LeaseHolder:
    """An attempt on another host that recorded no end; its last heartbeat is ``beat_age`` seconds old."""
    lease = begin_attempt(run)
    lease.record_end_and_release("", 0)
    (run / "attempts" / f"{lease.number:04d}.end.json").unlink()
    change_holder(run, lease.number, host=host, **facts)
    beat = run / "attempts" / f"{lease.number:04d}.beat"
    beat.write_text("1\n")
    beaten_at = time.time() - beat_age
    os.utime(beat, (beaten_at, beaten_at))
    return LeaseHolder(host, 1, "", 2)


def save_checkpoint(
    run: Path, step: int, attempt: int = 1, scores: Mapping[int, Mapping[str, float]] | None = None
) -> None:
    """A checkpoint without weights."""
    folder = run / "checkpoints" / f"step-{step:08d}-attempt-{attempt:04d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format": 2, "step": step, "scores": scores or {}}))
