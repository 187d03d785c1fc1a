"""Watchdog: a thread of each rank polls the training loop once a second and reports stalls.

Time is counted in polls, not read from a clock: a stopped process or a suspended machine does not poll, and is not
reported as stalled when it resumes.

Three levels:

1. Stall: a step that takes ``stall_factor`` times its running median, and at least ``min_stall_seconds``. The rank
   writes the stacks of all its threads into its log, compares the ranks' heartbeats and logs which ranks are behind in
   which activity. No process is ended.
2. Hang: no progress for longer than a collective may take. The rank writes its stacks again, logs the reason and ends.
   Waiting for a peer ends earlier, by the collective's own timeout: this level is for a rank that hangs by itself.
   Under gloo a timeout is an error in the loop; NCCL dumps its record and aborts the process, and the log ends with the
   messages of level 1.
3. No Python code runs, because a C call holds the GIL: faulthandler's own thread writes the stacks and ends the process
   with code 1, the only code it has. With a world size of 1 it only writes the stacks: no other rank waits, and a
   process that a shell suspended for hours must survive.
"""

import faulthandler
import logging
import os
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
from foveal.distributed.peer_failure import describe_peer_failure, dump_cpu_flight_recorder, set_flight_recorder_folder
from foveal.distributed.world import World
from foveal.errors import OutOfMemoryError, TrainingHungError
from foveal.slurm import current_node_name

_MEDIAN_WINDOW = 64  # step durations in the running median, the lower one: a first step connects and compiles
_REARM_POLLS = 10  # polls between two settings of faulthandler's alarm
_REPORT_TIMEOUT_SECONDS = 20.0  # for the report of a hang, before the process ends
# Modules in which a rank waits for other ranks.
_WAITING_MODULES = ("torch.distributed", "deepspeed.comm", "foveal.distributed", "foveal.engines")
_OWN_PACKAGES = ("foveal", "pretrain", "distill", "finetune", "__main__")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits of the watchdog, in seconds counted as polls of ``poll_interval`` seconds."""

    poll_interval: float = 1.0
    min_stall_seconds: float = 60.0  # a shorter step is no stall
    stall_factor: float = 10.0  # a step of this many median durations is a stall
    hang_margin: float = 60.0  # on top of the collectives' timeout, so that the peers' errors come first
    store_timeout: float = 7.0  # for the store's answer, when ranks are compared
    first_step_factor: float = 4.0  # multiplies the hang limit of the first step, which compiles and waits for data


class Watchdog:
    """Polls the position that the training loop reports. A heartbeat costs one assignment."""

    def __init__(
        self, world: World, log_file: IO[str], hang_timeout: float, timeouts: Timeouts, on_hang: Callable[[str], None]
    ) -> None:
        self._world = world
        self._log_file = log_file
        self._hang_timeout = hang_timeout
        self._timeouts = timeouts
        self._on_hang = on_hang
        self._host = current_node_name()
        self._main_thread_id = threading.main_thread().ident
        self._position = (0, "starting", 0)  # step, activity, number of heartbeats
        self._last_position = self._position
        self._poll_count = self._idle_polls = 0
        self._step_start: tuple[int, int] | None = None  # the current step and the poll at which it began
        self._step_seconds: deque[float] = deque(maxlen=_MEDIAN_WINDOW)
        self._stopped = threading.Event()
        self._exchange: HeartbeatExchange | None = None
        self._diagnosis = ""
        self._stall: tuple[int, str, int] | None = None  # step, activity, and the poll of the last progress
        self._thread = threading.Thread(target=self._poll_loop, name="watchdog", daemon=True)

    def heartbeat(self, step: int, activity: str) -> None:
        """Report progress of this rank: its step and its activity (``data``, ``training``, ``saving``)."""
        self._position = (step, activity, self._position[2] + 1)

    def start(self) -> None:
        """Start the polling thread and, for several ranks, the exchange of heartbeats."""
        if self._world.size > 1:
            self._exchange = HeartbeatExchange(
                self._world, self._timeouts.poll_interval, self._current_heartbeat, self._timeouts.store_timeout
            )
        self._thread.start()

    def log_diagnosis_once(self) -> str:
        """Return and log once which ranks are behind, for a rank that lost a peer. Empty for a world size of 1."""
        if self._exchange is not None and not self._diagnosis:
            self._diagnosis = self._diagnose_ranks()
            _log.error("step %d: %s", self._position[0], self._diagnosis)
        return self._diagnosis

    def _diagnose_ranks(self) -> str:
        """Return which ranks are behind. If a single node is to blame, name it to the job script on stderr."""
        assert self._exchange is not None
        diagnosis = self._exchange.diagnose()
        nodes = self._exchange.suspect_nodes
        out_of_memory = f"ended by {OutOfMemoryError.__name__}" in diagnosis  # would happen on any node
        if len(nodes) == 1 and not out_of_memory:
            sys.stderr.write(f"foveal: suspect node {min(nodes)}: {diagnosis}\n")
        return diagnosis

    def stop(self, exit_reason: str) -> None:
        """Stop polling, and publish the reason why this rank leaves to the other ranks."""
        self._stopped.set()
        self._thread.join(_REPORT_TIMEOUT_SECONDS)  # a live thread could set faulthandler's alarm again
        faulthandler.cancel_dump_traceback_later()
        if self._exchange is not None:
            self._exchange.close(exit_reason)

    def poll(self) -> None:
        """Count one poll, and check for a stall and a hang. Must not block."""
        position = self._position
        self._poll_count += 1
        self._idle_polls = self._idle_polls + 1 if position == self._last_position else 0
        if position != self._last_position and self._stall is not None:
            _run_in_thread(self._report_recovery, self._stall, self._poll_count)
            self._stall = None
        self._last_position = position
        if position[2]:
            self._record_step_time(position[0])
        self._check_stall()

    def _poll_loop(self) -> None:
        while not self._stopped.wait(self._timeouts.poll_interval):
            self.poll()

    def _record_step_time(self, step: int) -> None:
        if self._step_start is not None and step == self._step_start[0]:
            return
        if self._step_start is not None and step > self._step_start[0]:  # no roll-back, and no next of several runs
            last_step, start = self._step_start
            elapsed = (self._poll_count - start) * self._timeouts.poll_interval
            self._step_seconds.append(elapsed / (step - last_step))
        self._step_start = (step, self._poll_count)

    def _check_stall(self) -> None:
        timeouts = self._timeouts
        idle_seconds = self._idle_polls * timeouts.poll_interval
        hang_timeout = self._hang_timeout if self._step_seconds else self._hang_timeout * timeouts.first_step_factor
        if self._poll_count % _REARM_POLLS == 1:
            # Level 3: the alarm fires unless this thread still runs and sets it again.
            alarm_seconds = hang_timeout + timeouts.hang_margin + _REARM_POLLS * timeouts.poll_interval
            faulthandler.dump_traceback_later(alarm_seconds, file=self._log_file, exit=self._world.size > 1)
        if idle_seconds >= hang_timeout:
            self._end_process(idle_seconds)
        stalled = self._step_seconds and idle_seconds >= max(
            timeouts.min_stall_seconds, timeouts.stall_factor * statistics.median_low(self._step_seconds)
        )
        if stalled and self._stall is None:
            step, activity, _ = self._position
            self._stall = (step, activity, self._poll_count - self._idle_polls)
            _run_in_thread(self._report_stall, idle_seconds, step, activity)

    def _report_stall(self, idle_seconds: float, step: int, activity: str) -> None:
        _log.warning("nothing has moved here for %.0f s, in step %d: %s", idle_seconds, step, activity)
        self._write_stacks()
        if self._exchange is not None:
            _log.warning("step %d: %s", step, self._exchange.diagnose())

    def _report_recovery(self, stall: tuple[int, str, int], poll_count: int) -> None:
        step, activity, last_progress = stall
        seconds = (poll_count - last_progress) * self._timeouts.poll_interval
        _log.warning("step %d (%s) moves again after %.0f s", step, activity, seconds)

    def _end_process(self, idle_seconds: float) -> None:
        """Report a hang and end the process. The report runs in a thread: a disk that hangs must not delay the end."""
        if self._world.size > 1:  # level 3 must not cut the report short
            faulthandler.dump_traceback_later(2 * _REPORT_TIMEOUT_SECONDS, file=self._log_file, exit=True)
        reported = threading.Event()

        def report_hang() -> None:
            step, activity, _ = self._position
            self._write_stacks()
            reason = (
                f"rank {self._world.rank} on {self._host}: "
                f"nothing moved for {idle_seconds:.0f} s, in step {step}: {activity}"
            )
            if self._exchange is not None:
                reason = f"{reason}; {self._diagnose_ranks()}"
            try:
                self._on_hang(reason)
            except Exception:  # noqa: BLE001 - the process ends in any case
                _log.exception("the reason for the end could not be written down")
            _log.critical("%s", reason)
            dump_cpu_flight_recorder(self._world.rank)
            sys.stderr.flush()
            reported.set()

        _run_in_thread(report_hang)
        reported.wait(_REPORT_TIMEOUT_SECONDS)
        os._exit(TrainingHungError.exit_code)

    def _current_heartbeat(self) -> Heartbeat:
        step, activity, _ = self._position
        location, is_waiting = "", False
        if self._idle_polls >= 2 and self._main_thread_id is not None:
            frames = sys._current_frames()  # noqa: SLF001 - the documented access to a stack
            location, is_waiting = locate_and_check_waiting(frames.get(self._main_thread_id))
        idle_seconds = self._idle_polls * self._timeouts.poll_interval
        return Heartbeat(step, activity, idle_seconds, self._poll_count, self._host, location, is_waiting)

    def _write_stacks(self) -> None:
        names = ", ".join(f"{thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate())
        self._log_file.write(f"the stacks of rank {self._world.rank}, innermost call first; threads: {names}\n")
        self._log_file.flush()
        faulthandler.dump_traceback(self._log_file)


@contextmanager
def run_watchdog(
    world: World,
    log_folder: Path,
    collective_timeout: float,
    on_hang: Callable[[str], None],
    timeouts: Timeouts = Timeouts(),
) -> Iterator[Watchdog]:
    """Run a watchdog for this rank. ``collective_timeout``: seconds that a collective may take.

    Stacks go into this rank's log in ``log_folder``. At a hang ``on_hang`` gets the reason before the process ends with
    TrainingHungError's exit code.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    set_flight_recorder_folder(log_folder)
    with (log_folder / f"rank-{world.rank:03d}.log").open("a") as file:
        watchdog = Watchdog(world, file, collective_timeout + timeouts.hang_margin, timeouts, on_hang)
        watchdog.start()
        exit_reason = "left"
        try:
            yield watchdog
        except BaseException as error:
            exit_reason = f"ended by {type(error).__name__}"
            if describe_peer_failure(error):
                watchdog.log_diagnosis_once()
                exit_reason = LOST_PEER
            raise
        finally:
            watchdog.stop(exit_reason)


def locate_and_check_waiting(innermost_frame: FrameType | None) -> tuple[str, bool]:
    """Return a thread's innermost location in our code or in a module that waits for ranks, and whether it may wait.

    Only foveal/distributed and foveal/engines communicate with other processes, so a thread inside them may wait for a
    rank. On a GPU the main thread waits for the device wherever it reads a number from it; that is its location then.
    """
    while innermost_frame is not None:
        module = str(innermost_frame.f_globals.get("__name__", ""))
        is_waiting = module.startswith(_WAITING_MODULES)
        if is_waiting or module.partition(".")[0] in _OWN_PACKAGES:
            file = Path(innermost_frame.f_code.co_filename).name
            return f"{innermost_frame.f_code.co_name}, {file}:{innermost_frame.f_lineno}", is_waiting
        innermost_frame = innermost_frame.f_back
    return "", False


def _run_in_thread(call: Callable[..., None], *arguments: object) -> None:
    """Run a call in a thread of its own, since logs and stores may block."""
    threading.Thread(target=call, args=arguments, name="watchdog-report", daemon=True).start()
