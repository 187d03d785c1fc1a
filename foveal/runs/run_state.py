"""The state of a run, from its records, the heartbeat of its newest attempt, and the state of its Slurm job."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.runs.record import RunRecord, state_after_end
from foveal.slurm import SlurmJobStatus
from foveal.training.lease import AttemptRecord
from foveal.training.lease_holder import current_holder, is_alive_here

# ``waiting``: the job is in Slurm's queue, or has been started again and has not begun an attempt.
StatusState = Literal[
    "running", "waiting", "saved-and-left", "finished", "killed", "failed", "diverged", "superseded", "unknown"
]
_HEARTBEAT_TIMEOUT_SECONDS = 60.0  # as for a start that finds an attempt on another host


@dataclass(frozen=True)
class StateReport:
    """The state of a run and the evidence for it, a phrase; "" where the state says all. heartbeat_at: unix seconds."""

    state: StatusState
    evidence: str = ""
    heartbeat_at: float | None = None


def find_state(record: RunRecord, job: SlurmJobStatus | None, now: float) -> StateReport:
    """Return the state of the newest attempt at ``now``, unix seconds; ``job``: what Slurm says of its job."""
    last = record.attempts[-1] if record.attempts else None
    if record.finished:
        return StateReport("finished", last.reason or "" if last is not None else "")
    if last is None:
        return StateReport("unknown", "no attempt has begun")
    if last.exit_code is not None:
        restart = last.holder.restart if last.holder is not None else 0
        is_waiting = job is not None and (job.is_pending or (job.has_processes and job.restart_count > restart))
        reason = last.reason or ("finished, or reached run.stop_at_step" if last.exit_code == 0 else "no reason given")
        return StateReport("waiting" if is_waiting else state_after_end(last.exit_code), reason)
    return _find_state_without_end(record.path, last, job, now)


def _find_state_without_end(run_dir: Path, last: AttemptRecord, job: SlurmJobStatus | None, now: float) -> StateReport:
    """Return the state of an attempt that runs, or was killed without a record of its end."""
    heartbeat_at = read_heartbeat_time(run_dir, last.number)
    holder = last.holder
    if holder is None:
        return StateReport("unknown", "the record of its process is damaged", heartbeat_at)
    is_alive = is_alive_here(holder, current_holder(1))
    # Clocks differ between hosts: a heartbeat from the future is one of now.
    has_heartbeat = heartbeat_at is not None and now - heartbeat_at < _HEARTBEAT_TIMEOUT_SECONDS
    state: StatusState = "unknown"
    evidence = f"no record of its end: it runs on {holder.host}, or was killed there"
    if is_alive:
        state, evidence = "running", ""
    elif job is not None and (job.is_pending or job.restart_count > holder.restart):
        state, evidence = "waiting", f"Slurm starts job {holder.job} again"
    elif is_alive is False:
        state, evidence = "killed", f"killed by a signal, or its node was lost: process {holder.pid} is gone"
    elif job is not None and not job.has_processes:
        state, evidence = "killed", f"its job {holder.job} is {job.state}"
    elif has_heartbeat:
        state, evidence = "running", ""
    return StateReport(state, evidence, heartbeat_at)


def read_heartbeat_time(run_dir: Path, attempt: int) -> float | None:
    """Return when the heartbeat of an attempt was written, unix seconds; None after its end, or where it cannot be read."""
    with contextlib.suppress(OSError):
        return (run_dir / "attempts" / f"{attempt:04d}.beat").stat().st_mtime
    return None
