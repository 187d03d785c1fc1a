"""Who started this process and waits for it: torchrun, ``accelerate launch``, ``deepspeed``, or a chain on this machine; not a shell.

A launcher that is killed leaves its ranks alone, and nobody would look at them any more.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

LAUNCHER_ENV_VAR = (
    "FOVEAL_LAUNCHER"  # the variable in which a chain on this machine names itself: process number and start
)
_SHELL = re.compile(r"-?(?:ba|da|z|k|tc|c|fi)?sh|tmux.*|screen|login|sudo|su")


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine; ``start`` tells it from another that gets its number later."""

    pid: int
    start_time: str

    @classmethod
    def from_pid(cls, pid: int) -> "Process | None":
        """The process of a number; nothing where it has ended, waited for or not."""
        try:
            name, _, facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except OSError:
            return None
        fields = facts.split()
        return cls(pid, fields[19]) if name and fields[0] not in "ZX" else None

    def __str__(self) -> str:
        return f"{self.pid}:{self.start_time}"


def find_launchers() -> list[Process]:
    """The launchers of this process that live; a number that means another process here is none."""
    parent, (pid, _, start) = Process.from_pid(os.getppid()), os.environ.get(LAUNCHER_ENV_VAR, "").partition(":")
    chain = Process.from_pid(int(pid)) if pid.isascii() and pid.isdigit() else None
    found = [chain] if chain is not None and chain.start_time == start else []
    return [*found, parent] if parent is not None and _is_launcher(parent.pid) else found


def _is_launcher(pid: int) -> bool:
    """Whether our parent is a launcher: a shell that was given a launcher's variables is none, and may end."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    if _SHELL.fullmatch(name):
        return False
    return "TORCHELASTIC_RUN_ID" in os.environ or b"accelerate" in line or b"deepspeed" in line
