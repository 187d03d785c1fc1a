"""Preemption: a signal sets a flag, the ranks agree on it between two steps, and Slurm is asked to requeue the job.

Signal handlers do nothing else, but that a first Ctrl-C is answered: the step in progress may take a while.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from foveal.distributed.launcher_process import Process, find_own_launchers
from foveal.distributed.world import World
from foveal.errors import RequeueRefusedError
from foveal.slurm import (
    SlurmConfig,
    SlurmJobStatus,
    SlurmUnavailableError,
    list_slurm_partitions,
    parse_scontrol_time,
    read_batch_script,
    read_slurm_config,
    requeue_job,
    show_job,
    show_step_job,
    step_job_id,
)

# USR1: our scripts' warning before the time limit; USR2: submitit's; TERM: Slurm's preemption; INT: Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
LAUNCHER_GONE = "the launcher is gone"  # a stop reason; without a launcher no requeue is asked for
_LAUNCHER_POLL_SECONDS = 1.0
_REPEAT_WINDOW_SECONDS = 1.0  # within it, a second signal may be Slurm's repeat: one for the step, one for the job
NOTICE_ENV_VAR = "FOVEAL_NOTICE"  # states sbatch's --signal lead, which Slurm does not show
_WARNING_SIGNALS = ("SIGUSR1", "SIGUSR2")  # signals that are never sent because a rank failed
# slurm/stage.sh searches for the beginning of this message.
_LEFT_TO_SCRIPT_MESSAGE = "foveal: saved and left on SIGTERM, which is left to the job script"
_CTRL_C_ANSWER = b"foveal: Ctrl-C: the run saves after this step and leaves; again ends it unsaved\n"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaveRequest:
    """A request to leave, on which the ranks have agreed. is_urgent: the time may not suffice for one more save."""

    is_urgent: bool = False


class Preemption:
    """The request to stop this run: its reason, None without a request, and whether it was repeated."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._requested_at = 0.0
        self.stop_reason: str | None = None
        self.requested_again = False

    def handle_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Record a signal as the stop reason. A second Ctrl-C ends the process at once: exit code 130 in a shell."""
        now = time.monotonic()
        self.requested_again |= self.stop_reason is not None and now - self._requested_at > _REPEAT_WINDOW_SECONDS
        if self.stop_reason is None:
            self.stop_reason = signal.Signals(signum).name
            self._requested_at = now
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)  # a Python handler would have to wait for a collective to return
            if self._world.rank == 0:
                with suppress(OSError):  # nobody reads it
                    # Not through Python's stream, which a handler may have interrupted; a terminal has "^C" on its line.
                    # On a terminal the bar redraws its two lines.
                    os.write(2, b"\n" + _CTRL_C_ANSWER + b"\n" if os.isatty(2) else _CTRL_C_ANSWER)

    def any_rank_urgent(self, needed_seconds: float) -> bool:
        """Whether the run must leave at once: the request was repeated, or Slurm leaves less than ``needed_seconds``.

        A collective: every rank calls it and gets the same answer. Rank 0 asks Slurm, which may take a moment.
        """
        asks_slurm = self._world.rank == 0 and self.stop_reason != "SIGINT"
        seconds_left = read_slurm_seconds_left() if asks_slurm else None
        return self._world.any_rank(
            self.requested_again or (seconds_left is not None and seconds_left < needed_seconds)
        )

    def requeue_unless_stopped_manually(self) -> None:
        """Have rank 0 ask Slurm to requeue the saved job, unless the run was stopped by Ctrl-C or its launcher's end.

        A collective: every rank calls it, and a signal at any rank counts for all.
        Raises: RequeueRefusedError if Slurm refuses.
        """
        by_hand, warned = self._world.all_reduce_max(
            [int(self.stop_reason in reasons) for reasons in (("SIGINT", LAUNCHER_GONE), _WARNING_SIGNALS)]
        )
        if not by_hand:
            self._world.on_rank0(lambda: _requeue_or_raise(got_warning=bool(warned)))


@contextmanager
def handle_stop_signals(world: World) -> Iterator[Preemption]:
    """Install the signal handlers, watch the launcher in a thread, and restore the previous handlers at the end."""
    preemption, finished = Preemption(world), threading.Event()
    previous = {number: signal.signal(number, preemption.handle_signal) for number in _SIGNALS}
    if launchers := find_own_launchers():
        arguments = (launchers, preemption, finished)
        threading.Thread(target=_watch_launchers, args=arguments, name="launcher", daemon=True).start()
    try:
        yield preemption
    finally:
        finished.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch_launchers(launchers: list[Process], preemption: Preemption, finished: threading.Event) -> None:
    while not finished.wait(_LAUNCHER_POLL_SECONDS):
        if any(Process.from_pid(launcher.pid) != launcher for launcher in launchers):
            preemption.stop_reason = preemption.stop_reason or LAUNCHER_GONE
            return


def ignore_stop_signals() -> None:
    """Ignore all stop signals, once the run has left or finished and the process is about to end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class ShutdownNotice:
    """Seconds between Slurm's signal and the end of a job, and the setting that they come from."""

    seconds: float
    source: str


def read_shutdown_notice() -> ShutdownNotice | None:
    """Return the shortest notice that Slurm may give this job; None outside Slurm or if nothing ends the job.

    For the time limit the notice is the lead of ``--signal``. Slurm does not show it: it is read from the batch
    script or, if it was an option of sbatch's command line, from the variable FOVEAL_NOTICE. For preemption it is the
    partition's GraceTime. Without either, Slurm kills the job KillWait seconds after its SIGTERM.
    """
    job = show_step_job()
    if job is None:
        return None
    config = read_slurm_config()
    notices = [_time_limit_notice(job, config), _preemption_notice(job, config)]
    return min((notice for notice in notices if notice is not None), key=lambda notice: notice.seconds, default=None)


def read_slurm_seconds_left() -> float | None:
    """Return the seconds until Slurm ends this job, preemption included; None if there is no limit or no answer."""
    job = show_step_job()
    if job is None:
        return None
    if not job.is_running:
        return read_slurm_config().kill_wait
    return None if job.planned_time is None or job.run_time is None else job.planned_time - job.run_time


def requeue_slurm_job_if_due(*, got_warning_signal: bool = True) -> str | None:
    """Ask Slurm to requeue this job. Return Slurm's refusal; None if it agreed or if there is nothing to requeue.

    A job that exits with 0 during Slurm's grace time counts as completed, and Slurm does not requeue it by itself.
    A cancelled job gets the same SIGTERM, and Slurm would requeue it too: its state is no longer RUNNING, and it is
    left to end. A job at its time limit is not RUNNING either and is requeued.
    ``got_warning_signal``: whether a rank got a signal that only warns of an end. srun (--kill-on-bad-exit) and torchrun
    send SIGTERM if another rank failed, which looks to Slurm like a user's ``scancel --signal=TERM``: a job that is
    neither preempted nor ended is left to the job script, which sees whether a rank failed.
    """
    job_id = step_job_id()
    if job_id is None:
        return None
    try:
        job = show_job(job_id)
        if job is not None and not job.is_running and job.reason != "TimeLimit":
            return None
        goes_on = job is None or (job.is_running and not job.is_preempted)
        if goes_on and not got_warning_signal:
            _log.warning("%s; it requeues the job unless a rank failed", _LEFT_TO_SCRIPT_MESSAGE)
            return None
        return requeue_job(job_id)
    except SlurmUnavailableError as error:
        return str(error)


def _requeue_or_raise(*, got_warning: bool) -> None:
    if refusal := requeue_slurm_job_if_due(got_warning_signal=got_warning):
        raise RequeueRefusedError(f"the run was saved, but Slurm did not requeue the job ({refusal}); submit it again")


def _time_limit_notice(job: SlurmJobStatus, config: SlurmConfig) -> ShutdownNotice | None:
    if job.time_limit is None:
        return None
    if (stated := parse_scontrol_time(os.environ.get(NOTICE_ENV_VAR, ""))) is not None:
        return ShutdownNotice(stated, NOTICE_ENV_VAR)
    if (lead := read_batch_script(job.job_id).signal_lead) is not None:
        return ShutdownNotice(lead, f"--signal in {job.batch_script}")
    return _kill_wait_notice(config, "there is no --signal in the batch script")


def _preemption_notice(job: SlurmJobStatus, config: SlurmConfig) -> ShutdownNotice | None:
    if config.preempt_type != "preempt/partition_prio":  # with preempt/qos, the grace belongs to the QOS
        return None
    partitions = {partition.name: partition for partition in list_slurm_partitions()}
    partition = partitions.get(job.partition)
    if partition is None or partition.preempt_mode not in {"REQUEUE", "CANCEL"}:
        return None
    if partition.priority_tier == max(other.priority_tier for other in partitions.values()):
        return None
    if partition.grace:
        return ShutdownNotice(partition.grace, f"GraceTime of partition {partition.name}")
    return _kill_wait_notice(config, f"partition {partition.name} has no GraceTime")


def _kill_wait_notice(config: SlurmConfig, reason: str) -> ShutdownNotice | None:
    return None if config.kill_wait is None else ShutdownNotice(config.kill_wait, f"KillWait of this Slurm; {reason}")
