"""The saving of checkpoints: a copy on the host, a thread that writes it, and a commit between two later steps.

Each rank's thread writes into a draft of the checkpoint's folder while training continues. Once no rank is writing, the
ranks exchange what they wrote, rank 0 writes the index and the checksums, and one rename publishes the draft. No thread
communicates.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from foveal.atomic import (
    DISK_FULL_ERRNOS,
    disk_shortage,
    draft_path,
    encode_json,
    format_bytes,
    free_bytes_and_mount,
    publish_draft,
    sha256,
    write_atomic,
    write_json,
)
from foveal.checkpoint.chunk_index import INDEX_NAME, encode_index
from foveal.checkpoint.chunks import (
    TensorChunk,
    chunk_file_name,
    count_bytes_of_all_ranks,
    count_bytes_to_write,
    pack_write_ranges,
    write_and_hash_chunks,
)
from foveal.checkpoint.host_copy import copy_to_host
from foveal.checkpoint.protocols import CheckpointableEngine
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.store import CheckpointStore
from foveal.errors import AttemptSupersededError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RankPart:
    """A rank's part of a save, which all ranks receive at the commit.

    num_bytes: of its tensors; write_ranges: packed; checksums: sha256 of each file that the rank wrote; file_bytes: of
    these files; error: why they are not complete; is_bug: the error is no OSError.
    """

    num_bytes: int
    write_ranges: bytes
    checksums: dict[str, str] = field(default_factory=dict)
    file_bytes: int = 0
    copy_seconds: float = 0.0
    write_seconds: float = 0.0
    wait_seconds: float = 0.0
    error: str | None = None
    is_bug: bool = False


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A published checkpoint. All times are those of the slowest rank.

    stall_seconds: pause of training; write_seconds: time of the writing threads; seconds_without_overlap: duration of
    the same save without overlap, as before an exit.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    seconds_without_overlap: float
    num_bytes_all_ranks: int


class _PendingSave(threading.Thread):
    """A save of this rank that is not committed: the thread that writes ``chunks``, copies on the host, into the draft.

    ``part`` is complete when the thread has ended, perhaps by ``exception``.
    """

    def __init__(self, folder: Path, rank: int, chunks: Sequence[TensorChunk], state: TrainState) -> None:
        # A daemon thread: a disk that hangs does not keep the process alive.
        super().__init__(name="checkpoint", daemon=True)
        self.folder, self.draft, self.chunks, self.state = folder, draft_path(folder), chunks, state
        self.part = RankPart(count_bytes_to_write(chunks), pack_write_ranges(chunks))
        self.exception: Exception | None = None
        self._rank = rank

    def run(self) -> None:
        """Write this rank's files and fsync."""
        started_at = time.monotonic()
        checksums = self.part.checksums
        try:
            checksums[chunk_file_name(self._rank)] = write_and_hash_chunks(self.draft, self._rank, self.chunks)
            if self._rank == 0:
                write_json(self.draft / "state.json", asdict(self.state))
                checksums["state.json"] = sha256(self.draft / "state.json")
            self.part.file_bytes = sum((self.draft / name).stat().st_size for name in checksums)
        except Exception as error:  # noqa: BLE001 - commit raises or logs it on all ranks between two steps
            self.exception = error
        self.part.write_seconds = time.monotonic() - started_at

    def ended_part(self) -> RankPart:
        """Return this rank's part after the end of the thread, with its error in words."""
        part = self.part
        if isinstance(self.exception, OSError):
            reason = _format_os_error(self.exception, self.folder.parent, part.num_bytes)
            part.error = f"rank {self._rank}: {reason}"
        elif self.exception is not None:
            part.error, part.is_bug = f"rank {self._rank}: {self.exception!r}", True
        return part


class CheckpointSaver:
    """Saves the checkpoints of one attempt and times them. Every rank calls every method.

    is_superseded: called on rank 0 before publishing; write_timeout_seconds: a rank's time limit for its own thread,
    well below that of a collective.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        is_superseded: Callable[[], bool] = lambda: False,
        write_timeout_seconds: float = 600.0,
    ) -> None:
        self._store = store
        self._world = store.world
        self._is_superseded = is_superseded
        self._write_timeout = write_timeout_seconds
        self._buffer: Tensor | None = None  # of the newest copy on the host
        self._pending: _PendingSave | None = None
        self._metrics: dict[str, float] = {}
        self.slowest_save_seconds = 0.0  # earlier attempts included
        self.notice_seconds: float | None = None  # from Slurm's warning to the end of the job; None: nothing ends it

    @property
    def is_pending(self) -> bool:
        """Whether a save was begun and is not committed; the same on every rank."""
        return self._pending is not None

    @property
    def is_rank_writing(self) -> bool:
        """Whether the thread of this rank is writing."""
        return self._pending is not None and self._pending.is_alive()

    def save(self, engine: CheckpointableEngine, state: TrainState) -> SaveResult | None:
        """Begin a checkpoint: copy this rank's chunks to the host and start the writing thread.

        A pending save is committed first; if that exceeds the time limit, this checkpoint is skipped with a warning.
        Without ``async_save`` the call returns after this checkpoint is published. Returns the save committed in the
        call.
        """
        committed = self.wait_and_commit()
        if self.is_pending:
            self._warn_no_checkpoint(state.step, "the one before is still being written")
            return committed
        started_at = time.monotonic()
        folder = self._store.directory.own_checkpoint_path(state.step)
        chunks = engine.state_chunks()
        if failure := self._store.run_on_rank0(lambda: self._create_draft(draft_path(folder), chunks)):
            self._warn_no_checkpoint(state.step, failure)
            return committed
        state = replace(state, updates=engine.num_updates)
        copies, self._buffer = copy_to_host(chunks, self._buffer)
        pending = _PendingSave(folder, self._world.rank, copies, state)
        pending.start()
        pending.part.copy_seconds = time.monotonic() - started_at
        self._pending = pending
        return committed if self._store.cfg.async_save else self.wait_and_commit()

    def wait_and_commit(self) -> SaveResult | None:
        """Wait for the pending save, if any, and commit it. After the time limit it stays pending, with a warning."""
        committed = None
        if self._pending is not None:
            started_at = time.monotonic()
            self._pending.join(self._write_timeout)
            self._pending.part.wait_seconds += time.monotonic() - started_at
            if self._world.any_rank(self.is_rank_writing):
                step = self._pending.state.step
                _log.warning("the checkpoint of step %d is still being written after %.0f s", step, self._write_timeout)
                return None
            committed = self.commit()
        self._store.directory.wait_for_removal(self._write_timeout)
        return committed

    def commit(self) -> SaveResult | None:
        """Gather the ranks' parts of the pending save and publish it; the same return value on every rank.

        Call it when no rank is writing. If a rank failed (disk full, quota exceeded), the draft is removed, a warning
        gives the reason and None is returned: training continues, and the previous checkpoint is unchanged.
        Raises: AttemptSupersededError if another attempt has taken over; a writing thread's error other than OSError.
        """
        started_at = time.monotonic()
        pending, self._pending = self._pending, None
        assert pending is not None and not pending.is_alive(), "a save is pending, and no thread is running"
        parts: list[RankPart] = self._world.all_gather_objects(pending.ended_part())
        outcome = self._store.run_on_rank0(lambda: self._publish_draft(pending, parts, started_at))
        if any(part.is_bug for part in parts):
            raise pending.exception or RuntimeError(outcome)
        if isinstance(outcome, str):
            self._warn_no_checkpoint(pending.state.step, outcome)
            return None
        self._store.add_published(pending.folder, pending.state.step)
        self._record_times(outcome)
        return outcome

    def pop_metrics(self) -> dict[str, float]:
        """Return and clear the metrics of the newest save: stall in milliseconds, duration in seconds, size in GB."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _create_draft(self, draft: Path, chunks: Sequence[TensorChunk]) -> str | None:
        """Create a draft folder; return the reason of a failure."""
        root, required_bytes = self._store.root, count_bytes_of_all_ranks(chunks)
        if shortage := disk_shortage(root, required_bytes):
            _log.warning("%s", shortage)
        if draft.exists():  # an earlier save failed, and so did the removal of its draft
            self._store.directory.remove_in_background([draft])
        try:
            draft.mkdir()
        except OSError as error:
            return _format_os_error(error, root, required_bytes)
        return None

    def _publish_draft(self, pending: _PendingSave, parts: list[RankPart], started_at: float) -> SaveResult | str:
        """Publish a draft and prune old checkpoints; if a rank failed, remove the draft and return the reason."""
        errors = [part.error for part in parts if part.error]
        directory = self._store.directory
        try:
            if not errors:
                num_bytes = _write_index_and_checksums(pending.draft, pending.chunks, parts)
                self._raise_if_superseded(pending)
                publish_draft(pending.draft, pending.folder)
                directory.remember_size(pending.folder, num_bytes)
        except OSError as error:
            errors = [f"rank 0: {_format_os_error(error, self._store.root, pending.part.num_bytes)}"]
        if errors:
            self._raise_if_superseded(pending)  # the error may be the newer attempt's removal of the draft
            directory.remove_in_background([pending.draft])
            return "; ".join(errors[:3]) + (f"; and {len(errors) - 3} ranks more" if len(errors) > 3 else "")
        try:
            if not self._is_superseded():
                self._store.prune(pending.folder)
        except OSError as error:
            _log.warning("old checkpoints in %s cannot be removed (%s)", self._store.root, error)
        write_seconds = max(part.write_seconds for part in parts)
        commit_seconds = time.monotonic() - started_at
        return SaveResult(
            step=pending.state.step,
            stall_seconds=max(part.copy_seconds + part.wait_seconds for part in parts) + commit_seconds,
            write_seconds=write_seconds,
            seconds_without_overlap=max(part.copy_seconds for part in parts) + write_seconds + commit_seconds,
            num_bytes_all_ranks=sum(part.num_bytes for part in parts),
        )

    def _raise_if_superseded(self, pending: _PendingSave) -> None:
        if self._is_superseded():
            self._store.directory.remove_in_background([pending.draft])
            raise AttemptSupersededError(f"{pending.folder} was not published: another attempt has taken over the run")

    def _record_times(self, result: SaveResult) -> None:
        seconds = result.seconds_without_overlap
        self._metrics = {
            "save_stall_ms": 1e3 * result.stall_seconds,
            "save_seconds": seconds,
            "save_gigabytes": result.num_bytes_all_ranks / 1e9,
        }
        if self.notice_seconds is not None and self.slowest_save_seconds <= self.notice_seconds < seconds:
            _log.warning(
                "a checkpoint took %.0f s, and Slurm ends this job %.0f s after its warning: progress since the last "
                "checkpoint would be lost, and the next start is refused",
                seconds,
                self.notice_seconds,
            )
        self.slowest_save_seconds = max(self.slowest_save_seconds, seconds)

    def _warn_no_checkpoint(self, step: int, reason: str) -> None:
        newest = self._store.latest_step
        before = "there is none before it" if newest is None else f"the newest is of step {newest}"
        _log.warning("NO CHECKPOINT AT STEP %d: %s; training goes on, %s", step, reason, before)


def _format_os_error(error: OSError, root: Path, required_bytes: int) -> str:
    """Return a file system's error; for a full disk with the free and the required space."""
    if error.errno not in DISK_FULL_ERRNOS:
        return str(error)
    free, mount = free_bytes_and_mount(root)
    required = format_bytes(required_bytes)
    return f"{error.strerror} ({mount} has {format_bytes(free)} left, and {required} were to be written)"


def _write_index_and_checksums(draft: Path, chunks: Sequence[TensorChunk], parts: Sequence[RankPart]) -> int:
    """Write the two files that describe those of all ranks; return the bytes of the checkpoint. Raises: OSError."""
    index = encode_index(chunks, [part.write_ranges for part in parts])
    checksums = {name: digest for part in parts for name, digest in part.checksums.items()}
    checksums[INDEX_NAME] = hashlib.sha256(index).hexdigest()
    listed = encode_json(checksums)
    write_atomic(draft / INDEX_NAME, index)
    write_atomic(draft / "checksums.json", listed)
    return sum(part.file_bytes for part in parts) + len(index) + len(listed)
