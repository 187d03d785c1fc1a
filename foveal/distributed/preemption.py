"""Preemption: a signal sets a flag, the ranks agree on it between two steps, and Slurm is asked to requeue the job.

Signal handlers do nothing else.
"""

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import FrameType

from foveal.distributed.launcher_process import Process, find_own_launchers
from foveal.distributed.world import World, slurm_job_id
from foveal.errors import RequeueRefusedError

# USR1: our scripts' warning before the time limit; USR2: submitit's; TERM: Slurm's preemption; INT: Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
LAUNCHER_GONE = "the launcher is gone"  # a stop reason; without a launcher no requeue is asked for
_LAUNCHER_POLL_SECONDS = 1.0
_REPEAT_WINDOW_SECONDS = 1.0  # within it, a second signal may be Slurm's repeat: one for the step, one for the job
_SCONTROL_TIMEOUT_SECONDS = 20.0
NOTICE_ENV_VAR = "FOVEAL_NOTICE"  # states sbatch's --signal lead, which scontrol does not show
_WARNING_SIGNALS = ("SIGUSR1", "SIGUSR2")  # signals that are never sent because a rank failed
# slurm/stage.sh searches for the beginning of this message.
_LEFT_TO_SCRIPT_MESSAGE = "foveal: saved and left on SIGTERM, which is left to the job script"
_log = logging.getLogger(__name__)


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

    For the time limit the notice is the lead of ``--signal``. scontrol does not show it: it is read from the batch
    script or, if it was an option of sbatch's command line, from the variable FOVEAL_NOTICE. For preemption it is the
    partition's GraceTime. Without either, Slurm kills the job KillWait seconds after its SIGTERM.
    """
    job = _show_job()
    if not job:
        return None
    slurm_config = _show_slurm_config()
    notices = [_time_limit_notice(job, slurm_config), _preemption_notice(job, slurm_config)]
    return min((notice for notice in notices if notice is not None), key=lambda notice: notice.seconds, default=None)


def read_slurm_seconds_left() -> float | None:
    """Return the seconds until Slurm ends this job, preemption included; None if there is no limit or no answer."""
    job = _show_job()
    if not job:
        return None
    if job.get("JobState") != "RUNNING":  # Slurm has begun to end it
        return _parse_slurm_seconds(_show_slurm_config().get("KillWait", ""))
    ran = _parse_slurm_seconds(job.get("RunTime", ""))
    try:  # both times are of one clock, the controller's
        limit = datetime.fromisoformat(job["EndTime"]) - datetime.fromisoformat(job["StartTime"])
    except (KeyError, ValueError):  # EndTime=Unknown: there is no limit
        return None
    return None if ran is None else limit.total_seconds() - ran


def requeue_slurm_job_if_due(*, got_warning_signal: bool = True) -> str | None:
    """Ask Slurm to requeue this job. Return Slurm's refusal; None if it agreed or if there is nothing to requeue.

    A job that exits with 0 during Slurm's grace time counts as completed, and Slurm does not requeue it by itself.
    A cancelled job gets the same SIGTERM, and Slurm would requeue it too: its state is no longer RUNNING, and it is
    left to end. A job at its time limit is not RUNNING either and is requeued.
    ``got_warning``: whether a rank got a signal that only warns of an end. srun (--kill-on-bad-exit) and torchrun send
    SIGTERM if another rank failed, which looks to Slurm like a user's ``scancel --signal=TERM``: a job that is neither
    preempted nor ended is left to the job script, which sees whether a rank failed.
    """
    job_id = _current_job_id()
    if job_id is None:
        return None
    try:
        shown = _run_scontrol("show", "job", "--oneliner", job_id)
        job = _parse_key_values(shown.stdout) if shown.returncode == 0 else {}
        ended = job.get("JobState", "RUNNING") != "RUNNING"
        if ended and job.get("Reason") != "TimeLimit":
            return None
        if not (got_warning_signal or ended or job.get("PreemptTime", "None") != "None"):
            _log.warning("%s; it requeues the job unless a rank failed", _LEFT_TO_SCRIPT_MESSAGE)
            return None
        answer = _run_scontrol("requeue", job_id)
    except (OSError, subprocess.TimeoutExpired) as error:  # a container without scontrol, a controller without answer
        return str(error)
    return answer.stderr.strip() or f"scontrol ended with {answer.returncode}" if answer.returncode else None


def _requeue_or_raise(*, got_warning: bool) -> None:
    if refusal := requeue_slurm_job_if_due(got_warning_signal=got_warning):
        raise RequeueRefusedError(f"the run was saved, but Slurm did not requeue the job ({refusal}); submit it again")


def _time_limit_notice(job: dict[str, str], slurm_config: dict[str, str]) -> ShutdownNotice | None:
    if _parse_slurm_seconds(job.get("TimeLimit", "")) is None:
        return None
    if (stated := _parse_slurm_seconds(os.environ.get(NOTICE_ENV_VAR, ""))) is not None:
        return ShutdownNotice(stated, NOTICE_ENV_VAR)
    script = _scontrol_output("write", "batch_script", job["JobId"], "-")
    leads = re.findall(r"^#SBATCH\b.*\s--signal=(?:B:)?\w+(?:@(\d+))?", script, re.MULTILINE)
    if leads:
        return ShutdownNotice(float(leads[-1] or 60), f"--signal in {job.get('Command', 'the batch script')}")
    kill_wait = _parse_slurm_seconds(slurm_config.get("KillWait", ""))
    if kill_wait is None:
        return None
    return ShutdownNotice(kill_wait, "KillWait of this Slurm; there is no --signal in the batch script")


def _preemption_notice(job: dict[str, str], slurm_config: dict[str, str]) -> ShutdownNotice | None:
    if slurm_config.get("PreemptType") != "preempt/partition_prio":  # with preempt/qos, the grace belongs to the QOS
        return None
    partitions = [_parse_key_values(line) for line in _scontrol_output("show", "partition", "--oneliner").splitlines()]
    tiers = {row.get("PartitionName", ""): int(row.get("PriorityTier", 0)) for row in partitions}
    name = job.get("Partition", "")
    partition = next((row for row in partitions if row.get("PartitionName") == name), {})
    if partition.get("PreemptMode") not in {"REQUEUE", "CANCEL"} or tiers[name] == max(tiers.values()):
        return None
    grace = _parse_slurm_seconds(partition.get("GraceTime", ""))
    if grace:
        return ShutdownNotice(grace, f"GraceTime of partition {name}")
    kill_wait = _parse_slurm_seconds(slurm_config.get("KillWait", ""))
    if kill_wait is None:
        return None
    return ShutdownNotice(kill_wait, f"KillWait of this Slurm; partition {name} has no GraceTime")


def _parse_slurm_seconds(text: str) -> float | None:
    """Parse Slurm's durations, ``1-02:03:04``, ``02:03:04``, ``20``, ``5 sec``; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)(?: sec)?", text)
    if match is None:
        return None
    days, first, second, last = (int(part or 0) for part in match.groups())
    hours, minutes = (first, second) if match[3] is not None else (0, first)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + last)


def _show_job() -> dict[str, str]:
    """Return the fields of ``scontrol show job`` for this job; empty outside a Slurm step or without an answer."""
    job_id = _current_job_id()
    return {} if job_id is None else _parse_key_values(_scontrol_output("show", "job", "--oneliner", job_id))


def _show_slurm_config() -> dict[str, str]:
    lines = (line.partition("=") for line in _scontrol_output("show", "config").splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _parse_key_values(line: str) -> dict[str, str]:
    """Parse ``Key=value Key=value``. The first value of a key counts: a quoted command may contain the same key."""
    return dict(reversed(re.findall(r"(\S+?)=(\S*)", line)))


def _scontrol_output(*arguments: str) -> str:
    try:
        return _run_scontrol(*arguments).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _current_job_id() -> str | None:
    """Return the job of this process as Slurm's commands name it; None outside a Slurm step."""
    return slurm_job_id() if "SLURM_STEP_ID" in os.environ else None


def _run_scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=_SCONTROL_TIMEOUT_SECONDS
    )
