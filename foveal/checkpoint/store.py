"""The checkpoints of a run: found, verified before use, loaded and pruned; ``saver`` writes them.

A checkpoint is a folder ``step-00000100-attempt-0003`` with a chunk file of each rank, ``index.json`` (which range of
which tensor is in which file), ``state.json`` and ``checksums.json``. The newest complete checkpoint is found by listing
the folder; no pointer file can be wrong. A checkpoint's name contains the attempt's number: a superseded attempt that
still publishes does no harm, because readers ignore its checkpoints.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foveal.checkpoint.chunk_index import ChunkIndex, load_chunks
from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.digests import verify_checksums
from foveal.checkpoint.protocols import CheckpointableEngine, Communicator
from foveal.checkpoint.retention import CheckpointDirectory
from foveal.checkpoint.state import CHECKPOINT_FORMAT, TrainState, read_rounding, read_train_state
from foveal.errors import CheckpointError, FovealError, StorageUnreachableError

_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints in a folder, for one attempt. Every rank calls every method, unless its docstring says otherwise.

    start_steps_by_attempt: first step of each earlier attempt, by its number; first_step: where the run begins without
    a checkpoint; read_only: nothing is created or removed, and nothing can be saved.
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
        read_only: bool = False,
    ) -> None:
        self.root, self.cfg, self.world = root, cfg, world
        self.directory = CheckpointDirectory(root, attempt_number, start_steps_by_attempt)
        self.latest_step: int | None = None  # of the checkpoint that was published or found last
        self._first_step = first_step
        self._corrupt: set[Path] = set()
        if not read_only:
            self.run_on_rank0(self._prepare_folder)

    def run_on_rank0(self, task: Callable[[], Any]) -> Any:
        """Run a task on rank 0 and return its result, or raise its error, on every rank.

        Only rank 0 lists folders, because network file systems show changes late.
        """
        result = None
        if self.world.rank == 0:
            try:
                result = task()
            except FovealError as error:
                result = error
            except OSError as error:
                result = StorageUnreachableError(f"{self.root} does not answer as it should ({error})")
        result = self.world.broadcast_object(result)
        if isinstance(result, FovealError):
            raise result
        return result

    def _prepare_folder(self) -> None:
        try:
            self.directory.create_and_remove_leftovers()
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be written ({error}); set run.dir to a writable place") from None

    # --- finding and loading ---

    def find_latest_valid(self) -> tuple[Path, TrainState] | None:
        """Return the newest valid checkpoint, the same on every rank; corrupt ones are skipped with a warning.

        Checkpoints that a later attempt invalidated are skipped too. This attempt begins at the returned step, or at
        the run's first step.
        Raises: CheckpointError for another format, or if a run that has begun has no valid checkpoint;
        StorageUnreachableError if a checkpoint cannot be read now.
        """
        latest = None
        for folder in reversed(self.run_on_rank0(self._list_usable)):
            if verify_checksums(folder, self.world):
                latest = folder, self.run_on_rank0(lambda folder=folder: read_train_state(folder))
                break
            self._corrupt.add(folder)
            _log.warning("checkpoint %s is torn or corrupt; the one before it is used", folder)
        if latest is None and (message := self.run_on_rank0(self._explain_none_usable)):
            raise CheckpointError(message)
        self.latest_step = latest[1].step if latest else None
        self.directory.remember_first_start(self._first_step if latest is None else latest[1].step)
        return latest

    def read_newest_rounding(self) -> dict[str, Any] | None:
        """Return the rounding settings of the newest checkpoint whose state can be read; None without any.

        Only ``state.json`` is read: whether the other files are whole, ``find_latest_valid`` says later.
        """
        return self.run_on_rank0(self._read_newest_rounding)

    def _read_newest_rounding(self) -> dict[str, Any] | None:
        folders = reversed(self.directory.list_checkpoints())
        usable = (folder for folder in folders if not self.directory.is_invalidated_by_attempt(folder))
        return next((found for folder in usable if (found := read_rounding(folder)) is not None), None)

    def load(self, folder: Path, engine: CheckpointableEngine, state: TrainState) -> None:
        """Load a checkpoint into an engine, independent of the engine and world size that wrote it.

        Raises: CheckpointError, on every rank, that names the parameter which does not fit.
        """
        chunks = engine.state_chunks()
        index = self.run_on_rank0(lambda: ChunkIndex.read(folder))
        self.world.run_all_or_raise(lambda: load_chunks(folder, chunks, index))
        engine.on_state_loaded(state.updates)

    def _list_usable(self) -> list[Path]:
        """Return the checkpoints that no later attempt invalidated, by ascending step."""
        checkpoints = self.directory.list_checkpoints()
        if not checkpoints and (format1 := self.directory.list_format1_checkpoints()):
            raise CheckpointError(
                f"{format1[-1]} has checkpoint format 1, and this foveal reads format {CHECKPOINT_FORMAT}: finish the "
                f"run with the foveal that began it, or begin anew with run.fresh=true"
            )
        invalidated = [folder for folder in checkpoints if self.directory.is_invalidated_by_attempt(folder)]
        if invalidated:
            _log.info("skipped, because a later attempt began before them: %s", ", ".join(map(str, invalidated)))
        return [folder for folder in checkpoints if folder not in invalidated]

    def _explain_none_usable(self) -> str | None:
        """Return the message for a run that has begun and has no usable checkpoint; None if it has not begun.

        Such a run must not begin at its first step: that would invalidate all of its checkpoints.
        """
        checkpoints = self.directory.list_checkpoints()
        begun = self.directory.furthest_start_step
        if not checkpoints and begun <= self._first_step:
            return None
        invalidated = ", ".join(folder.name for folder in checkpoints if folder not in self._corrupt)
        start = f", and an attempt at this run began at step {begun}" if begun else ""
        past = f" (past where a later one began: {invalidated})" if invalidated else ""
        return (
            f"no checkpoint in {self.root} is whole{start}{past}: restore one, check that its disk is mounted, or begin "
            f"anew with run.fresh=true"
        )

    def oldest_resumable_step(self) -> int:
        """Return the step of the oldest checkpoint that a resume may use. For rank 0 only."""
        return self.directory.step_of_nth_newest(self.cfg.keep)

    # --- what the saver tells ---

    def add_published(self, folder: Path, step: int) -> None:
        """Take a checkpoint that was published now for the newest; a corrupt one of its name is gone."""
        self.latest_step = step
        self._corrupt.discard(folder)

    def prune(self, newest: Path) -> None:
        """Remove the checkpoints that the settings do not keep, never ``newest``. For rank 0 only. Raises: OSError."""
        self.directory.prune(newest, self._corrupt, self.cfg)
