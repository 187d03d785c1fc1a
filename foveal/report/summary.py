"""A run in a few facts: state, steps, duration, speed; for a headline, a chain, and a comparison."""

import time
from dataclasses import dataclass

from foveal.errors import CheckpointError
from foveal.redact import redact
from foveal.renames import translate_metrics
from foveal.report.curves import Curves
from foveal.report.results import Result, group_results
from foveal.report.text import format_count, format_duration, format_number
from foveal.runs.inputs import RunInputs
from foveal.runs.record import RunRecord
from foveal.runs.results import is_result
from foveal.runs.run_state import StatusState, find_state
from foveal.training.lease import AttemptRecord

STATE_WORDS: dict[StatusState, str] = {
    "running": "running",
    "waiting": "waiting to be started again",
    "unknown": "no record of its end",
    "killed": "killed",
    "finished": "finished",
    "saved-and-left": "saved, to be continued",
    "failed": "failed",
    "diverged": "diverged",
    "superseded": "superseded",
}
_MAX_ATTEMPTS = 60  # in the table of a page
_GOOD, _BAD = ("finished",), ("failed", "diverged", "killed")


@dataclass(frozen=True)
class Summary:
    """What a run is and how it went. tone: good, bad, or open, for the colour of its state."""

    name: str
    stage: str
    state: str
    tone: str
    reason: str
    step: int
    total_steps: int | None
    num_runs: int
    seconds: float | None
    images_per_second: float | None
    num_attempts: int
    results: tuple[Result, ...]

    @property
    def steps_text(self) -> str:
        """The steps, of all where they are known and not reached; of a run that consists of runs, their number."""
        if self.num_runs > 1:
            return format_count(self.num_runs, "run")
        if not self.step:
            return ""
        total = self.total_steps
        return f"{self.step:,} of {total:,} steps" if total and total > self.step else f"{self.step:,} steps"

    @property
    def duration_text(self) -> str:
        """The duration of all attempts."""
        return format_duration(self.seconds)

    @property
    def speed_text(self) -> str:
        """The mean images per second of training; "" if unknown."""
        return f"{format_number(float(round(self.images_per_second)))} images/s" if self.images_per_second else ""

    def sentence(self) -> str:
        """Return steps, duration, speed and attempts in a line."""
        attempts = format_count(self.num_attempts, "attempt") if self.num_attempts else ""
        return " · ".join(filter(None, [self.steps_text, self.duration_text, self.speed_text, attempts]))


def summarize(record: RunRecord, curves: Curves) -> Summary:
    """Return the facts of a run."""
    state = find_state(record, None, time.time()).state
    return Summary(
        record.name,
        record.stage,
        STATE_WORDS[state],
        "good" if state in _GOOD else "bad" if state in _BAD else "open",
        redact(record.reason) if state not in ("finished", "running") else "",
        curves.last_step,
        record.plan.total_steps if record.plan is not None else None,
        record.plan.num_runs if record.plan is not None else max(1, len(record.nested)),
        sum_seconds(record, is_running=state == "running"),
        mean_speed(record, curves),
        len(record.attempts),
        group_results(read_results(record, curves)),
    )


def read_results(record: RunRecord, curves: Curves) -> dict[str, float]:
    """Return the results of a finished run, else the newest value of each evaluation metric."""
    if record.finished:
        summary = translate_metrics(record.finished.get("summary") or {})
        return {name: value for name, value in summary.items() if is_result(name, value)}
    return {name: series.last[1] for name, series in curves.evaluations.items() if series.last is not None}


def sum_seconds(record: RunRecord, *, is_running: bool) -> float | None:
    """Return the seconds of all attempts; of the newest one up to now while it runs, None if nothing is known."""
    if isinstance(total := record.finished.get("total_seconds"), int | float):
        return float(total)
    seconds = [attempt.duration_seconds for attempt in record.attempts if attempt.duration_seconds is not None]
    if is_running:
        seconds.append(max(0.0, time.time() - record.attempts[-1].started_at))
    return sum(seconds) if seconds else None


def mean_speed(record: RunRecord, curves: Curves) -> float | None:
    """Return images per second over all training: exact for a finished run, else the mean of the logged rates."""
    batch, seconds = record.settings.get("batch.global_size"), record.finished.get("seconds")
    if isinstance(batch, int) and seconds and curves.last_step and "loss" in curves.steps:
        return curves.last_step * batch / float(seconds)
    rates = curves.steps.get("images_per_second")
    values = [value for _, value in rates.points() if value is not None] if rates is not None else []
    return sum(values) / len(values) if values else None


def describe_attempts(record: RunRecord) -> tuple[tuple[str, ...], ...]:
    """Return a row for each attempt: number, start, where, ranks, steps, duration, code, end.

    Of very many those in the middle are left out.
    """
    attempts = record.attempts
    shown = attempts if len(attempts) <= _MAX_ATTEMPTS else (*attempts[:5], *attempts[5 - _MAX_ATTEMPTS :])
    return tuple(_describe_attempt(attempt, record, is_last=attempt is attempts[-1]) for attempt in shown)


def read_inputs_or_problem(record: RunRecord) -> tuple[RunInputs | None, str]:
    """Return the inputs of a run, or why they cannot be read."""
    try:
        return record.inputs, ""
    except (CheckpointError, OSError) as error:
        return None, str(error)


def _describe_attempt(attempt: AttemptRecord, record: RunRecord, *, is_last: bool) -> tuple[str, ...]:
    holder = attempt.holder
    if attempt.exit_code is not None:
        end = attempt.reason or ("finished" if attempt.exit_code == 0 else "")
    else:
        end = STATE_WORDS[find_state(record, None, time.time()).state] if is_last else "killed, or its node was lost"
    job = f"job {holder.job} on " if holder is not None and holder.job else ""
    steps = "" if attempt.start_step is None else f"{attempt.start_step:,} to "
    return (
        str(attempt.number),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.started_at)) if attempt.started_at else "",
        f"{job}{holder.nodes or holder.host}" if holder is not None else "",
        str(holder.ranks) if holder is not None else "",
        f"{steps}{'?' if attempt.end_step is None else f'{attempt.end_step:,}'}" if steps else "",
        format_duration(attempt.duration_seconds),
        "" if attempt.exit_code is None else str(attempt.exit_code),
        redact(end),
    )
