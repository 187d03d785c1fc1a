"""Commands as a user types them: each in a session of its own, with a limit, and nothing of it outlives a test."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from foveal.tracking.jsonl import read_rows_without_time

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
PATIENCE = 150  # seconds that a command, or a wait for a row, may take on a busy machine
_LOOKS = 0.01  # seconds between two looks at a file
# What a test process may have from its own launcher or from the worlds it joined.
_FOREIGN = ("SLURM_", "ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_")


def lone(cwd: Path) -> dict[str, str]:
    """The environment of a command that nobody launched."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    # A user's own configuration of Accelerate lies under HF_HOME, and would change what a bare launch does.
    ours |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "nobody")}
    return ours | {"PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Started:
    """A command that is running."""

    def __init__(self, command: Sequence[str | Path], cwd: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=lone(cwd) | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ended(self, patience: float = PATIENCE) -> Ended:
        """Wait for the end, so many seconds."""
        try:
            out, err = self.process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {patience} s:\n{self._killed()}")
        return Ended(self.process.returncode, out, err)

    def reaches(self, run: Path, step: int) -> None:
        """Wait until the run directory has a row of that step."""
        if not wait_for_row(run, step, lambda: self.process.poll() is None):
            pytest.fail(f"{run} has not reached step {step}:\n{self._killed()}")

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that torchrun started, by rank."""
        import psutil  # here and below, because tests/gpu runs where it is not installed

        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.ppid() not in found.values():  # a rank's own children have its number, too
                    found.setdefault(int(child.environ()["RANK"]), child.pid)
        return found

    def _killed(self) -> str:
        """End the whole session, torchrun's ranks (which have sessions of their own) first; what it said."""
        import psutil

        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        out, err = self.process.communicate()
        return f"{out}\n{err}"


def ended(command: Sequence[str | Path], cwd: Path, **environment: str) -> Ended:
    """Run a command to its end."""
    return Started(command, cwd, **environment).ended()


def wait_for_row(run: Path, step: int, is_running: Callable[[], bool]) -> bool:
    """Wait until the run directory has a row of that step; whether it has before the end of whoever writes it."""
    file, patience = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (file.exists() and any(row["step"] >= step for row in read_rows_without_time(file))):
        if not is_running() or time.monotonic() > patience:
            return False
        time.sleep(_LOOKS)
    return True


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's steps; those of evaluations and results are left out."""
    return [row for row in read_rows_without_time(run / "metrics.jsonl") if "loss" in row]


def children(parent: int) -> list[int]:
    """The process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def wait_for_end_of(variable: str, value: str, patience: float = PATIENCE) -> None:
    """Wait until no process was started with this in its environment."""
    until, words = time.monotonic() + patience, f"{variable}={value}".encode()
    while left := [folder.name for folder in Path("/proc").glob("[0-9]*") if words in _environment(folder)]:
        assert time.monotonic() < until, f"these live on: {left}"
        time.sleep(_LOOKS)


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]
