"""``python slowly.py SECONDS -m MODULE ARGUMENTS``: a stage whose steps take so many seconds more, and no more CPU.

Faults are to strike in the middle of a run, and Slurm takes half a minute to miss a node: a tiny model would be done.
While there is a file ``hold`` in the folder of the job, the run waits. A file ``poison`` with a step in it makes three
batches from there on NaN on rank 0, now and whenever they come again; ``poisoned`` remembers which they are. While there
is a file ``late``, all ranks but the first wait before they begin; while there is one ``occupied``, another program listens
where rank 0 would serve, and the file has the port. The rank that a file ``memory`` names has no memory left for a batch.
Rank 0 writes down in ``meeting`` where the ranks have met.
"""

import json
import math
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from foveal.data.batch import Batch
from pretrain.objective import MaskedModelingLoss

_POISONED = 3  # batches in a row: what recovery.rollback_after_skips takes for a reason to go back
_RANK = os.environ.get("SLURM_PROCID", "0")
_LONGEST_DELAY = 150.0  # seconds
_LONGEST_HOLD = 45.0  # seconds: the watchdog finds a step of a minute worth a word


def slow_down(seconds: float) -> None:
    forward = MaskedModelingLoss.__call__

    def slowly(self: MaskedModelingLoss, model: Any, batch: Batch) -> Any:
        time.sleep(seconds)
        end = time.monotonic() + _LONGEST_HOLD
        while Path("hold").exists() and time.monotonic() < end:
            time.sleep(0.1)
        note_meeting()
        if Path("memory").exists() and Path("memory").read_text() == _RANK:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        total, numbers = forward(self, model, batch)
        return (total * math.nan if poisoned(batch) else total), numbers

    MaskedModelingLoss.__call__ = slowly  # pyright: ignore[reportAttributeAccessIssue]


def poisoned(batch: Batch) -> bool:
    """Whether this batch is one that gives NaN. A batch is known by its first draw, whatever step it comes in."""
    poison, list_of = Path("poison"), Path("poisoned")
    if os.environ.get("SLURM_PROCID") != "0" or batch.microbatch_index or not (poison.exists() or list_of.exists()):
        return False
    draw, known = int(batch.sample_keys[0]), list_of.read_text().split() if list_of.exists() else []
    if str(draw) in known:
        return True
    first, before = map(int, poison.read_text().split()) if poison.exists() else (math.inf, 0)
    if not first <= batch.step < first + _POISONED or len(known) >= before + _POISONED:
        return False
    list_of.write_text("\n".join([*known, str(draw)]))
    return True


def note_meeting() -> None:
    """Write down where the ranks have met, as their libraries know it."""
    place = Path("meeting")
    if _RANK == "0" and not place.exists():
        words = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        place.with_suffix(".new").write_text(json.dumps(words))
        place.with_suffix(".new").rename(place)


def prepare() -> socket.socket | None:
    """What may happen before a rank begins; what it returns lives as long as the rank."""
    if _RANK != "0":
        end = time.monotonic() + _LONGEST_DELAY
        while Path("late").exists() and time.monotonic() < end:
            time.sleep(0.1)
        return None
    Path("meeting").unlink(missing_ok=True)
    if not Path("occupied").exists():
        return None
    from foveal.distributed.launcher import candidate_store_addresses, read_launch_env

    place = candidate_store_addresses(read_launch_env())[0]
    Path("occupied").write_text(str(place[1]))
    return socket.create_server(place)


if __name__ == "__main__":
    sys.path.pop(0)  # the files beside this one are none of the stage's modules
    listener = prepare()
    slow_down(float(sys.argv[1]))
    module, sys.argv = sys.argv[3], [sys.argv[3], *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
