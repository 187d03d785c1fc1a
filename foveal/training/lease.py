"""Whose a run directory is: attempts at a run have numbers, one at a time holds the directory, a later one supersedes.

``attempts/0003.json`` says who attempt 3 is, ``0003.start.json`` the step it began at, ``0003.end.json`` why it ended;
``0003.beat`` is counted up while it lives. A number is taken by link(2), which is exclusive on every file system that
has it (O_EXCL is not on old NFS), and nothing with a number is ever overwritten, so that a kill between any two lines
leaves nothing to repair. Clocks of different hosts are never compared.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveal.atomic import encode_json, fsync, write_json
from foveal.errors import CheckpointError, RestartLoopError, RunInUseError

_ATTEMPT = re.compile(r"(\d{4,})\.json")
_START = re.compile(r"(\d{4,})\.start\.json")
_DRAFT_PREFIX, _HEARTBEAT_SUFFIX = ".take-", ".beat"
_MAX_CLAIM_TRIES = 1000
_SCONTROL_TIMEOUT = 20.0  # seconds for an answer
_MANUAL_RESTART_CODES = {0, 2, 3, 7, 130}  # ends after which no script starts the run again: who does has looked at it
# A job in one of these states may still have processes; in every other it has none (sacct's words, of scontrol).
_LIVE_JOB_STATES = {
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
}
_NO_END_RECORDED = "it ended without a word: killed, or its node was lost"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseHolder:
    """Who makes an attempt: the process of rank 0, and its Slurm job if it has one."""

    host: str
    pid: int
    born: str  # tells this process from another that gets the same number later, or has it in another container
    ranks: int
    job: str | None = None
    restart: int = 0
    cluster: str | None = None
    nodes: str | None = None

    def __str__(self) -> str:
        job = f"job {self.job} " if self.job else ""
        return f"{job}on {self.host}, rank 0 pid {self.pid}"


@dataclass
class Attempt:
    """An attempt as every rank knows it; ``starts``: the step that each earlier one began at, where it matters still."""

    number: int
    start_steps: dict[int, int] = field(default_factory=dict)
    is_superseded: bool = False


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A line of the table of attempts. No ``why``: it runs, or it ended without a word."""

    number: int
    holder: LeaseHolder | None
    started_at: float
    start_step: int | None
    end_step: int | None
    exit_code: int | None
    reason: str | None
    duration_seconds: float | None


def describe_this_process(world_size: int, slurm_info: Mapping[str, str]) -> LeaseHolder:
    """This process as a holder; ``job`` is what Slurm says of it (``slurm_job``), empty outside Slurm."""
    return LeaseHolder(
        host=socket.gethostname(),
        pid=os.getpid(),
        born=_process_identity(os.getpid()) or "",
        ranks=world_size,
        job=slurm_info.get("slurm_job_id"),
        restart=int(slurm_info.get("slurm_restart_count", 0)),
        cluster=slurm_info.get("slurm_cluster_name"),
        nodes=slurm_info.get("slurm_job_nodelist"),
    )


class Lease(Attempt):
    """The attempt as rank 0 holds it. ``lost`` becomes True when a later attempt is seen."""

    def __init__(
        self,
        run_dir: Path,
        number: int,
        start_steps: dict[int, int],
        max_attempts_without_progress: int,
        heartbeat_seconds: float,
    ) -> None:
        super().__init__(number, start_steps)
        self._run, self._folder, self._restarts, self._began = (
            run_dir,
            run_dir / "attempts",
            max_attempts_without_progress,
            time.monotonic(),
        )
        self._over = threading.Event()
        self._beats = self._folder / f"{number:04d}{_HEARTBEAT_SUFFIX}"
        self._thread = threading.Thread(
            target=self._write_heartbeats, args=(heartbeat_seconds,), name="lease", daemon=True
        )
        self._thread.start()

    def record_start(self, step: int) -> None:
        """Write down the step that this attempt begins at, once it is known.

        Raises: Restarting when as many attempts as are allowed began there in a row and came to nothing.
        """
        self.check_progress(step)
        # Only starts that no later and no lower one makes superfluous are handed on: the list stays short.
        starts = {number: start for number, start in self.start_steps.items() if start < step} | {self.number: step}
        write_json(self._file("start"), {"step": step, "starts": starts})

    def check_superseded(self) -> bool:
        """Look whether there is a later attempt."""
        if not self.is_superseded:
            with contextlib.suppress(OSError):  # a file system that does not answer says nothing about the lease
                self.is_superseded = (self._folder / f"{self.number + 1:04d}.json").exists()
        return self.is_superseded

    def record_end(self, reason: str, exit_code: int, step: int | None = None) -> None:
        """Write down why and where the attempt ended, and let go of the directory; what is said first holds."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(1.0)
        end = {"why": reason, "code": exit_code, "step": step, "seconds": round(time.monotonic() - self._began, 3)}
        try:
            write_json(self._file("end"), end | {"time": time.time()})
            self._beats.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the end of attempt %d cannot be written down (%s)", self.number, error)

    def check_progress(self, step: int = -1) -> None:
        """Refuse to begin at a step, or at one not known yet (-1), where attempt after attempt came to nothing.

        A step that was begun at before is no progress, also where the run was set back in between. Raises: Restarting.
        """
        failures = list(itertools.islice(self._failed_attempts(step), self._restarts))
        furthest = max([step, *(start for start, _ in failures)])
        if len(failures) == self._restarts and furthest <= (step if step < 0 else failures[-1][0]):
            where = "before its first step" if step < 0 else f"without a checkpoint newer than step {furthest}"
            sentence = (
                f"{self._run}: each of the last {self._restarts} attempts ended {where}, the last because: {failures[0][1]}; "
                f"remove the cause and start again, which is counted anew"
            )
            self.record_end(sentence, RestartLoopError.exit_code, None if step < 0 else step)
            raise RestartLoopError(sentence)

    def _failed_attempts(self, unknown: int) -> Iterator[tuple[int, str]]:
        """The step that each attempt before this one began at and why it ended, from the last back."""
        for number in range(self.number - 1, 0, -1):
            end, start = (_read_json_or_empty(self._folder / f"{number:04d}.{part}.json") for part in ("end", "start"))
            if end.get("code") in _MANUAL_RESTART_CODES:
                return
            yield start.get("step", unknown), end.get("why") or _NO_END_RECORDED

    def _write_heartbeats(self, beat: float) -> None:
        count, there = 0, False
        while not self._over.is_set():
            count += 1
            with contextlib.suppress(OSError):  # the disk may be full or away for a while; training may go on
                _write_in_place(self._beats, f"{count:020d}\n".encode(), new=not there)
                there = True
            self.check_superseded()
            self._over.wait(beat)

    def _file(self, part: str) -> Path:
        return self._folder / f"{self.number:04d}.{part}.json"


def acquire_lease(
    run_dir: Path,
    holder: LeaseHolder,
    *,
    max_attempts_without_progress: int,
    heartbeat_seconds: float = 5.0,
    timeout_seconds: float = 60.0,
) -> Lease:
    """The next attempt at a run, for its rank 0: the one before has ended, or cannot go on, or we are refused.

    restarts: how many attempts in a row may begin at the same step; beat: seconds between signs of life; patience:
    seconds without one after which an attempt elsewhere counts as dead.
    Raises: Held where another attempt writes the directory, CheckpointError where nobody can, Restarting as
    ``Lease.started``.
    """
    folder = run_dir / "attempts"
    names, number = [], 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_MAX_CLAIM_TRIES):  # another turn where somebody else was faster, or NFS showed an old list
            names = _list_file_names(folder)
            number = max(_parse_numbers(names, _ATTEMPT), default=0) + 1
            if number > 1:
                _refuse_if_held(run_dir, number - 1, holder, timeout_seconds)
            if _claim_number(folder, number, holder):
                break
            time.sleep(0.1)
        else:
            raise CheckpointError(f"{folder}: others are faster to take attempt {number}; stop them first")
        for name in names:
            if name.startswith(_DRAFT_PREFIX) or name.endswith(
                _HEARTBEAT_SUFFIX
            ):  # of those that were killed, or came too late
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}); set run.dir to a place that can") from None
    lease = Lease(run_dir, number, _parse_start_steps(folder, names), max_attempts_without_progress, heartbeat_seconds)
    lease.check_progress()
    return lease


def list_attempts(run_dir: Path) -> list[AttemptRecord]:
    """Every attempt at a run, from the first."""
    told = []
    for number in sorted(_parse_numbers(_list_file_names(run_dir / "attempts"), _ATTEMPT)):
        facts, start, end = (
            _read_json_or_empty(run_dir / "attempts" / f"{number:04d}{part}.json") for part in ("", ".start", ".end")
        )
        told.append(
            AttemptRecord(
                number=number,
                holder=_parse_holder(facts),
                started_at=facts.get("time", 0.0),
                start_step=start.get("step"),
                end_step=end.get("step"),
                exit_code=end.get("code"),
                reason=end.get("why"),
                duration_seconds=end.get("seconds"),
            )
        )
    return told


def read_start_steps(run_dir: Path) -> dict[int, int]:
    """The step that each attempt began at, where it matters still: for who reads checkpoints and writes none."""
    return _parse_start_steps(run_dir / "attempts", _list_file_names(run_dir / "attempts"))


def _parse_start_steps(folder: Path, names: list[str]) -> dict[int, int]:
    last = max(_parse_numbers(names, _START), default=0)  # one file, however many attempts there were
    return {
        int(number): step
        for number, step in _read_json_or_empty(folder / f"{last:04d}.start.json").get("starts", {}).items()
    }


def _claim_number(folder: Path, number: int, holder: LeaseHolder) -> bool:
    """Take a number; whether it was still free."""
    draft = folder / f"{_DRAFT_PREFIX}{secrets.token_hex(8)}"
    try:
        draft.write_bytes(encode_json(asdict(holder) | {"time": time.time()}))
        fsync(draft)
        with contextlib.suppress(FileExistsError):
            os.link(draft, folder / f"{number:04d}.json")
        won = draft.stat().st_nlink == 2  # NFS may say that the name exists because our own first request made it
    except FileNotFoundError:  # who took the number removed our draft
        return False
    finally:
        draft.unlink(missing_ok=True)
    fsync(folder)
    return won


def _refuse_if_held(run_dir: Path, number: int, holder: LeaseHolder, timeout_seconds: float) -> None:
    """Come back if the last attempt is over, or is to be taken over. Raises: Held."""
    folder = run_dir / "attempts"
    if (folder / f"{number:04d}.end.json").exists():
        return
    was = _parse_holder(_read_json_or_empty(folder / f"{number:04d}.json"))
    lives, why = _check_alive(was, holder) if was else (None, "")
    if lives is None:
        _log.info("looking for up to %.0f s whether attempt %d at %s (%s) lives", timeout_seconds, number, run_dir, was)
        lives, why = _wait_for_heartbeat(folder, number, timeout_seconds), f"no sign of life in {timeout_seconds:.0f} s"
    if lives:
        raise RunInUseError(
            f"{run_dir} is being written by attempt {number} ({was}); stop it first or use another run.dir"
        )
    _log.info("taking over from attempt %d (%s): %s", number, was, why)


def _check_alive(previous: LeaseHolder, current: LeaseHolder) -> tuple[bool | None, str]:
    """Whether a holder lives, as far as this host can know; and if not, why not."""
    job = f"job {previous.job}"
    if (
        previous.job is not None
        and (previous.job, previous.cluster) == (current.job, current.cluster)
        and previous.restart < current.restart
    ):
        return False, f"Slurm has started {job} again"
    if (
        previous.host == current.host and previous.born.split()[:-1] == current.born.split()[:-1]
    ):  # the same kernel and process numbers
        lives = _process_identity(previous.pid) == previous.born
        return lives, "" if lives else f"process {previous.pid} is gone"
    if (
        previous.job is not None
        and previous.cluster == current.cluster
        and (state := _job_state(previous.job)) not in {None, *_LIVE_JOB_STATES}
    ):
        return False, f"{job} is {state}"
    return None, ""


def _wait_for_heartbeat(folder: Path, number: int, timeout_seconds: float) -> bool:
    """Whether an attempt gives signs of life; one that ends meanwhile does not, nor one that somebody else took over."""
    beats, given_up = folder / f"{number:04d}{_HEARTBEAT_SUFFIX}", time.monotonic() + timeout_seconds
    before = _read_bytes_or_empty(beats)
    while time.monotonic() < given_up:
        time.sleep(min(1.0, timeout_seconds / 10))
        now = _read_bytes_or_empty(beats)
        if (folder / f"{number:04d}.end.json").exists() or (folder / f"{number + 1:04d}.json").exists():
            return False
        if now != before:
            return True
    return False


def _job_state(job: str) -> str | None:
    """What Slurm says of a job; nothing where it cannot be asked."""
    command = ["scontrol", "show", "job", "--oneliner", job]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SCONTROL_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if shown.returncode:
        return "forgotten by Slurm" if "Invalid job id" in shown.stderr else None
    found = re.search(r"\bJobState=(\w+)", shown.stdout)
    return found[1] if found else None


def _process_identity(pid: int) -> str | None:
    """A process among all that ever were: the kernel's start, the container, the ticks at which it began.

    Nothing for one that is gone, or dead and not yet buried by its parent.
    """
    try:
        # After the name, which may hold anything, in parentheses: state, and as the 20th field the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "XZ" else f"{boot} {Path('/proc/self/ns/pid').readlink()} {fields[19]}"
    except OSError:
        return None


def _parse_holder(facts: dict[str, Any]) -> LeaseHolder | None:
    try:
        return LeaseHolder(**{name: value for name, value in facts.items() if name != "time"})
    except TypeError:
        return None


def _list_file_names(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []


def _parse_numbers(names: list[str], pattern: re.Pattern[str]) -> list[int]:
    return [int(found[1]) for name in names if (found := pattern.fullmatch(name))]


def _read_json_or_empty(file: Path) -> dict[str, Any]:
    """A file of ours; empty where there is none, or something else."""
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


def _write_in_place(file: Path, content: bytes, *, new: bool) -> None:
    """Overwrite, so that it works on a full disk too; opened anew each time, which makes NFS carry it to the others."""
    descriptor = os.open(file, os.O_WRONLY | (os.O_CREAT if new else 0), 0o666)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)
