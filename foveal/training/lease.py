"""The lease on a run directory: attempts are numbered, one at a time holds the lease, a later one supersedes it.

``attempts/0003.json`` identifies the process of attempt 3, ``0003.start.json`` holds its start step, ``0003.end.json``
the reason of its end; ``0003.beat`` is a counter that grows while the attempt lives. link(2) claims a number: it is
exclusive on every file system that supports it (O_EXCL is not on old NFS). A numbered file is never overwritten, so a
kill at any point leaves nothing to repair. Clocks of different hosts are never compared.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveal.atomic import encode_json, fsync, write_json
from foveal.errors import CheckpointError, RestartLoopError, RunInUseError
from foveal.training.lease_holder import LeaseHolder, get_liveness_and_reason, number_or_none, parse_holder

_ATTEMPT = re.compile(r"(\d{4,})\.json")
_START = re.compile(r"(\d{4,})\.start\.json")
_DRAFT_PREFIX = ".take-"
_HEARTBEAT_SUFFIX = ".beat"
_MAX_CLAIM_TRIES = 1000
_MANUAL_RESTART_CODES = {0, 2, 3, 7, 130}  # no script restarts a run after these: the next start is a person's decision
_NO_END_RECORDED = "it ended without a word: killed, or its node was lost"
_log = logging.getLogger(__name__)


@dataclass
class Attempt:
    """An attempt as every rank knows it; ``start_steps_by_attempt``: start steps of earlier attempts that still matter."""

    number: int
    start_steps_by_attempt: dict[int, int] = field(default_factory=dict)
    is_superseded: bool = False

    def poll_superseded(self) -> bool:
        """Return whether a later attempt is known; a Lease looks for one."""
        return self.is_superseded


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A line of the table of attempts. ``reason`` is None for an attempt that runs or was killed."""

    number: int
    holder: LeaseHolder | None
    started_at: float
    start_step: int | None
    end_step: int | None
    exit_code: int | None
    reason: str | None
    duration_seconds: float | None


class Lease(Attempt):
    """The attempt as rank 0 holds it; a thread writes its heartbeat and looks for a later attempt."""

    def __init__(
        self,
        run_dir: Path,
        number: int,
        start_steps_by_attempt: dict[int, int],
        max_attempts_without_progress: int,
        heartbeat_interval_seconds: float,
    ) -> None:
        super().__init__(number, start_steps_by_attempt)
        self._run_dir = run_dir
        self._folder = run_dir / "attempts"
        self._max_attempts_without_progress = max_attempts_without_progress
        self._started_at = time.monotonic()
        self._ended = threading.Event()
        self._heartbeat_file = self._folder / f"{number:04d}{_HEARTBEAT_SUFFIX}"
        self._thread = threading.Thread(
            target=self._write_heartbeats, args=(heartbeat_interval_seconds,), name="lease", daemon=True
        )
        self._thread.start()

    def record_start(self, step: int) -> None:
        """Record the start step of this attempt.

        Raises: RestartLoopError if the maximal number of attempts in a row started there without progress.
        """
        self.check_no_restart_loop(step)
        # A start that a later, lower start makes irrelevant is dropped: the list stays short.
        starts = {number: start for number, start in self.start_steps_by_attempt.items() if start < step} | {
            self.number: step
        }
        write_json(self._file("start"), {"step": step, "starts": starts})

    def poll_superseded(self) -> bool:
        """Return whether a later attempt exists."""
        if not self.is_superseded:
            with contextlib.suppress(OSError):  # an unreachable file system is no evidence of a later attempt
                self.is_superseded = (self._folder / f"{self.number + 1:04d}.json").exists()
        return self.is_superseded

    def record_end_and_release(self, reason: str, exit_code: int, step: int | None = None) -> None:
        """Record the reason and step of the end and release the directory; only the first call counts."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(1.0)
        end = {
            "why": reason,
            "code": exit_code,
            "step": step,
            "seconds": round(time.monotonic() - self._started_at, 3),
        }
        try:
            write_json(self._file("end"), end | {"time": time.time()})
            self._heartbeat_file.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the end of attempt %d cannot be written down (%s)", self.number, error)

    def check_no_restart_loop(self, step: int = -1) -> None:
        """Refuse to start at a step (-1: not known yet) if the maximal number of attempts in a row made no progress.

        A step at which an earlier attempt started is no progress, even if the run was rolled back in between.
        Raises: RestartLoopError.
        """
        message = explain_restart_loop(self._run_dir, self.number, self._max_attempts_without_progress, step)
        if message is not None:
            self.record_end_and_release(message, RestartLoopError.exit_code, None if step < 0 else step)
            raise RestartLoopError(message)

    def _write_heartbeats(self, interval_seconds: float) -> None:
        count, exists = 0, False
        while not self._ended.is_set():
            count += 1
            with contextlib.suppress(OSError):  # a full or unreachable disk does not stop training
                _write_in_place(self._heartbeat_file, f"{count:020d}\n".encode(), create=not exists)
                exists = True
            self.poll_superseded()
            self._ended.wait(interval_seconds)

    def _file(self, part: str) -> Path:
        return self._folder / f"{self.number:04d}.{part}.json"


def acquire_lease(
    run_dir: Path,
    holder: LeaseHolder,
    *,
    max_attempts_without_progress: int,
    heartbeat_interval_seconds: float = 5.0,
    heartbeat_timeout_seconds: float = 60.0,
) -> Lease:
    """Start the next attempt at a run, on rank 0, if the previous attempt has ended or is dead.

    ``max_attempts_without_progress``: attempts in a row that may start at the same step; ``heartbeat_interval_seconds``:
    interval between heartbeats; ``timeout_seconds``: time without a heartbeat after which an attempt on another host
    counts as dead.
    Raises: RunInUseError if another attempt writes the directory, CheckpointError if the directory cannot be written,
    RestartLoopError as ``Lease.check_no_restart_loop``.
    """
    folder = run_dir / "attempts"
    names, number = [], 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_MAX_CLAIM_TRIES):  # a retry after a lost race, or after NFS returned a stale listing
            names = _list_file_names(folder)
            number = _next_number(names)
            if number > 1 and (death := _refuse_if_held(run_dir, number - 1, holder, heartbeat_timeout_seconds)):
                _log.info("taking over from %s", death)
            if _claim_number(folder, number, holder):
                break
            time.sleep(0.1)
        else:
            raise CheckpointError(f"{folder}: others are faster to take attempt {number}; stop them first")
        for name in names:
            if name.startswith(_DRAFT_PREFIX) or name.endswith(_HEARTBEAT_SUFFIX):  # of killed attempts and lost races
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}); set run.dir to a place that can") from None
    lease = Lease(
        run_dir, number, _parse_start_steps(folder, names), max_attempts_without_progress, heartbeat_interval_seconds
    )
    lease.check_no_restart_loop()
    return lease


def find_next_attempt(run_dir: Path, holder: LeaseHolder, heartbeat_timeout_seconds: float = 60.0) -> Attempt:
    """Return the attempt that ``acquire_lease`` would start, without starting it.

    Raises: RunInUseError if another attempt writes the directory.
    """
    folder = run_dir / "attempts"
    names = _list_file_names(folder)
    number = _next_number(names)
    if number > 1:
        _refuse_if_held(run_dir, number - 1, holder, heartbeat_timeout_seconds)
    return Attempt(number, _parse_start_steps(folder, names))


def explain_restart_loop(run_dir: Path, number: int, max_attempts: int, step: int = -1) -> str | None:
    """Return why attempt ``number`` may not start at a step (-1: not known yet); None if it may.

    It may not if the ``max_attempts`` attempts before it made no progress, as ``Lease.check_no_restart_loop`` says.
    """
    failures = list(itertools.islice(_failed_attempts(run_dir / "attempts", number, step), max_attempts))
    furthest_step = max([step, *(start for start, _ in failures)])
    if len(failures) < max_attempts or furthest_step > (step if step < 0 else failures[-1][0]):
        return None
    progress = "before its first step" if step < 0 else f"without a checkpoint newer than step {furthest_step}"
    return (
        f"{run_dir}: each of the last {max_attempts} attempts ended {progress}, the last because: {failures[0][1]}; "
        f"remove the cause and start again, which is counted anew"
    )


def list_attempts(run_dir: Path) -> list[AttemptRecord]:
    """Return the records of all attempts at a run, oldest first."""
    folder = run_dir / "attempts"
    records = []
    for number in sorted(_parse_numbers(_list_file_names(folder), _ATTEMPT)):
        facts = _read_json_or_empty(folder / f"{number:04d}.json")
        start = _read_json_or_empty(folder / f"{number:04d}.start.json")
        end = _read_json_or_empty(folder / f"{number:04d}.end.json")
        record = AttemptRecord(
            number=number,
            holder=parse_holder(facts),
            started_at=number_or_none(facts.get("time")) or 0.0,
            start_step=number_or_none(start.get("step")),
            end_step=number_or_none(end.get("step")),
            exit_code=number_or_none(end.get("code")),
            reason=None if end.get("why") is None else str(end["why"]),
            duration_seconds=number_or_none(end.get("seconds")),
        )
        records.append(record)
    return records


def read_relevant_start_steps(run_dir: Path) -> dict[int, int]:
    """Return the start steps, by attempt, that still matter: for readers of checkpoints that hold no lease."""
    return _parse_start_steps(run_dir / "attempts", _list_file_names(run_dir / "attempts"))


def _failed_attempts(folder: Path, before: int, unknown_step: int) -> Iterator[tuple[int, str]]:
    """Yield (start step, reason of the end) of the attempts since the last manual restart, newest first."""
    for number in range(before - 1, 0, -1):
        end = _read_json_or_empty(folder / f"{number:04d}.end.json")
        start = _read_json_or_empty(folder / f"{number:04d}.start.json")
        if end.get("code") in _MANUAL_RESTART_CODES:
            return
        yield start.get("step", unknown_step), end.get("why") or _NO_END_RECORDED


def _parse_start_steps(folder: Path, names: list[str]) -> dict[int, int]:
    newest = max(_parse_numbers(names, _START), default=0)  # one file to read, for any number of attempts
    starts = _read_json_or_empty(folder / f"{newest:04d}.start.json").get("starts", {})
    return {int(number): step for number, step in starts.items()}


def _next_number(names: list[str]) -> int:
    return max(_parse_numbers(names, _ATTEMPT), default=0) + 1


def _claim_number(folder: Path, number: int, holder: LeaseHolder) -> bool:
    """Claim a number and return whether it was still free."""
    draft = folder / f"{_DRAFT_PREFIX}{secrets.token_hex(8)}"
    try:
        draft.write_bytes(encode_json(asdict(holder) | {"time": time.time()}))
        fsync(draft)
        with contextlib.suppress(FileExistsError):
            os.link(draft, folder / f"{number:04d}.json")
        won = draft.stat().st_nlink == 2  # NFS may report that the name exists because our own first request made it
    except FileNotFoundError:  # the process that claimed the number removed our draft
        return False
    finally:
        draft.unlink(missing_ok=True)
    fsync(folder)
    return won


def _refuse_if_held(run_dir: Path, number: int, holder: LeaseHolder, timeout_seconds: float) -> str | None:
    """Raise RunInUseError if the last attempt, ``number``, is alive; return how it died, None if it recorded its end."""
    folder = run_dir / "attempts"
    if (folder / f"{number:04d}.end.json").exists():
        return None
    previous = parse_holder(_read_json_or_empty(folder / f"{number:04d}.json"))
    is_alive, reason = get_liveness_and_reason(previous, holder) if previous else (None, "")
    if is_alive is None:
        _log.info(
            "looking for up to %.0f s whether attempt %d at %s (%s) lives", timeout_seconds, number, run_dir, previous
        )
        is_alive = _wait_for_heartbeat(folder, number, timeout_seconds)
        reason = f"no sign of life in {timeout_seconds:.0f} s"
    if is_alive:
        raise RunInUseError(
            f"{run_dir} is being written by attempt {number} ({previous}); stop it first or use another run.dir"
        )
    return f"attempt {number} ({previous}): {reason}"


def _wait_for_heartbeat(folder: Path, number: int, timeout_seconds: float) -> bool:
    """Return whether an attempt gives a heartbeat within the timeout; False if it ends or is superseded meanwhile."""
    heartbeat_file, deadline = folder / f"{number:04d}{_HEARTBEAT_SUFFIX}", time.monotonic() + timeout_seconds
    before = _read_bytes_or_empty(heartbeat_file)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, timeout_seconds / 10))
        now = _read_bytes_or_empty(heartbeat_file)
        if (folder / f"{number:04d}.end.json").exists() or (folder / f"{number + 1:04d}.json").exists():
            return False
        if now != before:
            return True
    return False


def _list_file_names(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []


def _parse_numbers(names: list[str], pattern: re.Pattern[str]) -> list[int]:
    return [int(match[1]) for name in names if (match := pattern.fullmatch(name))]


def _read_json_or_empty(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing or holds anything else."""
    try:
        tree = json.loads(_read_bytes_or_empty(file) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_bytes_or_empty(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _write_in_place(file: Path, content: bytes, *, create: bool) -> None:
    """Overwrite a file in place, which works on a full disk; reopening makes NFS show it to other hosts."""
    descriptor = os.open(file, os.O_WRONLY | (os.O_CREAT if create else 0), 0o666)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)
