"""Start a stage on this machine, alone or as several ranks, and end as it ends.

Does what torchrun does on one node, with two differences: the last line on the terminal is the stage's own sentence and
not the launcher's traceback, and the exit code is that of the rank that failed first and not 1. Imports no torch, so
that the ranks start at once.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from foveal.distributed.launcher_process import LAUNCHER_ENV_VAR, Process

_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_POLL_SECONDS = 0.05
# After the first failure the other ranks notice it themselves and say what they know of it, then they are ended.
_SECONDS_UNTIL_TERM, _SECONDS_UNTIL_KILL = 20.0, 50.0
_PYTHON_VARIABLE = "PYTHON_EXEC"  # torchrun's variable for the interpreter of the ranks
# What another launcher left in the environment would contradict the place of a rank.
_FOREIGN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "CROSS_RANK")


def run_local_ranks(python_args: Sequence[str], num_processes: int) -> int:
    """Run ``python ARGUMENTS`` as ``num_processes`` ranks of one run; one process is no rank.

    Returns 0 if every rank does, the exit code of the rank that failed first as a shell shows it, or 128 + the first
    signal received meanwhile. Every rank has a process group of its own, and Ctrl-C is forwarded to each once; the ranks
    save and leave. A second Ctrl-C ends all at once.
    """
    received: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        kills = number == signal.SIGINT in received
        if kills:
            os.write(2, b"foveal: a second Ctrl-C ends the run at once, without saving\n")
        received.append(number)
        _signal_all(ranks, signal.SIGKILL if kills else number)

    previous_handlers = {number: signal.signal(number, forward) for number in _FORWARDED_SIGNALS}
    try:
        for environment in rank_environments(num_processes):
            if not received:
                python = os.environ.get(_PYTHON_VARIABLE, sys.executable) if num_processes > 1 else sys.executable
                ranks.append(subprocess.Popen([python, *python_args], env=environment, process_group=0))
        code = _wait_for_ranks(ranks)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code


def rank_environments(num_processes: int) -> list[dict[str, str]]:
    """Return the environment of each rank.

    The cores are shared out unless OMP_NUM_THREADS is set. A rank saves and leaves when this process is gone.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    shared = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        LAUNCHER_ENV_VAR: str(Process.from_pid(os.getpid()) or ""),
    }
    if num_processes == 1:
        return [shared]
    for name in _FOREIGN_VARIABLES:
        shared.pop(name, None)
    size = str(num_processes)
    return [
        {**shared, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        for rank in map(str, range(num_processes))
    ]


def _wait_for_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for the end of all ranks, which is hastened if one fails; return the exit code of the first that failed."""
    first_code, failed_at, asked_to_leave = 0, 0.0, False
    while True:
        codes = [rank.poll() for rank in ranks]
        if not first_code and (failed := [code for code in codes if code]):
            first_code, failed_at = failed[0], time.monotonic()
        if None not in codes:
            return first_code if first_code >= 0 else 128 - first_code
        if first_code and time.monotonic() - failed_at > _SECONDS_UNTIL_KILL:
            _signal_all(ranks, signal.SIGKILL)
        elif first_code and not asked_to_leave and time.monotonic() - failed_at > _SECONDS_UNTIL_TERM:
            asked_to_leave = True
            _signal_all(ranks, signal.SIGTERM)
        time.sleep(_POLL_SECONDS)


def _signal_all(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(number)
