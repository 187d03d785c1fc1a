"""Runs in a list: what they were made of, in short, and their order."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveal.atomic import list_tree
from foveal.errors import CheckpointError, FovealError
from foveal.redact import redact
from foveal.runs.job_lookup import JobLookup
from foveal.runs.live_status import TABLE_BYTES, RunStatus, read_status
from foveal.runs.record import RunRecord, list_runs, name_path, read_run

SortKey = Literal["date", "metric", "name"]


@dataclass(frozen=True)
class ListedRun:
    """A run of a list. data, model: in a word or two. outer: the run that it is a trial or fold of. num_bytes: on disk."""

    status: RunStatus
    data: str
    model: str
    outer: Path | None = None
    num_bytes: int | None = None


@dataclass(frozen=True)
class RunListing:
    """The runs of a folder, and those that cannot be read with the reason."""

    runs: tuple[ListedRun, ...]
    unreadable: tuple[tuple[Path, str], ...] = ()


def list_with_status(
    folder: Path,
    now: float,
    jobs: JobLookup | None = None,
    *,
    stage: str | None = None,
    with_nested: bool = False,
    with_size: bool = False,
) -> RunListing:
    """Return the runs in a folder, or the run itself, in the order of their first attempts; ``stage``: only those of one."""
    runs: list[ListedRun] = []
    unreadable: list[tuple[Path, str]] = []
    for path, outer in _iter_paths(folder, with_nested=with_nested):
        try:
            record = read_run(path)
            if stage is None or record.stage == stage:
                size = _measure_size(path) if with_size else None
                status = read_status(record, now, jobs, TABLE_BYTES)
                runs.append(ListedRun(status, describe_data(record), describe_model(record), outer, size))
        except (FovealError, OSError, ValueError) as error:
            unreadable.append((path, name_path(path, error)))
    return RunListing(tuple(runs), tuple(unreadable))


def sort_runs(runs: Sequence[ListedRun], key: SortKey) -> list[ListedRun]:
    """Return the runs by date, oldest first; by name; or by metric, the best first in each metric, those without last."""
    if key == "name":
        return sorted(runs, key=lambda run: str(run.status.path))
    if key == "date":
        return sorted(runs, key=lambda run: run.status.first_started_at or 0.0)
    return sorted(runs, key=_metric_key)


def _metric_key(run: ListedRun) -> tuple[bool, str, float]:
    best = run.status.best
    if best is None:
        return True, "", 0.0
    return False, best.metric, -best.value if best.higher_is_better else best.value


def _iter_paths(folder: Path, *, with_nested: bool) -> Iterator[tuple[Path, Path | None]]:
    for run in list_runs(folder):
        yield run, None
        if with_nested:
            with contextlib.suppress(CheckpointError, OSError):
                yield from ((nested, run) for nested in read_run(run).nested)


def describe_data(record: RunRecord) -> str:
    """Return the name of the training data; that of its folder for a run of a version that recorded none."""
    with contextlib.suppress(CheckpointError, OSError):
        if record.inputs is not None:
            names = [each.name or _last_part(each.path) for each in record.inputs.datasets if each.role == "training"]
            if names:
                return " + ".join(dict.fromkeys(names))
    path = record.settings.get("data.path")
    return _last_part(redact(str(path))) if path else ""


def describe_model(record: RunRecord) -> str:
    """Return what is trained: a model's name, the run whose export it starts from, or the number of arms or students."""
    settings = record.settings
    arms = [name for name in settings if name.startswith("trials.arms.")]
    if arms:
        return f"{len(arms)} arms"
    students: Any = settings.get("students")
    if isinstance(students, list) and len(students) > 1:
        return f"{len(students)} students"
    for name in ("model.name", "backbone.name", "init_name"):
        if isinstance(settings.get(name), str):
            return settings[name]
    start = settings.get("init")
    return f"init {_last_part(redact(start), skip='export')}" if isinstance(start, str) else ""


def _last_part(path: str, skip: str = "") -> str:
    """Return the last part of a path or URL that is not ``skip``."""
    parts = [part for part in path.split("/") if part not in ("", skip)]
    return parts[-1] if parts else path


def _measure_size(run: Path) -> int | None:
    """Return the bytes of a run directory; None if it cannot be read to its end. Files may vanish meanwhile."""
    total = 0
    try:
        for file in list_tree(run)[1]:
            with contextlib.suppress(FileNotFoundError):
                total += file.lstat().st_size
    except OSError:
        return None
    return total
