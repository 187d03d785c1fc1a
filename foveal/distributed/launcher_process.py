"""Find the processes that launched this rank: torchrun, accelerate, deepspeed, a local pipeline; never a shell.

If a launcher is killed, its ranks go on without supervision.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

LAUNCHER_ENV_VAR = "FOVEAL_LAUNCHER"  # set by local_launch.py: its process as pid:start_time
_SHELL = re.compile(r"-?(?:ba|da|z|k|tc|c|fi)?sh|tmux.*|screen|login|sudo|su")


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine. ``start_time`` tells it from a later process with the same pid."""

    pid: int
    start_time: str

    @classmethod
    def from_pid(cls, pid: int) -> "Process | None":
        """Return the process of a pid; None if it has ended, zombies included."""
        try:
            name, _, stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except OSError:
            return None
        fields = stat.split()
        return cls(pid, fields[19]) if name and fields[0] not in "ZX" else None

    def __str__(self) -> str:
        return f"{self.pid}:{self.start_time}"


def find_own_launchers() -> list[Process]:
    """Return the live launchers of this process. A pid that belongs to another process on this machine is ignored."""
    parent = Process.from_pid(os.getppid())
    pid, _, start_time = os.environ.get(LAUNCHER_ENV_VAR, "").partition(":")
    pipeline = Process.from_pid(int(pid)) if pid.isascii() and pid.isdigit() else None
    launchers = [pipeline] if pipeline is not None and pipeline.start_time == start_time else []
    if parent is not None and _is_launcher(parent.pid):
        launchers.append(parent)
    return launchers


def _is_launcher(pid: int) -> bool:
    """Whether the parent process ``pid`` is a launcher. A shell with a launcher's variables is none: it may end."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    if _SHELL.fullmatch(name):
        return False
    return "TORCHELASTIC_RUN_ID" in os.environ or b"accelerate" in command_line or b"deepspeed" in command_line
