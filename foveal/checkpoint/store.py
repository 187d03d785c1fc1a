"""Checkpoints of a run: whole or not at all, checked before they are believed, found by looking.

A checkpoint is a folder ``step-00000100-attempt-0003`` with a file of pieces from each rank, ``state.json`` and
``checksums.json``. Each rank copies its pieces to the host and a thread of it writes them into a draft while training
goes on; between two later steps the ranks compare notes, and the draft gets its name by one rename. The newest whole
one is found by looking, not by a pointer that can lie. Each attempt at a run publishes under its own number: one that
was superseded and does not know it yet spoils nothing, because what it publishes is void to readers.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foveal.atomic import (
    DISK_FULL_ERRNOS,
    disk_shortage,
    draft_path,
    format_bytes,
    get_free_space,
    publish_draft,
    sha256,
    write_json,
)
from foveal.checkpoint.chunks import TensorChunk, chunk_file_name, load_chunks, write_chunks
from foveal.checkpoint.digests import has_valid_checksums
from foveal.checkpoint.protocols import CheckpointableEngine, Communicator
from foveal.checkpoint.retention import CheckpointConfig, CheckpointDirectory
from foveal.checkpoint.state import CHECKPOINT_FORMAT, TrainState, check_same_science, read_train_state
from foveal.checkpoint.writer import BackgroundWriter, WriteResult, count_bytes
from foveal.errors import AttemptSupersededError, CheckpointError, FovealError, StorageUnreachableError

__all__ = ["CheckpointConfig", "CheckpointStore", "SaveResult", "TrainState", "check_same_science"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A checkpoint that has its name. All times are of the slowest rank.

    stall_seconds: how long training stood still for it; write_seconds: how long the threads wrote; seconds: what it
    would take at once, when nothing else is left to do.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    sync_seconds: float
    num_bytes: int


@dataclass
class _PendingSave:
    """A checkpoint that was begun and is not settled; the seconds are this rank's."""

    folder: Path
    state: TrainState
    num_bytes: int
    copy_seconds: float
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _RankSaveResult:
    """What a rank tells the others of its part; a fault is not the disk's but the program's."""

    checksums: dict[str, str]
    num_bytes: int
    copy_seconds: float
    wait_seconds: float
    write_seconds: float
    error: str | None
    is_bug: bool


class CheckpointStore:
    """The checkpoints under one folder, as one attempt writes them. Every method is called by every rank.

    starts: the step that each earlier attempt began at, by its number; superseded: asked by rank 0 before it publishes;
    patience: seconds that a rank waits for its own thread, to be well below the time limit of a collective.
    """

    def __init__(
        self,
        root: Path,
        cfg: CheckpointConfig,
        world: Communicator,
        attempt: int,
        attempt_starts: Mapping[int, int],
        *,
        is_superseded: Callable[[], bool] = lambda: False,
        write_timeout_seconds: float = 600.0,
    ) -> None:
        self._root, self._cfg, self._ranks = root, cfg, world
        self._superseded, self._patience = is_superseded, write_timeout_seconds
        self._shelf = CheckpointDirectory(root, attempt, attempt_starts)
        self._writer = BackgroundWriter()
        self._begun: _PendingSave | None = None
        self._torn: set[Path] = set()
        self.latest_step: int | None = None  # the step of the checkpoint that was saved or looked up last
        self._run_on_rank0(self._prepare_folder)

    def _run_on_rank0(self, task: Callable[[], Any]) -> Any:
        """What rank 0 makes of a task, on every rank: file systems answer late, so one looks. A mistake is everybody's."""
        answer = None
        if self._ranks.rank == 0:
            try:
                answer = task()
            except FovealError as error:
                answer = error
            except OSError as error:
                answer = StorageUnreachableError(f"{self._root} does not answer as it should ({error})")
        answer = self._ranks.broadcast_object(answer)
        if isinstance(answer, FovealError):
            raise answer
        return answer

    def _prepare_folder(self) -> None:
        try:
            self._shelf.create_and_clean()
        except OSError as error:
            raise CheckpointError(
                f"{self._root} cannot be written ({error}); set run.dir to a place that can"
            ) from None

    # --- looking ---

    def find_latest(self) -> tuple[Path, TrainState] | None:
        """The newest whole checkpoint, the same on every rank; torn and corrupt ones are passed over with a warning.

        What a later attempt went back behind is passed over too. The step found, or 0, is where this attempt begins.
        Raises: CheckpointError for a checkpoint of another format, or where a run that has begun has none that is whole;
        Unreachable where one cannot be read now, and may be later.
        """
        found = None
        for folder in reversed(self._run_on_rank0(self._list_usable)):
            whole = self._ranks.run_all_or_raise(
                lambda folder=folder: has_valid_checksums(folder, self._ranks.rank, self._ranks.size)
            )
            if not self._ranks.any_rank(not whole):
                found = folder, self._run_on_rank0(lambda folder=folder: read_train_state(folder))
                break
            self._torn.add(folder)
            _log.warning("checkpoint %s is torn or corrupt; the one before it is used", folder)
        if found is None and (lost := self._run_on_rank0(self._explain_none_usable)):
            raise CheckpointError(lost)
        self.latest_step = found[1].step if found else None
        self._shelf.record_start(self.latest_step or 0)
        return found

    def load(self, folder: Path, engine: CheckpointableEngine, state: TrainState) -> None:
        """Put a checkpoint into an engine, whichever engine and however many ranks wrote it.

        Errors, on every rank: CheckpointError that names the parameter which does not fit.
        """
        pieces = engine.state_chunks()
        self._ranks.run_all_or_raise(lambda: load_chunks(folder, pieces))
        engine.on_state_loaded(state.updates)

    def _list_usable(self) -> list[Path]:
        """What may be used, from the first step to the last."""
        named = self._shelf.list_checkpoints()
        if not named and (old := self._shelf.list_format1_checkpoints()):
            raise CheckpointError(
                f"{old[-1]} has checkpoint format 1, and this foveal reads format {CHECKPOINT_FORMAT}: finish the run with the foveal "
                f"that began it, or begin anew with run.fresh=true"
            )
        void = [folder for folder in named if self._shelf.is_invalidated(folder)]
        if void:
            _log.info("passed over, because a later attempt went back behind them: %s", ", ".join(map(str, void)))
        return [folder for folder in named if folder not in void]

    def _explain_none_usable(self) -> str | None:
        """What to say where a run that has begun has no checkpoint to use: beginning at 0 would void all that it did."""
        named, begun = self._shelf.list_checkpoints(), self._shelf.furthest_start
        if not named and not begun:
            return None
        void = ", ".join(folder.name for folder in named if folder not in self._torn)
        past = f" (past where a later one began: {void})" if void else ""
        return (
            f"no checkpoint in {self._root} is whole{f', and an attempt at this run began at step {begun}' if begun else ''}"
            f"{past}: restore one, look whether its disk is "
            f"there, or begin anew with run.fresh=true"
        )

    def oldest_resumable_step(self) -> int:
        """The step of the oldest checkpoint that a resume may have to begin at. For rank 0."""
        return self._shelf.step_of_nth_newest(self._cfg.keep)

    # --- saving ---

    @property
    def is_save_pending(self) -> bool:
        """Whether a save was begun and is not settled: the same on every rank."""
        return self._begun is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._writer.is_writing

    def save(self, engine: CheckpointableEngine, state: TrainState) -> SaveResult | None:
        """Begin a checkpoint: copy this rank's pieces to the host, and let the thread write them.

        One that is unfinished is finished first; should that outlast the patience, there is no checkpoint this time, and
        a warning says so. With ``overlap`` off it waits until this one has its name. Returns what was settled in here.
        """
        settled = self.wait_and_commit()
        if self.is_save_pending:
            self._warn_no_checkpoint(state.step, "the one before is still being written")
            return settled
        began = time.monotonic()
        folder = self._shelf.checkpoint_path(state.step)
        pieces = engine.state_chunks()
        share = count_bytes(pieces)
        if mistake := self._run_on_rank0(lambda: self._create_draft(folder, share * self._ranks.size)):
            self._warn_no_checkpoint(state.step, mistake)
            return settled
        state = replace(state, updates=engine.num_updates)
        copies = self._writer.snapshot(pieces)
        self._writer.start(lambda: self._write_files(draft_path(folder), copies, state))
        self._begun = _PendingSave(folder, state, share, time.monotonic() - began)
        return settled if self._cfg.overlap else self.wait_and_commit()

    def wait_and_commit(self) -> SaveResult | None:
        """Wait for what was begun, and settle it. Should that outlast the patience it stays pending, with a warning."""
        saved = None
        if self._begun is not None:
            began = time.monotonic()
            self._writer.wait(self._patience)
            self._begun.wait_seconds += time.monotonic() - began
            if self._ranks.any_rank(self.is_writing):
                step = self._begun.state.step
                _log.warning("the checkpoint of step %d is still being written after %.0f s", step, self._patience)
                return None
            saved = self.commit()
        self._shelf.wait_for_removal(self._patience)
        return saved

    def commit(self) -> SaveResult | None:
        """Compare notes when no rank is busy, and publish what was begun; the same answer on every rank.

        Where a rank failed (its disk is full, its quota spent) the draft goes, a warning says why, and nothing is
        returned: training goes on, and the checkpoint before is as it was.
        Raises: Superseded where another attempt has taken the run; what ended a thread, if that was not the disk.
        """
        began, begun = time.monotonic(), self._begun
        assert begun is not None, "nothing was begun"
        work = self._writer.result()
        self._begun = None
        notes: list[_RankSaveResult] = self._ranks.all_gather_objects(_rank_save_result(self._ranks.rank, begun, work))
        answer = self._run_on_rank0(lambda: self._publish_draft(begun, notes, began))
        if any(note.is_bug for note in notes):
            raise work.error or RuntimeError(answer)
        if isinstance(answer, str):
            self._warn_no_checkpoint(begun.state.step, answer)
            return None
        self.latest_step = begun.state.step
        self._torn.discard(begun.folder)
        return answer

    def _create_draft(self, folder: Path, need: int) -> str | None:
        """Make the folder of a draft, or say what is in the way."""
        if shortage := disk_shortage(self._root, need):
            _log.warning("%s", shortage)
        draft = draft_path(folder)
        if draft.exists():  # what could not be removed when an earlier save failed
            self._shelf.remove([draft])
        try:
            draft.mkdir()
        except OSError as error:
            return _format_os_error(error, self._root, need)
        return None

    def _write_files(self, draft: Path, copies: Sequence[TensorChunk], state: TrainState) -> dict[str, str]:
        """The thread's work: this rank's files, forced to disk, and their digests."""
        rank = self._ranks.rank
        sums = {chunk_file_name(rank): write_chunks(draft, rank, copies)}
        if rank == 0:
            write_json(draft / "state.json", asdict(state))
            sums["state.json"] = sha256(draft / "state.json")
        return sums

    def _publish_draft(self, begun: _PendingSave, notes: list[_RankSaveResult], began: float) -> SaveResult | str:
        """Publish a draft that every rank has written its part of, and remove what is not to be kept; else say why not."""
        mistakes = [note.error for note in notes if note.error]
        draft, folder = draft_path(begun.folder), begun.folder
        try:
            if not mistakes:
                write_json(
                    draft / "checksums.json", {name: each for note in notes for name, each in note.checksums.items()}
                )
                self._raise_if_superseded(draft, folder)
                publish_draft(draft, folder)
        except OSError as error:
            mistakes = [f"rank 0: {_format_os_error(error, self._root, begun.num_bytes)}"]
        if mistakes:
            self._raise_if_superseded(draft, folder)  # whoever took over may have tidied the draft away
            self._shelf.remove([draft])
            return "; ".join(mistakes[:3]) + (f"; and {len(mistakes) - 3} ranks more" if len(mistakes) > 3 else "")
        try:
            if not self._superseded():
                self._shelf.prune(folder, self._torn, self._cfg)
        except OSError as error:
            _log.warning("old checkpoints in %s cannot be removed (%s)", self._root, error)
        written, settling = max(note.write_seconds for note in notes), time.monotonic() - began
        return SaveResult(
            step=begun.state.step,
            stall_seconds=max(note.copy_seconds + note.wait_seconds for note in notes) + settling,
            write_seconds=written,
            sync_seconds=max(note.copy_seconds for note in notes) + written + settling,
            num_bytes=sum(note.num_bytes for note in notes),
        )

    def _raise_if_superseded(self, draft: Path, folder: Path) -> None:
        if self._superseded():
            self._shelf.remove([draft])
            raise AttemptSupersededError(f"{folder} was not published: another attempt has taken over the run")

    def _warn_no_checkpoint(self, step: int, reason: str) -> None:
        before = "there is none before it" if self.latest_step is None else f"the newest is of step {self.latest_step}"
        _log.warning("NO CHECKPOINT AT STEP %d: %s; training goes on, %s", step, reason, before)


def _rank_save_result(rank: int, pending: _PendingSave, write_result: WriteResult) -> _RankSaveResult:
    error, fault = write_result.error, write_result.error is not None and not isinstance(write_result.error, OSError)
    words = None
    if error is not None:
        words = (
            _format_os_error(error, pending.folder.parent, pending.num_bytes)
            if isinstance(error, OSError)
            else repr(error)
        )
    mistake = f"rank {rank}: {words}" if words else None
    return _RankSaveResult(
        write_result.checksums,
        pending.num_bytes,
        pending.copy_seconds,
        pending.wait_seconds,
        write_result.seconds,
        mistake,
        fault,
    )


def _format_os_error(error: OSError, root: Path, need: int) -> str:
    """What a file system refused; where it is full, how full."""
    if error.errno not in DISK_FULL_ERRNOS:
        return str(error)
    free, mount = get_free_space(root)
    return f"{error.strerror} ({mount} has {format_bytes(free)} left, and {format_bytes(need)} were to be written)"
