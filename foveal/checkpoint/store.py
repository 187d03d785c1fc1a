"""The checkpoints of a run: written atomically in the background, verified before use.

A checkpoint is a folder ``step-00000100-attempt-0003`` with a chunk file of each rank, ``index.json`` (which range of
which tensor is in which file), ``state.json`` and ``checksums.json``. Each rank copies its chunks to the host, and a
thread writes them into a draft while training continues; between two later steps the ranks exchange their results, and one rename publishes the draft. The newest
complete checkpoint is found by listing the folder; no pointer file can be wrong. A checkpoint's name contains the
attempt's number: a superseded attempt that still publishes does no harm, because readers ignore its checkpoints.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from foveal.atomic import disk_shortage, draft_path, encode_json, publish_draft, sha256, write_atomic, write_json
from foveal.checkpoint.chunk_index import INDEX_NAME, ChunkIndex, encode_index, load_chunks
from foveal.checkpoint.chunks import TensorChunk, chunk_file_name, write_and_hash_chunks
from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.digests import verify_checksums
from foveal.checkpoint.protocols import CheckpointableEngine, Communicator
from foveal.checkpoint.retention import CheckpointDirectory
from foveal.checkpoint.save_result import PendingSave, RankSaveResult, SaveResult, format_os_error, rank_save_result
from foveal.checkpoint.state import (
    CHECKPOINT_FORMAT,
    TrainState,
    check_science_unchanged,
    read_rounding,
    read_train_state,
)
from foveal.checkpoint.writer import (
    BackgroundWriter,
    WrittenFiles,
    count_bytes_of_all_ranks,
    count_bytes_to_write,
)
from foveal.errors import AttemptSupersededError, CheckpointError, FovealError, StorageUnreachableError

__all__ = ["CheckpointConfig", "CheckpointStore", "SaveResult", "TrainState", "check_science_unchanged"]

_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints in a folder, for one attempt. Every rank calls every method, unless its docstring says otherwise.

    start_steps_by_attempt: first step of each earlier attempt, by its number; first_step: where the run begins without
    a checkpoint; is_superseded: called on rank 0 before publishing; write_timeout_seconds: a rank's time limit for its
    own thread, well below that of a collective; read_only: nothing is created or removed, and nothing can be saved.
    """

    def __init__(
        self,
        root: Path,
        cfg: CheckpointConfig,
        world: Communicator,
        attempt_number: int,
        start_steps_by_attempt: Mapping[int, int],
        *,
        first_step: int = 0,
        is_superseded: Callable[[], bool] = lambda: False,
        write_timeout_seconds: float = 600.0,
        read_only: bool = False,
    ) -> None:
        self._root = root
        self._cfg = cfg
        self._world = world
        self._first_step = first_step
        self._is_superseded = is_superseded
        self._write_timeout = write_timeout_seconds
        self._directory = CheckpointDirectory(root, attempt_number, start_steps_by_attempt)
        self._writer = BackgroundWriter()
        self._pending: PendingSave | None = None
        self._corrupt: set[Path] = set()
        self.latest_step: int | None = None  # of the checkpoint that was saved or found last
        if not read_only:
            self._run_on_rank0(self._prepare_folder)

    def _run_on_rank0(self, task: Callable[[], Any]) -> Any:
        """Run a task on rank 0 and return its result, or raise its error, on every rank.

        Only rank 0 lists folders, because network file systems show changes late.
        """
        result = None
        if self._world.rank == 0:
            try:
                result = task()
            except FovealError as error:
                result = error
            except OSError as error:
                result = StorageUnreachableError(f"{self._root} does not answer as it should ({error})")
        result = self._world.broadcast_object(result)
        if isinstance(result, FovealError):
            raise result
        return result

    def _prepare_folder(self) -> None:
        try:
            self._directory.create_and_remove_leftovers()
        except OSError as error:
            raise CheckpointError(
                f"{self._root} cannot be written ({error}); set run.dir to a writable place"
            ) from None

    # --- finding and loading ---

    def find_latest_valid(self) -> tuple[Path, TrainState] | None:
        """Return the newest valid checkpoint, the same on every rank; corrupt ones are skipped with a warning.

        Checkpoints that a later attempt invalidated are skipped too. This attempt begins at the returned step, or at
        the run's first step.
        Raises: CheckpointError for another format, or if a run that has begun has no valid checkpoint;
        StorageUnreachableError if a checkpoint cannot be read now.
        """
        latest = None
        for folder in reversed(self._run_on_rank0(self._list_usable)):
            if verify_checksums(folder, self._world):
                latest = folder, self._run_on_rank0(lambda folder=folder: read_train_state(folder))
                break
            self._corrupt.add(folder)
            _log.warning("checkpoint %s is torn or corrupt; the one before it is used", folder)
        if latest is None and (message := self._run_on_rank0(self._explain_none_usable)):
            raise CheckpointError(message)
        self.latest_step = latest[1].step if latest else None
        self._directory.remember_first_start(self._first_step if latest is None else latest[1].step)
        return latest

    def read_newest_rounding(self) -> dict[str, Any] | None:
        """Return the rounding settings of the newest checkpoint whose state can be read; None without any.

        Only ``state.json`` is read: whether the other files are whole, ``find_latest_valid`` says later.
        """
        return self._run_on_rank0(self._read_newest_rounding)

    def _read_newest_rounding(self) -> dict[str, Any] | None:
        folders = reversed(self._directory.list_checkpoints())
        usable = (folder for folder in folders if not self._directory.is_invalidated_by_attempt(folder))
        return next((found for folder in usable if (found := read_rounding(folder)) is not None), None)

    def load(self, folder: Path, engine: CheckpointableEngine, state: TrainState) -> None:
        """Load a checkpoint into an engine, independent of the engine and world size that wrote it.

        Raises: CheckpointError, on every rank, that names the parameter which does not fit.
        """
        chunks = engine.state_chunks()
        index = self._run_on_rank0(lambda: ChunkIndex.read(folder))
        self._world.run_all_or_raise(lambda: load_chunks(folder, chunks, index))
        engine.on_state_loaded(state.updates)

    def _list_usable(self) -> list[Path]:
        """Return the checkpoints that no later attempt invalidated, by ascending step."""
        checkpoints = self._directory.list_checkpoints()
        if not checkpoints and (format1 := self._directory.list_format1_checkpoints()):
            raise CheckpointError(
                f"{format1[-1]} has checkpoint format 1, and this foveal reads format {CHECKPOINT_FORMAT}: finish the "
                f"run with the foveal that began it, or begin anew with run.fresh=true"
            )
        invalidated = [folder for folder in checkpoints if self._directory.is_invalidated_by_attempt(folder)]
        if invalidated:
            _log.info("skipped, because a later attempt began before them: %s", ", ".join(map(str, invalidated)))
        return [folder for folder in checkpoints if folder not in invalidated]

    def _explain_none_usable(self) -> str | None:
        """Return the message for a run that has begun and has no usable checkpoint; None if it has not begun.

        Such a run must not begin at its first step: that would invalidate all of its checkpoints.
        """
        checkpoints = self._directory.list_checkpoints()
        begun = self._directory.furthest_start_step
        if not checkpoints and begun <= self._first_step:
            return None
        invalidated = ", ".join(folder.name for folder in checkpoints if folder not in self._corrupt)
        start = f", and an attempt at this run began at step {begun}" if begun else ""
        past = f" (past where a later one began: {invalidated})" if invalidated else ""
        return (
            f"no checkpoint in {self._root} is whole{start}{past}: restore one, check that its disk is mounted, or begin "
            f"anew with run.fresh=true"
        )

    def oldest_resumable_step(self) -> int:
        """Return the step of the oldest checkpoint that a resume may use. For rank 0 only."""
        return self._directory.step_of_nth_newest(self._cfg.keep)

    # --- saving ---

    @property
    def is_save_pending(self) -> bool:
        """Whether a save was begun and is not committed; the same on every rank."""
        return self._pending is not None

    @property
    def is_rank_writing(self) -> bool:
        """Whether this rank's thread is writing."""
        return self._writer.is_writing

    def save(self, engine: CheckpointableEngine, state: TrainState) -> SaveResult | None:
        """Begin a checkpoint: copy this rank's chunks to the host and start the writing thread.

        A pending save is committed first; if that exceeds the time limit, this checkpoint is skipped with a warning.
        Without ``overlap`` the call returns after this checkpoint is published. Returns the save committed in the call.
        """
        committed = self.wait_and_commit()
        if self.is_save_pending:
            self._warn_no_checkpoint(state.step, "the one before is still being written")
            return committed
        started_at = time.monotonic()
        folder = self._directory.own_checkpoint_path(state.step)
        chunks = engine.state_chunks()
        num_bytes = count_bytes_to_write(chunks)
        if failure := self._run_on_rank0(lambda: self._create_draft(folder, count_bytes_of_all_ranks(chunks))):
            self._warn_no_checkpoint(state.step, failure)
            return committed
        state = replace(state, updates=engine.num_updates)
        copies = self._writer.copy_to_host_buffer(chunks)
        self._writer.start(lambda: self._write_files(draft_path(folder), copies, state))
        self._pending = PendingSave(folder, state, copies, num_bytes, time.monotonic() - started_at)
        return committed if self._cfg.async_save else self.wait_and_commit()

    def wait_and_commit(self) -> SaveResult | None:
        """Wait for the pending save and commit it. After the time limit it stays pending, with a warning."""
        committed = None
        if self._pending is not None:
            started_at = time.monotonic()
            self._writer.wait(self._write_timeout)
            self._pending.wait_seconds += time.monotonic() - started_at
            if self._world.any_rank(self.is_rank_writing):
                step = self._pending.state.step
                _log.warning("the checkpoint of step %d is still being written after %.0f s", step, self._write_timeout)
                return None
            committed = self.commit()
        self._directory.wait_for_removal(self._write_timeout)
        return committed

    def commit(self) -> SaveResult | None:
        """Gather the ranks' results of the pending save and publish it; the same return value on every rank.

        Call it when no rank is writing. If a rank failed (disk full, quota exceeded), the draft is removed, a warning
        gives the reason and None is returned: training continues, and the previous checkpoint is unchanged.
        Raises: AttemptSupersededError if another attempt has taken over; a writing thread's error other than OSError.
        """
        started_at = time.monotonic()
        pending = self._pending
        assert pending is not None, "no save is pending"
        write_result = self._writer.result()
        self._pending = None
        results: list[RankSaveResult] = self._world.all_gather_objects(
            rank_save_result(self._world.rank, pending, write_result)
        )
        outcome = self._run_on_rank0(lambda: self._publish_draft(pending, results, started_at))
        if any(result.is_bug for result in results):
            raise write_result.error or RuntimeError(outcome)
        if isinstance(outcome, str):
            self._warn_no_checkpoint(pending.state.step, outcome)
            return None
        self.latest_step = pending.state.step
        self._corrupt.discard(pending.folder)
        return outcome

    def _create_draft(self, folder: Path, required_bytes: int) -> str | None:
        """Create a draft folder; return the reason of a failure."""
        if shortage := disk_shortage(self._root, required_bytes):
            _log.warning("%s", shortage)
        draft = draft_path(folder)
        if draft.exists():  # an earlier save failed, and so did the removal of its draft
            self._directory.remove_in_background([draft])
        try:
            draft.mkdir()
        except OSError as error:
            return format_os_error(error, self._root, required_bytes)
        return None

    def _write_files(self, draft: Path, copies: Sequence[TensorChunk], state: TrainState) -> WrittenFiles:
        """Write this rank's files and fsync, in the thread."""
        rank = self._world.rank
        checksums = {chunk_file_name(rank): write_and_hash_chunks(draft, rank, copies)}
        if rank == 0:
            write_json(draft / "state.json", asdict(state))
            checksums["state.json"] = sha256(draft / "state.json")
        return WrittenFiles(checksums, sum((draft / name).stat().st_size for name in checksums))

    def _publish_draft(
        self, pending: PendingSave, results: list[RankSaveResult], started_at: float
    ) -> SaveResult | str:
        """Publish a draft and prune old checkpoints; if a rank failed, remove the draft and return the reason."""
        errors = [result.error for result in results if result.error]
        folder = pending.folder
        draft = draft_path(folder)
        try:
            if not errors:
                num_bytes = _write_index_and_checksums(draft, pending.chunks, results)
                self._raise_if_superseded(draft, folder)
                publish_draft(draft, folder)
                self._directory.remember_size(folder, num_bytes)
        except OSError as error:
            errors = [f"rank 0: {format_os_error(error, self._root, pending.rank_num_bytes)}"]
        if errors:
            self._raise_if_superseded(draft, folder)  # the error may be the newer attempt's removal of the draft
            self._directory.remove_in_background([draft])
            return "; ".join(errors[:3]) + (f"; and {len(errors) - 3} ranks more" if len(errors) > 3 else "")
        try:
            if not self._is_superseded():
                self._directory.prune(folder, self._corrupt, self._cfg)
        except OSError as error:
            _log.warning("old checkpoints in %s cannot be removed (%s)", self._root, error)
        write_seconds = max(result.write_seconds for result in results)
        commit_seconds = time.monotonic() - started_at
        return SaveResult(
            step=pending.state.step,
            stall_seconds=max(result.copy_seconds + result.wait_seconds for result in results) + commit_seconds,
            write_seconds=write_seconds,
            seconds_without_overlap=max(result.copy_seconds for result in results) + write_seconds + commit_seconds,
            num_bytes_all_ranks=sum(result.num_bytes for result in results),
        )

    def _raise_if_superseded(self, draft: Path, folder: Path) -> None:
        if self._is_superseded():
            self._directory.remove_in_background([draft])
            raise AttemptSupersededError(f"{folder} was not published: another attempt has taken over the run")

    def _warn_no_checkpoint(self, step: int, reason: str) -> None:
        before = "there is none before it" if self.latest_step is None else f"the newest is of step {self.latest_step}"
        _log.warning("NO CHECKPOINT AT STEP %d: %s; training goes on, %s", step, reason, before)


def _write_index_and_checksums(draft: Path, chunks: Sequence[TensorChunk], results: Sequence[RankSaveResult]) -> int:
    """Write the two files that describe those of all ranks; return the bytes of the checkpoint. Raises: OSError."""
    index = encode_index(chunks, [result.write_ranges for result in results])
    checksums = {name: digest for result in results for name, digest in result.files.checksums.items()}
    checksums[INDEX_NAME] = hashlib.sha256(index).hexdigest()
    listed = encode_json(checksums)
    write_atomic(draft / INDEX_NAME, index)
    write_atomic(draft / "checksums.json", listed)
    return sum(result.files.num_bytes for result in results) + len(index) + len(listed)
