"""Whether a rank still moves, and who keeps whom waiting: a thread in each rank looks once a second.

Time is counted in looks, not read from a clock: a process that was stopped, or a machine that was asleep, did not look
either, and is not called stalled when it wakes up.

Three lines of defence:

1. A rank whose step takes ``times`` its running median (and no less than ``floor`` seconds) writes the stacks of all its
   threads into its log, compares the ranks' beats, and says who is behind and in what. Nothing is ended.
2. A rank in which nothing moved for longer than any collective may take writes its stacks again, says why, and ends.
   Waiting for a peer ends earlier, by the collective's own timeout: this is for a rank that hangs by itself. Under gloo
   that is an error in the loop; NCCL writes its record and aborts the process, and the first line's words are the last.
3. Where no Python runs any more, because a C call keeps the interpreter to itself, faulthandler's own thread writes the
   stacks and ends the process, with code 1: it knows no other. Alone in the world a rank is not ended but only written
   about, because nobody waits for it, and a process that a shell had stopped over lunch must survive.
"""

import faulthandler
import logging
import os
import socket
import statistics
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from foveal.distributed.heartbeat import LOST_PEER, Heartbeat, HeartbeatExchange
from foveal.distributed.peer_failure import describe_peer_failure, dump_flight_recorder, set_flight_recorder_folder
from foveal.distributed.world import World
from foveal.errors import OutOfMemoryError, TrainingHungError

_MEDIAN_WINDOW = 64  # durations of steps in the running median
_REARM_POLLS = 10  # looks between two settings of faulthandler's alarm
_REPORT_TIMEOUT_SECONDS = 20.0  # seconds that writing down why may take before the end
_WAITING_MODULES = (
    "torch.distributed",
    "deepspeed.comm",
    "foveal.distributed",
    "foveal.engines",
)  # where a rank waits for others
_OWN_PACKAGES = ("foveal", "pretrain", "distill", "finetune", "__main__")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds, counted in looks of ``look`` seconds each."""

    poll_interval: float = 1.0
    min_stall_seconds: float = 60.0  # no step that takes less is a stall
    stall_factor: float = 10.0  # a step that takes so many medians is one
    hang_margin: float = 60.0  # beyond the timeout of a collective: the peers' errors come first
    store_timeout: float = 7.0  # for the store, when ranks are compared
    first_step_factor: float = (
        4.0  # so many times as long may the first step take, with its compiling and its first data
    )


class Watchdog:
    """What the training loop tells: where it is. A beat is an assignment, and costs what an assignment costs."""

    def __init__(
        self, world: World, log_file: IO[str], hang_timeout: float, timeouts: Timeouts, on_hang: Callable[[str], None]
    ) -> None:
        self._world = world
        self._file = log_file
        self._end = hang_timeout
        self._patience = timeouts
        self._on_hung = on_hang
        self._host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # as Slurm calls it, where it does
        self._main = threading.main_thread().ident
        self._now = (0, "starting", 0)
        self._looks = self._quiet = 0
        self._last = self._now
        self._step: tuple[int, int] | None = None  # the step that runs, and the look at which it began
        self._took: deque[float] = deque(maxlen=_MEDIAN_WINDOW)
        self._over = threading.Event()
        self._beats: HeartbeatExchange | None = None
        self._accused = ""
        self._stalled: tuple[int, str, int] | None = None
        self._thread = threading.Thread(target=self._poll_loop, name="watch", daemon=True)

    def heartbeat(self, step: int, activity: str) -> None:
        """This rank goes on: it works at ``step``, and does what ``doing`` says (``data``, ``training``, ``saving``)."""
        self._now = (step, activity, self._now[2] + 1)

    def start(self) -> None:
        """Begin to look."""
        if self._world.size > 1:
            self._beats = HeartbeatExchange(
                self._world, self._patience.poll_interval, self._current_heartbeat, self._patience.store_timeout
            )
        self._thread.start()

    def diagnose(self) -> str:
        """Who is behind, for a rank that has lost a peer and will not look any more; said once. Empty for a lone rank."""
        if self._beats is not None and not self._accused:
            self._accused = self._diagnose_ranks()
            _log.error("step %d: %s", self._now[0], self._accused)
        return self._accused

    def _diagnose_ranks(self) -> str:
        """Who is behind, before an end; the job script hears of a node that alone is to blame."""
        assert self._beats is not None
        said = self._beats.diagnose()
        if (
            len(self._beats.suspect_nodes) == 1 and f"ended by {OutOfMemoryError.__name__}" not in said
        ):  # which any node would
            sys.stderr.write(f"foveal: suspect node {min(self._beats.suspect_nodes)}: {said}\n")
        return said

    def stop(self, exit_reason: str) -> None:
        """Look no more; the others read ``how`` this rank left."""
        self._over.set()
        self._thread.join(_REPORT_TIMEOUT_SECONDS)  # else it might set faulthandler's alarm once more
        faulthandler.cancel_dump_traceback_later()
        if self._beats is not None:
            self._beats.close(exit_reason)

    def poll(self) -> None:
        """Count, and judge. Nothing here may block."""
        now = self._now
        self._looks += 1
        self._quiet = self._quiet + 1 if now == self._last else 0
        if now != self._last and self._stalled is not None:
            _run_in_thread(self._report_recovery, self._stalled, self._looks)
            self._stalled = None
        self._last = now
        if now[2]:
            self._record_step_time(now[0])
        self._check_stall()

    def _poll_loop(self) -> None:
        while not self._over.wait(self._patience.poll_interval):
            self.poll()

    def _record_step_time(self, step: int) -> None:
        if self._step is not None and step == self._step[0]:
            return
        if self._step is not None and step > self._step[0]:  # not a run that rolled back, nor the next of several runs
            before, since = self._step
            self._took.append((self._looks - since) * self._patience.poll_interval / (step - before))
        self._step = (step, self._looks)

    def _check_stall(self) -> None:
        quiet, patience = self._quiet * self._patience.poll_interval, self._patience
        end = self._end if self._took else self._end * patience.first_step_factor
        if self._looks % _REARM_POLLS == 1:
            # The third line, which only a thread that still runs can push back.
            late = end + patience.hang_margin + _REARM_POLLS * patience.poll_interval
            faulthandler.dump_traceback_later(late, file=self._file, exit=self._world.size > 1)
        if quiet >= end:
            self._end_process(quiet)
        stalled = self._took and quiet >= max(
            patience.min_stall_seconds, patience.stall_factor * statistics.median(self._took)
        )
        if stalled and self._stalled is None:
            self._stalled = (self._now[0], self._now[1], self._looks - self._quiet)
            _run_in_thread(self._report_stall, quiet, self._now[0], self._now[1])

    def _report_stall(self, quiet: float, step: int, doing: str) -> None:
        _log.warning("nothing has moved here for %.0f s, in step %d: %s", quiet, step, doing)
        self._write_stacks()
        if self._beats is not None:
            _log.warning("step %d: %s", step, self._beats.diagnose())

    def _report_recovery(self, stalled: tuple[int, str, int], now: int) -> None:
        step, doing, since = stalled
        _log.warning("step %d (%s) moves again after %.0f s", step, doing, (now - since) * self._patience.poll_interval)

    def _end_process(self, quiet: float) -> None:
        """The end of the process. What is still to be said is said aside: a disk that hangs must not keep us."""
        if self._world.size > 1:  # the third line must not cut the last words short
            faulthandler.dump_traceback_later(2 * _REPORT_TIMEOUT_SECONDS, file=self._file, exit=True)
        done = threading.Event()

        def say() -> None:
            step, doing, _ = self._now
            self._write_stacks()
            why = f"rank {self._world.rank} on {self._host}: nothing moved for {quiet:.0f} s, in step {step}: {doing}"
            if self._beats is not None:
                why = f"{why}; {self._diagnose_ranks()}"
            try:
                self._on_hung(why)
            except Exception:  # noqa: BLE001 - it ends all the same
                _log.exception("why it ends could not be written down")
            _log.critical("%s", why)
            dump_flight_recorder(self._world.rank)
            sys.stderr.flush()
            done.set()

        _run_in_thread(say)
        done.wait(_REPORT_TIMEOUT_SECONDS)
        os._exit(TrainingHungError.exit_code)

    def _current_heartbeat(self) -> Heartbeat:
        step, doing, _ = self._now
        place, waits = ("", False)
        if self._quiet >= 2 and self._main is not None:
            place, waits = locate_frame(sys._current_frames().get(self._main))  # noqa: SLF001 - the documented way to a stack
        return Heartbeat(step, doing, self._quiet * self._patience.poll_interval, self._looks, self._host, place, waits)

    def _write_stacks(self) -> None:
        names = ", ".join(f"{thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate())
        self._file.write(f"the stacks of rank {self._world.rank}, innermost call first; threads: {names}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file)


@contextmanager
def run_watchdog(
    world: World,
    log_folder: Path,
    collective_timeout: float,
    on_hang: Callable[[str], None],
    timeouts: Timeouts = Timeouts(),
) -> Iterator[Watchdog]:
    """Watch this rank and compare it with the others; ``timeout_seconds`` is what a collective may take.

    Stacks go into this rank's log in ``logs``. ``on_hung`` hears why before the process ends with Hung's exit code.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    set_flight_recorder_folder(log_folder)
    with (log_folder / f"rank-{world.rank:03d}.log").open("a") as file:
        watch = Watchdog(world, file, collective_timeout + timeouts.hang_margin, timeouts, on_hang)
        watch.start()
        how = "left"
        try:
            yield watch
        except BaseException as error:
            how = f"ended by {type(error).__name__}"
            if describe_peer_failure(error):
                watch.diagnose()
                how = LOST_PEER
            raise
        finally:
            watch.stop(how)


def locate_frame(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, in our code or in what waits for other ranks, and whether it is the latter.

    Only foveal/distributed and foveal/engines speak to other processes, so who is inside of it may be waiting for one. On a GPU the main
    thread waits for the device wherever it reads a number from it, and is found there.
    """
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        waits = module.startswith(_WAITING_MODULES)
        if waits or module.partition(".")[0] in _OWN_PACKAGES:
            file = Path(frame.f_code.co_filename).name
            return f"{frame.f_code.co_name}, {file}:{frame.f_lineno}", waits
        frame = frame.f_back
    return "", False


def _run_in_thread(call: Callable[..., None], *arguments: object) -> None:
    """In a thread of its own: logs and stores may block."""
    threading.Thread(target=call, args=arguments, name="watch-aside", daemon=True).start()
