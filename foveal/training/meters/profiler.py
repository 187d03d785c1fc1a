"""A trace of some steps, for who asks where their time goes: torch's profiler on rank 0, in Chrome's format."""

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
    steps: Iterator[T], start_step: int, step_range: tuple[int, int] | None, output_dir: Path
) -> Iterator[T]:
    """Hand on optimizer steps, the first of which is number ``start`` + 1, and trace those from ``span[0]`` to ``span[1]``.

    The trace is ``folder``/steps-<first>-<last>.json.gz; steps that end earlier leave the trace of what was taken. What
    the caller does between two steps is not in it.
    """
    if step_range is None:
        yield from steps
        return
    first, last, number = max(step_range[0], start_step + 1), step_range[1], start_step
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
                done, trace = trace, None
                _write_trace(done, output_dir, first, last)
            yield step
    finally:
        if trace is not None:
            _write_trace(trace, output_dir, first, number)


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def _write_trace(trace: Any, folder: Path, first: int, last: int) -> None:
    """End a trace and write it; a disk without room loses it."""
    trace.stop()
    if last < first:
        return
    file = folder / f"steps-{first:08d}-{last:08d}.json.gz"
    whole, draft = file.with_suffix(".draft"), file.with_suffix(".gz.draft")
    with best_effort(file):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(whole))
            if not _is_complete_json(whole):  # torch writes what fits
                raise OSError(errno.ENOSPC, "its disk has no room")
            with whole.open("rb") as source, gzip.open(draft, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target)
            draft.replace(file)
        except RuntimeError as error:
            _log.warning("%s is not written: %s", file, error)
            return
        finally:
            whole.unlink(missing_ok=True)
            draft.unlink(missing_ok=True)
        _log.info("the trace of steps %d to %d is in %s", first, last, file)


def _is_complete_json(file: Path) -> bool:
    """Whether a file that torch wrote ends as an object does."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 16))
        return stream.read().rstrip().endswith(b"}")
