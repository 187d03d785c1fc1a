"""Being asked to leave: a signal sets a flag, the ranks agree on it between two steps, nothing else happens in a handler."""

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

from foveal.distributed.launcher_process import Process, find_launchers
from foveal.distributed.world import World, slurm_job_id
from foveal.errors import RequeueRefusedError

# USR1: our scripts' warning before the time limit; USR2: submitit's; TERM: Slurm's preemption; INT: Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
LAUNCHER_GONE = "the launcher is gone"  # and with it whoever would start the run again
_LAUNCHER_POLL_SECONDS = 1.0  # seconds between two looks at the launcher
_REPEAT_WINDOW_SECONDS = 1.0  # seconds in which Slurm may send one signal twice, to the step and to the job
_SCONTROL_TIMEOUT_SECONDS = 20.0  # seconds for an answer of scontrol
NOTICE_ENV_VAR = "FOVEAL_NOTICE"  # the variable that says what Slurm keeps to itself
_WARNING_SIGNALS = ("SIGUSR1", "SIGUSR2")  # signals that nobody sends because a rank failed
_LEFT_TO_SCRIPT_MESSAGE = (
    "foveal: saved and left on SIGTERM, which is left to the job script"  # slurm/stage.sh looks for its beginning
)
_log = logging.getLogger(__name__)


class Preemption:
    """Whether somebody asked this run to leave, who, and whether they have asked again since."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._at = 0.0
        self.stop_reason: str | None = None
        self.asked_again = False

    def handle_signal(self, signum: int, _frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C ends the process where it stands, with a shell's exit code 130."""
        now = time.monotonic()
        self.asked_again |= self.stop_reason is not None and now - self._at > _REPEAT_WINDOW_SECONDS
        if self.stop_reason is None:
            self.stop_reason, self._at = signal.Signals(signum).name, now
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)  # a handler would have to wait for a collective to return

    def is_urgent(self, needed_seconds: float) -> bool:
        """Whether only what must be done should be: asked a second time, or Slurm leaves less than ``needed`` seconds.

        The same on every rank, each of which calls it; one of them asks Slurm, which may take a moment.
        """
        asks = self._world.rank == 0 and self.stop_reason != "SIGINT"
        left = read_seconds_left() if asks else None
        return self._world.any_rank(self.asked_again or (left is not None and left < needed_seconds))

    def requeue_if_preempted(self) -> None:
        """Have one rank ask Slurm for the next start of a run that was saved, unless it was ended by hand, with Ctrl-C
        or by the end of its launcher.

        Every rank calls it; what one of them heard counts. Raises: NotRequeued where Slurm refuses.
        """
        by_hand, warned = self._world.all_reduce_max(
            [int(self.stop_reason in each) for each in (("SIGINT", LAUNCHER_GONE), _WARNING_SIGNALS)]
        )
        if not by_hand:
            self._world.on_rank0(lambda: _requeue_or_raise(got_warning=bool(warned)))


@contextmanager
def handle_stop_signals(world: World) -> Iterator[Preemption]:
    """Install the handlers, and put back what was there; until then a thread sees to it that the launcher lives."""
    preemption, over = Preemption(world), threading.Event()
    before = {number: signal.signal(number, preemption.handle_signal) for number in _SIGNALS}
    if known := find_launchers():
        threading.Thread(target=_watch_launchers, args=(known, preemption, over), name="launcher", daemon=True).start()
    try:
        yield preemption
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch_launchers(launchers: list[Process], preemption: Preemption, over: threading.Event) -> None:
    while not over.wait(_LAUNCHER_POLL_SECONDS):
        if any(Process.from_pid(each.pid) != each for each in launchers):
            preemption.stop_reason = preemption.stop_reason or LAUNCHER_GONE
            return


def ignore_signals() -> None:
    """Hear nothing more: the run has left or is finished, and the process is about to end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class ShutdownNotice:
    """How long before its end Slurm tells a job, and what says so."""

    seconds: float
    source: str


def read_shutdown_notice() -> ShutdownNotice | None:
    """The shortest notice that this job may get, before any came; nothing outside Slurm or where nothing ends the job.

    Before the time limit it is the lead of ``--signal``, which Slurm keeps to itself: it is read from the batch script,
    and where it was given on the command line of sbatch from the variable FOVEAL_NOTICE. A preempted job has its partition's GraceTime.
    Where neither is set, Slurm kills KillWait seconds after its SIGTERM.
    """
    job = _show_job()
    if not job:
        return None
    rules = _show_slurm_config()
    found = [_time_limit_notice(job, rules), _preemption_notice(job, rules)]
    return min((each for each in found if each is not None), key=lambda each: each.seconds, default=None)


def read_seconds_left() -> float | None:
    """Seconds until Slurm ends this job, as things stand: preemption brings the end nearer. Nothing if nobody knows."""
    job = _show_job()
    if not job:
        return None
    if job.get("JobState") != "RUNNING":  # it has been told to end, and was not asked first
        return _parse_slurm_seconds(_show_slurm_config().get("KillWait", ""))
    ran = _parse_slurm_seconds(job.get("RunTime", ""))
    try:  # of one clock: the controller's
        whole = datetime.fromisoformat(job["EndTime"]) - datetime.fromisoformat(job["StartTime"])
    except (KeyError, ValueError):  # EndTime=Unknown: there is no limit
        return None
    return None if ran is None else whole.total_seconds() - ran


def requeue_slurm_job(*, got_warning: bool = True) -> str | None:
    """Ask Slurm to start this job again; what it answered if it refused, nothing where there is no job to start again.

    A job that exits 0 during Slurm's grace time counts as completed and is not requeued by itself. A job that somebody
    cancels gets the same SIGTERM, and Slurm would requeue it too: it is no longer running, and is left to end. One that
    has reached its time limit is not running either, and is to go on.
    ``warned``: whether a rank got a signal that only warns of an end. srun (--kill-on-bad-exit) and torchrun send SIGTERM
    where another rank failed, and Slurm then knows no more than after a user's ``scancel --signal=TERM``: a job that is
    neither preempted nor ended is left to the job script, which sees whether a rank failed.
    """
    mine = _current_job_id()
    if mine is None:
        return None
    try:
        shown = _run_scontrol("show", "job", "--oneliner", mine)
        job = _parse_key_values(shown.stdout) if shown.returncode == 0 else {}
        ended = job.get("JobState", "RUNNING") != "RUNNING"
        if ended and job.get("Reason") != "TimeLimit":
            return None
        if not (got_warning or ended or job.get("PreemptTime", "None") != "None"):
            _log.warning("%s; it requeues the job unless a rank failed", _LEFT_TO_SCRIPT_MESSAGE)
            return None
        answer = _run_scontrol("requeue", mine)
    except (OSError, subprocess.TimeoutExpired) as error:  # a container without Slurm's commands, a silent controller
        return str(error)
    return answer.stderr.strip() or f"scontrol ended with {answer.returncode}" if answer.returncode else None


def _requeue_or_raise(*, got_warning: bool) -> None:
    if refusal := requeue_slurm_job(got_warning=got_warning):
        raise RequeueRefusedError(f"the run was saved, but Slurm did not requeue the job ({refusal}); submit it again")


def _time_limit_notice(job: dict[str, str], slurm_config: dict[str, str]) -> ShutdownNotice | None:
    if _parse_slurm_seconds(job.get("TimeLimit", "")) is None:
        return None
    if (stated := _parse_slurm_seconds(os.environ.get(NOTICE_ENV_VAR, ""))) is not None:
        return ShutdownNotice(stated, NOTICE_ENV_VAR)
    script = _scontrol_output("write", "batch_script", job["JobId"], "-")
    lead = re.findall(r"^#SBATCH\b.*\s--signal=(?:B:)?\w+(?:@(\d+))?", script, re.MULTILINE)
    if lead:
        return ShutdownNotice(float(lead[-1] or 60), f"--signal in {job.get('Command', 'the batch script')}")
    wait = _parse_slurm_seconds(slurm_config.get("KillWait", ""))
    return (
        None
        if wait is None
        else ShutdownNotice(wait, "KillWait of this Slurm; there is no --signal in the batch script")
    )


def _preemption_notice(job: dict[str, str], slurm_config: dict[str, str]) -> ShutdownNotice | None:
    if slurm_config.get("PreemptType") != "preempt/partition_prio":  # with preempt/qos, the grace belongs to the QOS
        return None
    partitions = [_parse_key_values(line) for line in _scontrol_output("show", "partition", "--oneliner").splitlines()]
    tiers = {each.get("PartitionName", ""): int(each.get("PriorityTier", 0)) for each in partitions}
    name = job.get("Partition", "")
    ours = next((each for each in partitions if each.get("PartitionName") == name), {})
    if ours.get("PreemptMode") not in {"REQUEUE", "CANCEL"} or tiers[name] == max(tiers.values()):
        return None
    grace = _parse_slurm_seconds(ours.get("GraceTime", ""))
    if grace:
        return ShutdownNotice(grace, f"GraceTime of partition {name}")
    wait = _parse_slurm_seconds(slurm_config.get("KillWait", ""))
    return None if wait is None else ShutdownNotice(wait, f"KillWait of this Slurm; partition {name} has no GraceTime")


def _parse_slurm_seconds(text: str) -> float | None:
    """Slurm's times: ``1-02:03:04``, ``02:03:04``, ``20``, ``5 sec``; nothing for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)(?: sec)?", text)
    if found is None:
        return None
    days, first, second, last = (int(part or 0) for part in found.groups())
    hours, minutes = (first, second) if found[3] is not None else (0, first)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + last)


def _show_job() -> dict[str, str]:
    """What ``scontrol show`` says of this job; nothing outside a step of one, or without an answer."""
    mine = _current_job_id()
    return {} if mine is None else _parse_key_values(_scontrol_output("show", "job", "--oneliner", mine))


def _show_slurm_config() -> dict[str, str]:
    lines = (line.partition("=") for line in _scontrol_output("show", "config").splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _parse_key_values(line: str) -> dict[str, str]:
    """``Key=value Key=value``: the first of each key, since a command that is quoted may have the like."""
    return dict(reversed(re.findall(r"(\S+?)=(\S*)", line)))


def _scontrol_output(*arguments: str) -> str:
    try:
        return _run_scontrol(*arguments).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _current_job_id() -> str | None:
    """The job that this process is a step of, as Slurm's commands call it."""
    return slurm_job_id() if "SLURM_STEP_ID" in os.environ else None


def _run_scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=_SCONTROL_TIMEOUT_SECONDS
    )
