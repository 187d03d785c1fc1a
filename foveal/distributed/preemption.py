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

from foveal.distributed.launcher_process import Process, launchers
from foveal.distributed.world import World, job_id
from foveal.errors import NotRequeued

# USR1: our scripts' warning before the time limit; USR2: submitit's; TERM: Slurm's preemption; INT: Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
ORPHANED = "the launcher is gone"  # and with it whoever would start the run again
_LOOKS = 1.0  # seconds between two looks at the launcher
_ECHO = 1.0  # seconds in which Slurm may send one signal twice, to the step and to the job
_PATIENCE = 20.0  # seconds for an answer of scontrol
NOTICE = "FOVEAL_NOTICE"  # the variable that says what Slurm keeps to itself
_WARNINGS = ("SIGUSR1", "SIGUSR2")  # signals that nobody sends because a rank failed
_LEFT = "foveal: saved and left on SIGTERM, which is left to the job script"  # slurm/stage.sh looks for its beginning
_log = logging.getLogger(__name__)


class Preemption:
    """Whether somebody asked this run to leave, who, and whether they have asked again since."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._at = 0.0
        self.heard: str | None = None
        self.again = False

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C ends the process where it stands, with a shell's exit code 130."""
        now = time.monotonic()
        self.again |= self.heard is not None and now - self._at > _ECHO
        if self.heard is None:
            self.heard, self._at = signal.Signals(number).name, now
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a handler would have to wait for a collective to return

    def hurried(self, needed: float) -> bool:
        """Whether only what must be done should be: asked a second time, or Slurm leaves less than ``needed`` seconds.

        The same on every rank, each of which calls it; one of them asks Slurm, which may take a moment.
        """
        asks = self._world.rank == 0 and self.heard != "SIGINT"
        left = seconds_left() if asks else None
        return self._world.any(self.again or (left is not None and left < needed))

    def go_on_later(self) -> None:
        """Have one rank ask Slurm for the next start of a run that was saved, unless it was ended by hand, with Ctrl-C
        or by the end of its launcher.

        Every rank calls it; what one of them heard counts. Errors: NotRequeued where Slurm refuses.
        """
        by_hand, warned = self._world.most([int(self.heard in each) for each in (("SIGINT", ORPHANED), _WARNINGS)])
        if not by_hand:
            self._world.once(lambda: _go_on_later(warned=bool(warned)))


@contextmanager
def listening(world: World) -> Iterator[Preemption]:
    """Install the handlers, and put back what was there; until then a thread sees to it that the launcher lives."""
    preemption, over = Preemption(world), threading.Event()
    before = {number: signal.signal(number, preemption.note) for number in _SIGNALS}
    if known := launchers():
        threading.Thread(target=_see_to, args=(known, preemption, over), name="launcher", daemon=True).start()
    try:
        yield preemption
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _see_to(known: list[Process], preemption: Preemption, over: threading.Event) -> None:
    while not over.wait(_LOOKS):
        if any(Process.of(each.pid) != each for each in known):
            preemption.heard = preemption.heard or ORPHANED
            return


def deaf() -> None:
    """Hear nothing more: the run has left or is finished, and the process is about to end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class Notice:
    """How long before its end Slurm tells a job, and what says so."""

    seconds: float
    source: str


def notice() -> Notice | None:
    """The shortest notice that this job may get, before any came; nothing outside Slurm or where nothing ends the job.

    Before the time limit it is the lead of ``--signal``, which Slurm keeps to itself: it is read from the batch script,
    and where it was given on the command line of sbatch from the variable FOVEAL_NOTICE. A preempted job has its partition's GraceTime.
    Where neither is set, Slurm kills KillWait seconds after its SIGTERM.
    """
    job = _job()
    if not job:
        return None
    rules = _config()
    found = [_before_limit(job, rules), _before_preemption(job, rules)]
    return min((each for each in found if each is not None), key=lambda each: each.seconds, default=None)


def seconds_left() -> float | None:
    """Seconds until Slurm ends this job, as things stand: preemption brings the end nearer. Nothing if nobody knows."""
    job = _job()
    if not job:
        return None
    if job.get("JobState") != "RUNNING":  # it has been told to end, and was not asked first
        return _seconds(_config().get("KillWait", ""))
    ran = _seconds(job.get("RunTime", ""))
    try:  # of one clock: the controller's
        whole = datetime.fromisoformat(job["EndTime"]) - datetime.fromisoformat(job["StartTime"])
    except (KeyError, ValueError):  # EndTime=Unknown: there is no limit
        return None
    return None if ran is None else whole.total_seconds() - ran


def requeue(*, warned: bool = True) -> str | None:
    """Ask Slurm to start this job again; what it answered if it refused, nothing where there is no job to start again.

    A job that exits 0 during Slurm's grace time counts as completed and is not requeued by itself. A job that somebody
    cancels gets the same SIGTERM, and Slurm would requeue it too: it is no longer running, and is left to end. One that
    has reached its time limit is not running either, and is to go on.
    ``warned``: whether a rank got a signal that only warns of an end. srun (--kill-on-bad-exit) and torchrun send SIGTERM
    where another rank failed, and Slurm then knows no more than after a user's ``scancel --signal=TERM``: a job that is
    neither preempted nor ended is left to the job script, which sees whether a rank failed.
    """
    mine = _mine()
    if mine is None:
        return None
    try:
        shown = _scontrol("show", "job", "--oneliner", mine)
        job = _pairs(shown.stdout) if shown.returncode == 0 else {}
        ended = job.get("JobState", "RUNNING") != "RUNNING"
        if ended and job.get("Reason") != "TimeLimit":
            return None
        if not (warned or ended or job.get("PreemptTime", "None") != "None"):
            _log.warning("%s; it requeues the job unless a rank failed", _LEFT)
            return None
        answer = _scontrol("requeue", mine)
    except (OSError, subprocess.TimeoutExpired) as error:  # a container without Slurm's commands, a silent controller
        return str(error)
    return answer.stderr.strip() or f"scontrol ended with {answer.returncode}" if answer.returncode else None


def _go_on_later(*, warned: bool) -> None:
    if refusal := requeue(warned=warned):
        raise NotRequeued(f"the run was saved, but Slurm did not requeue the job ({refusal}); submit it again")


def _before_limit(job: dict[str, str], rules: dict[str, str]) -> Notice | None:
    if _seconds(job.get("TimeLimit", "")) is None:
        return None
    if (stated := _seconds(os.environ.get(NOTICE, ""))) is not None:
        return Notice(stated, NOTICE)
    script = _answer("write", "batch_script", job["JobId"], "-")
    lead = re.findall(r"^#SBATCH\b.*\s--signal=(?:B:)?\w+(?:@(\d+))?", script, re.MULTILINE)
    if lead:
        return Notice(float(lead[-1] or 60), f"--signal in {job.get('Command', 'the batch script')}")
    wait = _seconds(rules.get("KillWait", ""))
    return None if wait is None else Notice(wait, "KillWait of this Slurm; there is no --signal in the batch script")


def _before_preemption(job: dict[str, str], rules: dict[str, str]) -> Notice | None:
    if rules.get("PreemptType") != "preempt/partition_prio":  # with preempt/qos, the grace belongs to the QOS
        return None
    partitions = [_pairs(line) for line in _answer("show", "partition", "--oneliner").splitlines()]
    tiers = {each.get("PartitionName", ""): int(each.get("PriorityTier", 0)) for each in partitions}
    name = job.get("Partition", "")
    ours = next((each for each in partitions if each.get("PartitionName") == name), {})
    if ours.get("PreemptMode") not in {"REQUEUE", "CANCEL"} or tiers[name] == max(tiers.values()):
        return None
    grace = _seconds(ours.get("GraceTime", ""))
    if grace:
        return Notice(grace, f"GraceTime of partition {name}")
    wait = _seconds(rules.get("KillWait", ""))
    return None if wait is None else Notice(wait, f"KillWait of this Slurm; partition {name} has no GraceTime")


def _seconds(text: str) -> float | None:
    """Slurm's times: ``1-02:03:04``, ``02:03:04``, ``20``, ``5 sec``; nothing for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)(?: sec)?", text)
    if found is None:
        return None
    days, first, second, last = (int(part or 0) for part in found.groups())
    hours, minutes = (first, second) if found[3] is not None else (0, first)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + last)


def _job() -> dict[str, str]:
    """What ``scontrol show`` says of this job; nothing outside a step of one, or without an answer."""
    mine = _mine()
    return {} if mine is None else _pairs(_answer("show", "job", "--oneliner", mine))


def _config() -> dict[str, str]:
    lines = (line.partition("=") for line in _answer("show", "config").splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _pairs(line: str) -> dict[str, str]:
    """``Key=value Key=value``: the first of each key, since a command that is quoted may have the like."""
    return dict(reversed(re.findall(r"(\S+?)=(\S*)", line)))


def _answer(*arguments: str) -> str:
    try:
        return _scontrol(*arguments).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _mine() -> str | None:
    """The job that this process is a step of, as Slurm's commands call it."""
    return job_id() if "SLURM_STEP_ID" in os.environ else None


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=_PATIENCE)
