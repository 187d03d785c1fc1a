#!/usr/bin/env python
"""``PYTHON_EXEC=.../holding.py torchrun ... -m MODULE ARGUMENTS``: ranks that wait, so that no signal comes too late.

A tiny run is over in a moment. What holds it are two files in the folder of the command: ``hold`` with the number of a
step, at whose end every rank waits until it is asked to leave; and ``stay``, without which a process that is done ends.
One that waits says so with a file ``held-RANK``, one that stays with ``done-RANK``.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import NoReturn

from foveal.training.loop import RankFlags
from foveal.training.run import Run

_end = os._exit
_LOOKS = 0.01  # seconds
_LONGEST = 120.0  # seconds: whoever holds it may have failed


def hold_after_steps() -> None:
    """Wait before the ranks ask one another whether to leave, which they do at the end of the step after ``Run.step``."""
    read_flags = Run.read_flags

    def held(self: Run) -> RankFlags:
        def is_held() -> bool:
            return self.preemption.stop_reason is None and self.step + 1 >= _last_step()

        end = time.monotonic() + _LONGEST
        if is_held():
            Path(f"held-{self.world.rank}").touch()
        while is_held() and time.monotonic() < end:
            time.sleep(_LOOKS)
        return read_flags(self)

    Run.read_flags = held


def _last_step() -> float:
    try:
        return int(Path("hold").read_text())
    except FileNotFoundError:
        return float("inf")


def stay_when_done(code: int) -> NoReturn:
    """The last that a rank among several does is to leave by ``os._exit``."""
    end, stay = time.monotonic() + _LONGEST, Path("stay")
    if stay.exists():
        Path(f"done-{os.environ['RANK']}").touch()
    while stay.exists() and time.monotonic() < end:
        time.sleep(_LOOKS)
    _end(code)


if __name__ == "__main__":
    os._exit = stay_when_done
    if sys.path[0] == str(Path(__file__).parent):
        sys.path.pop(0)  # the files beside this one are none of the stage's modules
    hold_after_steps()
    sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
