"""A rank that makes steps until one of the ranks fails: ``python stepping.py FOLDER TIMEOUT FAULT RANK``.

It is watched as a run is, with short patience, and leaves as a stage does: one sentence and the error's code.
"""

import ctypes
import logging
import os
import sys
import time
from pathlib import Path

import torch

from foveal.distributed.peer_failure import describe_peer_failure
from foveal.distributed.watchdog import Timeouts, run_watchdog
from foveal.distributed.world import World, init_world
from foveal.errors import FovealError, TrainingHungError

_FAILS_AT = 200
_JOINING = 100.0
_IMPATIENT = Timeouts(
    poll_interval=0.5, min_stall_seconds=1.0, hang_margin=6.0, store_timeout=2.0, first_step_factor=3.0
)


def fail(how: str) -> None:
    """Do what keeps the others waiting."""
    if how == "loop":
        while True:
            pass
    if how == "sleep":
        time.sleep(10_000)
    if how == "hold":
        ctypes.PyDLL(None).sleep(10_000)  # a C call that keeps the interpreter to itself
    if how == "late":
        time.sleep(8)
    if how == "raise":
        raise ValueError("a mistake in the code")


def steps(world: World, folder: Path, timeout: float, how: str, who: int) -> None:
    """Steps of a few milliseconds; where nothing fails, they end when the file ``enough`` is there."""
    name = f"rank-{world.rank:03d}"

    def write_down(why: str) -> None:
        (folder / f"{name}.why").write_text(why)

    with run_watchdog(world, folder, timeout, write_down, _IMPATIENT) as watch:
        step, enough = 0, False
        while not enough:
            step += 1
            watch.heartbeat(step, "data")
            world.run_all_or_raise(
                lambda now=step: fail(how) if (now, world.rank) == (_FAILS_AT, who) else time.sleep(0.005)
            )
            watch.heartbeat(step, "training")
            world.all_reduce_sum(torch.ones(3, device=world.device))
            (folder / f"{name}.step").write_text(str(step))
            enough = world.any_rank((folder / "enough").exists() or (how == "late" and step == 2 * _FAILS_AT))


def main() -> None:
    """Join, step, leave."""
    folder, timeout, how, who = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    log = logging.FileHandler(folder / f"rank-{int(os.environ['RANK']):03d}.log")
    logging.basicConfig(level=logging.INFO, handlers=[log])
    try:
        with init_world(timeout, join_timeout_seconds=_JOINING if how != "absent" else timeout) as world:
            steps(world, folder, timeout, how, who)
    except FovealError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    except Exception as error:
        if (sentence := describe_peer_failure(error)) is None:
            raise
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()
        os._exit(TrainingHungError.exit_code)


if __name__ == "__main__":
    main()
