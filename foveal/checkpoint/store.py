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
    FULL,
    draft_of,
    free_bytes,
    in_gigabytes,
    publish,
    room,
    sha256,
    write_json,
)
from foveal.checkpoint.chunks import Piece, file_of, fill_pieces, write_pieces
from foveal.checkpoint.digests import is_whole
from foveal.checkpoint.protocols import Ranks, Saves
from foveal.checkpoint.retention import CheckpointConfig, Shelf
from foveal.checkpoint.state import FORMAT, TrainState, check_same_science, read_state
from foveal.checkpoint.writer import Work, Writer, bytes_of
from foveal.errors import CheckpointError, FovealError, Superseded, Unreachable

__all__ = ["CheckpointConfig", "Saved", "Store", "TrainState", "check_same_science"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that has its name. All times are of the slowest rank.

    stall_seconds: how long training stood still for it; write_seconds: how long the threads wrote; seconds: what it
    would take at once, when nothing else is left to do.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    seconds: float
    bytes: int


@dataclass
class _Begun:
    """A checkpoint that was begun and is not settled; the seconds are this rank's."""

    folder: Path
    state: TrainState
    bytes: int
    copied: float
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class _Note:
    """What a rank tells the others of its part; a fault is not the disk's but the program's."""

    sums: dict[str, str]
    bytes: int
    copied: float
    waited: float
    written: float
    mistake: str | None
    fault: bool


class Store:
    """The checkpoints under one folder, as one attempt writes them. Every method is called by every rank.

    starts: the step that each earlier attempt began at, by its number; superseded: asked by rank 0 before it publishes;
    patience: seconds that a rank waits for its own thread, to be well below the time limit of a collective.
    """

    def __init__(
        self,
        root: Path,
        cfg: CheckpointConfig,
        ranks: Ranks,
        attempt: int,
        starts: Mapping[int, int],
        *,
        superseded: Callable[[], bool] = lambda: False,
        patience: float = 600.0,
    ) -> None:
        self._root, self._cfg, self._ranks = root, cfg, ranks
        self._superseded, self._patience = superseded, patience
        self._shelf = Shelf(root, attempt, starts)
        self._writer = Writer()
        self._begun: _Begun | None = None
        self._torn: set[Path] = set()
        self.latest: int | None = None  # the step of the checkpoint that was saved or looked up last
        self._by_rank_0(self._tidy)

    def _by_rank_0(self, task: Callable[[], Any]) -> Any:
        """What rank 0 makes of a task, on every rank: file systems answer late, so one looks. A mistake is everybody's."""
        answer = None
        if self._ranks.rank == 0:
            try:
                answer = task()
            except FovealError as error:
                answer = error
            except OSError as error:
                answer = Unreachable(f"{self._root} does not answer as it should ({error})")
        answer = self._ranks.broadcast(answer)
        if isinstance(answer, FovealError):
            raise answer
        return answer

    def _tidy(self) -> None:
        try:
            self._shelf.tidy()
        except OSError as error:
            raise CheckpointError(
                f"{self._root} cannot be written ({error}); set run.dir to a place that can"
            ) from None

    # --- looking ---

    def newest(self) -> tuple[Path, TrainState] | None:
        """The newest whole checkpoint, the same on every rank; torn and corrupt ones are passed over with a warning.

        What a later attempt went back behind is passed over too. The step found, or 0, is where this attempt begins.
        Errors: CheckpointError for a checkpoint of another format, or where a run that has begun has none that is whole;
        Unreachable where one cannot be read now, and may be later.
        """
        found = None
        for folder in reversed(self._by_rank_0(self._looked)):
            whole = self._ranks.together(lambda folder=folder: is_whole(folder, self._ranks.rank, self._ranks.size))
            if not self._ranks.any(not whole):
                found = folder, self._by_rank_0(lambda folder=folder: read_state(folder))
                break
            self._torn.add(folder)
            _log.warning("checkpoint %s is torn or corrupt; the one before it is used", folder)
        if found is None and (lost := self._by_rank_0(self._lost)):
            raise CheckpointError(lost)
        self.latest = found[1].step if found else None
        self._shelf.began(self.latest or 0)
        return found

    def load(self, folder: Path, engine: Saves, state: TrainState) -> None:
        """Put a checkpoint into an engine, whichever engine and however many ranks wrote it.

        Errors, on every rank: CheckpointError that names the parameter which does not fit.
        """
        pieces = engine.pieces()
        self._ranks.together(lambda: fill_pieces(folder, pieces))
        engine.restored(state.updates)

    def _looked(self) -> list[Path]:
        """What may be used, from the first step to the last."""
        named = self._shelf.checkpoints()
        if not named and (old := self._shelf.of_format_1()):
            raise CheckpointError(
                f"{old[-1]} has checkpoint format 1, and this foveal reads format {FORMAT}: finish the run with the foveal "
                f"that began it, or begin anew with run.fresh=true"
            )
        void = [folder for folder in named if self._shelf.is_void(folder)]
        if void:
            _log.info("passed over, because a later attempt went back behind them: %s", ", ".join(map(str, void)))
        return [folder for folder in named if folder not in void]

    def _lost(self) -> str | None:
        """What to say where a run that has begun has no checkpoint to use: beginning at 0 would void all that it did."""
        named, begun = self._shelf.checkpoints(), self._shelf.furthest
        if not named and not begun:
            return None
        void = ", ".join(folder.name for folder in named if folder not in self._torn)
        past = f" (past where a later one began: {void})" if void else ""
        return (
            f"no checkpoint in {self._root} is whole{f', and an attempt at this run began at step {begun}' if begun else ''}"
            f"{past}: restore one, look whether its disk is "
            f"there, or begin anew with run.fresh=true"
        )

    def reach(self) -> int:
        """The step of the oldest checkpoint that a resume may have to begin at. For rank 0."""
        return self._shelf.reach(self._cfg.keep)

    # --- saving ---

    @property
    def pending(self) -> bool:
        """Whether a save was begun and is not settled: the same on every rank."""
        return self._begun is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._writer.busy

    def save(self, engine: Saves, state: TrainState) -> Saved | None:
        """Begin a checkpoint: copy this rank's pieces to the host, and let the thread write them.

        One that is unfinished is finished first; should that outlast the patience, there is no checkpoint this time, and
        a warning says so. With ``overlap`` off it waits until this one has its name. Returns what was settled in here.
        """
        settled = self.finish()
        if self.pending:
            self._warn(state.step, "the one before is still being written")
            return settled
        began = time.monotonic()
        folder = self._shelf.folder(state.step)
        pieces = engine.pieces()
        share = bytes_of(pieces)
        if mistake := self._by_rank_0(lambda: self._drafted(folder, share * self._ranks.size)):
            self._warn(state.step, mistake)
            return settled
        state = replace(state, updates=engine.updates)
        copies = self._writer.snapshot(pieces)
        self._writer.begin(lambda: self._write(draft_of(folder), copies, state))
        self._begun = _Begun(folder, state, share, time.monotonic() - began)
        return settled if self._cfg.overlap else self.finish()

    def finish(self) -> Saved | None:
        """Wait for what was begun, and settle it. Should that outlast the patience it stays pending, with a warning."""
        saved = None
        if self._begun is not None:
            began = time.monotonic()
            self._writer.wait(self._patience)
            self._begun.waited += time.monotonic() - began
            if self._ranks.any(self.busy):
                step = self._begun.state.step
                _log.warning("the checkpoint of step %d is still being written after %.0f s", step, self._patience)
                return None
            saved = self.settle()
        self._shelf.removed(self._patience)
        return saved

    def settle(self) -> Saved | None:
        """Compare notes when no rank is busy, and publish what was begun; the same answer on every rank.

        Where a rank failed (its disk is full, its quota spent) the draft goes, a warning says why, and nothing is
        returned: training goes on, and the checkpoint before is as it was.
        Errors: Superseded where another attempt has taken the run; what ended a thread, if that was not the disk.
        """
        began, begun = time.monotonic(), self._begun
        assert begun is not None, "nothing was begun"
        work = self._writer.done()
        self._begun = None
        notes: list[_Note] = self._ranks.gather(_noted(self._ranks.rank, begun, work))
        answer = self._by_rank_0(lambda: self._settled(begun, notes, began))
        if any(note.fault for note in notes):
            raise work.error or RuntimeError(answer)
        if isinstance(answer, str):
            self._warn(begun.state.step, answer)
            return None
        self.latest = begun.state.step
        self._torn.discard(begun.folder)
        return answer

    def _drafted(self, folder: Path, need: int) -> str | None:
        """Make the folder of a draft, or say what is in the way."""
        if shortage := room(self._root, need):
            _log.warning("%s", shortage)
        draft = draft_of(folder)
        if draft.exists():  # what could not be removed when an earlier save failed
            self._shelf.remove([draft])
        try:
            draft.mkdir()
        except OSError as error:
            return _in_words(error, self._root, need)
        return None

    def _write(self, draft: Path, copies: Sequence[Piece], state: TrainState) -> dict[str, str]:
        """The thread's work: this rank's files, forced to disk, and their digests."""
        rank = self._ranks.rank
        sums = {file_of(rank): write_pieces(draft, rank, copies)}
        if rank == 0:
            write_json(draft / "state.json", asdict(state))
            sums["state.json"] = sha256(draft / "state.json")
        return sums

    def _settled(self, begun: _Begun, notes: list[_Note], began: float) -> Saved | str:
        """Publish a draft that every rank has written its part of, and remove what is not to be kept; else say why not."""
        mistakes = [note.mistake for note in notes if note.mistake]
        draft, folder = draft_of(begun.folder), begun.folder
        try:
            if not mistakes:
                write_json(draft / "checksums.json", {name: each for note in notes for name, each in note.sums.items()})
                self._fence(draft, folder)
                publish(draft, folder)
        except OSError as error:
            mistakes = [f"rank 0: {_in_words(error, self._root, begun.bytes)}"]
        if mistakes:
            self._fence(draft, folder)  # whoever took over may have tidied the draft away
            self._shelf.remove([draft])
            return "; ".join(mistakes[:3]) + (f"; and {len(mistakes) - 3} ranks more" if len(mistakes) > 3 else "")
        try:
            if not self._superseded():
                self._shelf.prune(folder, self._torn, self._cfg)
        except OSError as error:
            _log.warning("old checkpoints in %s cannot be removed (%s)", self._root, error)
        written, settling = max(note.written for note in notes), time.monotonic() - began
        return Saved(
            step=begun.state.step,
            stall_seconds=max(note.copied + note.waited for note in notes) + settling,
            write_seconds=written,
            seconds=max(note.copied for note in notes) + written + settling,
            bytes=sum(note.bytes for note in notes),
        )

    def _fence(self, draft: Path, folder: Path) -> None:
        if self._superseded():
            self._shelf.remove([draft])
            raise Superseded(f"{folder} was not published: another attempt has taken over the run")

    def _warn(self, step: int, reason: str) -> None:
        before = "there is none before it" if self.latest is None else f"the newest is of step {self.latest}"
        _log.warning("NO CHECKPOINT AT STEP %d: %s; training goes on, %s", step, reason, before)


def _noted(rank: int, begun: _Begun, work: Work) -> _Note:
    error, fault = work.error, work.error is not None and not isinstance(work.error, OSError)
    words = None
    if error is not None:
        words = _in_words(error, begun.folder.parent, begun.bytes) if isinstance(error, OSError) else repr(error)
    mistake = f"rank {rank}: {words}" if words else None
    return _Note(work.sums, begun.bytes, begun.copied, begun.waited, work.seconds, mistake, fault)


def _in_words(error: OSError, root: Path, need: int) -> str:
    """What a file system refused; where it is full, how full."""
    if error.errno not in FULL:
        return str(error)
    free, mount = free_bytes(root)
    return f"{error.strerror} ({mount} has {in_gigabytes(free)} left, and {in_gigabytes(need)} were to be written)"
