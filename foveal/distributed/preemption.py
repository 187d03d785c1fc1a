"""Being asked to leave: a signal sets a flag, the ranks agree on it between two steps, nothing else happens in a handler."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from foveal.distributed.world import World

# USR1: our scripts' warning before the time limit; USR2: submitit's; TERM: Slurm's preemption; INT: Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Whether somebody asked this run to leave, and who."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.heard: str | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C means now."""
        if self.heard == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.heard = signal.Signals(number).name

    def agreed(self) -> bool:
        """True on every rank if any rank was asked. A collective: every rank calls it at the same step."""
        return self._world.any(self.heard is not None)


@contextmanager
def listening(world: World) -> Iterator[Preemption]:
    """Install the handlers, and put back what was there."""
    preemption = Preemption(world)
    before = {number: signal.signal(number, preemption.note) for number in _SIGNALS}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requeue() -> str | None:
    """Ask Slurm to start this job again; what it answered if it refused, nothing where there is no job to start again.

    A job that exits 0 during Slurm's grace time counts as completed and is not requeued by itself. A job that somebody
    cancels gets the same SIGTERM, and Slurm would requeue it too: it is no longer running, and is left to end.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SLURM_STEP_ID" not in os.environ:
        return None
    try:
        shown = _scontrol("show", "job", "--oneliner", job)
        if shown.returncode == 0 and " JobState=RUNNING " not in shown.stdout:
            return None
        answer = _scontrol("requeue", job)
    except OSError as error:  # a container without Slurm's commands
        return str(error)
    return answer.stderr.strip() or f"scontrol ended with {answer.returncode}" if answer.returncode else None


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
