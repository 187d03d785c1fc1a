"""``python slowly.py SECONDS -m MODULE ARGUMENTS``: a stage whose steps take so many seconds more, and no more CPU.

Faults are to strike in the middle of a run, and Slurm takes half a minute to miss a node: a tiny model would be done.
While there is a file ``hold`` in the folder of the job, the run waits.
"""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.objective import Reconstruct

_LONGEST_HOLD = 45.0  # seconds: the watchdog finds a step of a minute worth a word


def slow_down(seconds: float) -> None:
    forward = Reconstruct.__call__

    def slowly(self: Reconstruct, *arguments: Any) -> Any:
        time.sleep(seconds)
        end = time.monotonic() + _LONGEST_HOLD
        while Path("hold").exists() and time.monotonic() < end:
            time.sleep(0.1)
        return forward(self, *arguments)

    Reconstruct.__call__ = slowly  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    sys.path.pop(0)  # the files beside this one are none of the stage's modules
    slow_down(float(sys.argv[1]))
    module, sys.argv = sys.argv[3], [sys.argv[3], *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
