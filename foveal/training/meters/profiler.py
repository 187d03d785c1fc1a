"""Profiler traces of a range of steps: torch's profiler on rank 0, in Chrome's trace format."""

import errno
import gzip
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from foveal.atomic import best_effort

T = TypeVar("T")
_log = logging.getLogger(__name__)


def profile_steps(
    steps: Iterator[T], after_step: int, first_and_last: tuple[int, int] | None, output_dir: Path
) -> Iterator[T]:
    """Yield optimizer steps and trace those from ``step_range[0]`` to ``step_range[1]``, both included.

    The first step has number ``after_step`` + 1. The trace is ``output_dir``/steps-<first>-<last>.json.gz; if the steps
    end early, it covers the traced steps. It excludes the caller's work between two steps. None: no trace.
    """
    if first_and_last is None:
        yield from steps
        return
    first, last, number = max(first_and_last[0], after_step + 1), first_and_last[1], after_step
    trace: Any = None
    try:
        while True:
            if number + 1 == first <= last:
                trace = profile(activities=_activities())
                trace.start()
            try:
                step = next(steps)
            except StopIteration:
                return
            number += 1
            if trace is not None and number == last:
                finished, trace = trace, None
                _write_trace(finished, output_dir, first, last)
            yield step
    finally:
        if trace is not None:
            _write_trace(trace, output_dir, first, number)


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def _write_trace(trace: Any, folder: Path, first: int, last: int) -> None:
    """Stop a trace and write it; on a full disk, log a warning and drop it."""
    trace.stop()
    if last < first:
        return
    file = folder / f"steps-{first:08d}-{last:08d}.json.gz"
    raw, draft = file.with_suffix(".draft"), file.with_suffix(".gz.draft")
    with best_effort(file):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(raw))
            if not _is_complete_json(raw):  # on a full disk torch writes a truncated file without an error
                raise OSError(errno.ENOSPC, "its disk has no room")
            with raw.open("rb") as source, gzip.open(draft, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target)
            draft.replace(file)
        except RuntimeError as error:
            _log.warning("%s is not written: %s", file, error)
            return
        finally:
            raw.unlink(missing_ok=True)
            draft.unlink(missing_ok=True)
        _log.info("the trace of steps %d to %d is in %s", first, last, file)


def _is_complete_json(file: Path) -> bool:
    """Return whether the file ends with the closing brace of a JSON object."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 16))
        return stream.read().rstrip().endswith(b"}")
