"""Real processes that start in a moment: forks of a server that has imported torch and a stage already.

A start of Python with all that costs five seconds of a processor. What is tried here (a kill, a stop, a lost rank) is the
same in a fork: a process and session of its own, with its own environment, folder, and outputs.
"""

import contextlib
import itertools
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PATIENCE, Ended, lone

# For all tests: one server forks for a test process, and only the list that was set last counts.
CONTEXT = multiprocessing.get_context("forkserver")
# Not what is run itself: runpy runs a module that nobody has imported. A child imports the test module of its function,
# and with it pytest. DeepSpeed asks for GPUs, after which no fork may use one.
_PRELOADED = ["pytest", "accelerate", "foveal.training.launch", "pretrain.train", "distill.train", "finetune.train"]
CONTEXT.set_forkserver_preload(_PRELOADED if torch.cuda.is_available() else [*_PRELOADED, "deepspeed"])
_numbers = itertools.count()


class Forked:
    """``python SCRIPT ARGUMENTS``, or ``python -m MODULE ARGUMENTS`` where ``script`` is no path.

    ``replaced``: what takes the place of a module's or a class's attribute, by its whole name: limits that a test need not
    wait for.
    """

    def __init__(
        self,
        script: str | Path,
        arguments: Sequence[object],
        cwd: Path,
        replaced: Mapping[str, Any] | None = None,
        /,
        **environment: str,
    ) -> None:
        number = next(_numbers)
        self._outputs = [cwd / f".forked-{os.getpid()}-{number}-{name}" for name in ("out", "err")]
        words = [str(word) for word in arguments]
        told = (script, words, cwd, lone(cwd) | environment, replaced or {}, self._outputs)
        self.process: BaseProcess = CONTEXT.Process(target=_become, args=told)
        self.process.start()

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def send_signal_to_all(self, number: signal.Signals) -> None:
        """Send it to the process and to those that it started, as a terminal and Slurm do."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ended(self) -> Ended:
        """Wait for the end."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            pytest.fail(f"still running after {PATIENCE} s:\n{self._said()}")
        return Ended(self.process.exitcode, *self._said())

    def _said(self) -> list[str]:
        return [file.read_text() if file.exists() else "" for file in self._outputs]


def stop(pid: int) -> None:
    """Stop a process, and wait until every thread of it stands still: one may be about to write."""
    os.kill(pid, signal.SIGSTOP)
    patience = time.monotonic() + PATIENCE
    while any(_runs(thread) for thread in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < patience, f"process {pid} does not stop"


def _runs(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] != "T"
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended


def all_alive(processes: Sequence[Forked]) -> bool:
    """Whether none of them has ended."""
    return all(each.process.is_alive() for each in processes)


def ranks_of(size: int, port: int) -> list[dict[str, str]]:
    """What each of so many ranks on this machine has in its environment."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _become(
    script: str | Path,
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    replaced: Mapping[str, Any],
    outputs: Sequence[Path],
) -> None:
    os.setsid()
    for file, descriptor in zip(outputs, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    for whole_name, value in replaced.items():
        owner, _, name = whole_name.rpartition(".")
        pkgutil.resolve_name(whole_name)  # a name that is not there is a mistake of the test
        setattr(pkgutil.resolve_name(owner), name, value)
    if isinstance(script, Path):
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
