"""A run's status as labelled lines, and the cells of a table of runs."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from foveal.quantities import format_count, format_duration
from foveal.redact import printable
from foveal.runs.best_result import SPREAD_SUFFIXES, BestResult
from foveal.runs.live_status import NestedProgress, RunStatus
from foveal.runs.overview import StageNotBegun
from foveal.runs.results import is_chosen
from foveal.slurm import SlurmJobStatus

_MAX_RESULTS = 6
_STATE_WORDS = {"saved-and-left": "saved and left"}
_STATES_TO_CONTINUE = ("killed", "saved-and-left", "failed")
_NO_REASONS = ("", "None", "finished")  # Slurm's word for no reason, and what the state says already

Lines = Iterator[tuple[str, str]]


def describe_status(status: RunStatus, now: float) -> list[tuple[str, str]]:
    """Return what is known of a run as (label, text)."""
    lines = (
        *_state_lines(status, now),
        *_progress_lines(status, now),
        *_result_lines(status),
        *_record_lines(status, now),
        *_next_lines(status),
    )
    return [(label, printable(text)) for label, text in lines]


def describe_state(status: RunStatus) -> str:
    """Return the state in words."""
    words = _STATE_WORDS.get(status.state, status.state)
    return f"{words}, stalled?" if status.is_stalled else words


def describe_position(status: RunStatus) -> str:
    """Return the step or the part that is reached."""
    if status.nested is not None:
        return _count_parts(status.nested)
    if status.step is None:
        return "no step yet" if status.state in ("running", "waiting") else ""
    return f"{status.step:,} of {status.total_steps:,}" if status.total_steps else f"{status.step:,}"


def describe_best(best: BestResult | None) -> str:
    """Return the best result in short."""
    return "" if best is None else printable(f"{best.metric} {format_metric(best.value)}")


def describe_job(job: SlurmJobStatus) -> str:
    """Return Slurm's state of a job."""
    reason = f" ({job.reason})" if job.reason not in _NO_REASONS else ""
    nodes = f" on {job.nodes}" if job.nodes else ""
    left = (
        f", {format_duration(job.time_left)} to its time limit" if job.is_running and job.time_left is not None else ""
    )
    return f"job {job.job_id} is {job.state}{reason}{nodes}{left}"


def describe_not_begun(stage: StageNotBegun) -> str:
    """Return what a stage without a run waits for."""
    return "not begun" if stage.job is None else f"not begun: {describe_job(stage.job)}"


def format_age(then: float | None, now: float) -> str:
    """Return how long ago a time was; a time of a clock that is ahead is now."""
    return "" if then is None else f"{format_duration(max(now - then, 0.0))} ago"


def format_age_coarsely(then: float | None, now: float) -> str:
    """Return how long ago a time was, in its largest unit."""
    return "" if then is None else f"{' '.join(format_duration(max(now - then, 0.0)).split()[:2])} ago"


def format_metric(value: float) -> str:
    """Return a result with four digits after the point, or four significant ones."""
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.4g}"


def format_path(path: Path) -> str:
    """Return a path as one line of text."""
    return printable(str(path))


def _state_lines(status: RunStatus, now: float) -> Lines:
    attempt = f"attempt {status.num_attempts}" if status.num_attempts else ""
    ranks = f"{format_count(status.num_ranks, 'rank')} on {status.host}" if status.num_ranks else ""
    since = f"for {format_duration(max(now - status.started_at, 0.0))}" if status.started_at else ""
    is_running = status.state == "running"
    about = [f"{describe_state(status)} {since}" if is_running and since else describe_state(status), attempt, ranks]
    yield "state", ", ".join(filter(None, about))
    if status.reason not in _NO_REASONS:
        yield "because", status.reason
    if status.job is not None:
        yield "slurm", describe_job(status.job)


def _progress_lines(status: RunStatus, now: float) -> Lines:
    rows, nested = status.rows, status.nested
    if nested is not None:
        yield f"{nested.noun}s", f"{_count_parts(nested)} finished"
        for each in nested.current:
            loss = f", loss {each.rows.loss:.4f}" if each.rows.loss is not None else ""
            yield "", f"{each.name}: step {describe_position(each)}{loss}"
    elif position := describe_position(status):
        percent = f" ({status.fraction:.0%})" if status.fraction is not None else ""
        epoch = f", epoch {status.epoch} of {status.num_epochs}" if status.epoch is not None else ""
        yield "step", f"{position}{percent}{epoch}"
    if status.seconds_left is not None:
        is_early = (
            status.stop_step is not None and status.total_steps is not None and status.stop_step < status.total_steps
        )
        goal = f" to step {status.stop_step:,} (run.stop_at_step)" if is_early and nested is None else ""
        clock = time.strftime("%a %H:%M", time.localtime(now + status.seconds_left))
        yield "left", f"{format_duration(status.seconds_left)}{goal}, until {clock}"
    if rows.loss is not None:
        trend = status.trend
        means = (
            f"; mean {trend.mean:.4f} over the last {trend.num_steps} steps, {trend.mean_before:.4f} over the "
            f"{trend.num_steps} before"
            if trend is not None
            else ""
        )
        yield "loss", f"{rows.loss:.4f}{means}"
    rates = [
        f"{rows.images_per_second:,.0f} images/s" if rows.images_per_second is not None else "",
        f"data wait {rows.data_wait:.0%}" if rows.data_wait is not None else "",
        f"learning rate {rows.lr:.3g}" if rows.lr is not None else "",
    ]
    if any(rates):
        yield "rates", ", ".join(filter(None, rates))


def _count_parts(nested: NestedProgress) -> str:
    total = f" of {nested.total}" if nested.total is not None else ""
    return f"{nested.num_finished}{total}"


def _result_lines(status: RunStatus) -> Lines:
    newest, best = status.newest_evaluation, status.best
    if newest is not None:
        yield "evaluated", f"after step {newest.step:,}: {_format_results(newest.results)}"
    if best is not None:
        step = f" after step {best.step:,}" if best.step is not None else ""
        direction = "higher" if best.higher_is_better else "lower"
        yield "best", f"{best.metric} {format_metric(best.value)}{step} ({direction} is better)"


def _format_results(results: Mapping[str, float]) -> str:
    results = {
        name: value for name, value in results.items() if not name.endswith(SPREAD_SUFFIXES) and not is_chosen(name)
    }
    shown = [f"{name} {format_metric(value)}" for name, value in list(results.items())[:_MAX_RESULTS]]
    more = len(results) - len(shown)
    return ", ".join([*shown, *([f"{more} more in metrics.jsonl"] if more > 0 else [])])


def _record_lines(status: RunStatus, now: float) -> Lines:
    saved = status.checkpoint
    if saved is not None:
        yield (
            "saved",
            f"step {saved.step:,}, {format_age(saved.saved_at, now)}" if saved.saved_at else f"step {saved.step:,}",
        )
    if status.num_attempts > 1 and status.last_end and status.last_end != status.reason:
        yield "attempts", f"{status.num_attempts}; the last that ended: {status.last_end}"
    counts = [
        (status.num_refused_updates, "refused update", "refused.jsonl"),
        (status.num_rollbacks, "roll-back", "rollbacks.jsonl"),
        (status.num_quarantined, "quarantined sample", "quarantine.jsonl"),
    ]
    if incidents := [f"{format_count(count, noun)} ({file})" for count, noun, file in counts if count]:
        yield "incidents", ", ".join(incidents)
    if status.state not in ("finished", "saved-and-left"):
        signs = [("last row", status.rows.written_at), ("heartbeat", status.heartbeat_at)]
        texts = [f"{name} {format_age(at, now)}" for name, at in signs if at is not None]
        yield "signs", ", ".join(texts) or "none yet: no row of metrics, no heartbeat"


def _next_lines(status: RunStatus) -> Lines:
    step = status.checkpoint.step if status.checkpoint is not None else None
    where = f"goes on after step {step:,}" if step is not None else "starts it again"
    if status.nested is not None and status.nested.num_finished:
        where = f"goes on; {format_count(status.nested.num_finished, f'finished {status.nested.noun}')} will not be repeated"
    if status.is_stalled:
        yield "next", f"look at {status.path / 'logs'}: the time limit is engine.timeout_minutes"
    elif status.state in _STATES_TO_CONTINUE:
        first = "remove the cause; then " if status.state == "failed" else ""
        yield "next", f"{first}the same command {where}"
    elif status.state == "unknown" and status.host:
        yield "next", f"foveal status on {status.host} can tell"
    for export in status.exports:
        yield "export", str(export)
