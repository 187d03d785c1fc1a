"""Delivery of nested runs (trials, folds) by the uploader of the run that contains them.

A nested run has no connection of its own: the outer run's uploader finds it in the run directory and delivers it as a run
whose parent is the outer run. Training waits for none of it; the end of the outer run waits for all of it together.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from foveal.atomic import write_json
from foveal.errors import FovealError
from foveal.tracking.sync import MetricsFileReplaced, RemoteRun, RunSync
from foveal.tracking.sync_facts import FactsSync
from foveal.tracking.tail import MetricsTail, read_json_or_empty, read_step_rows

NESTED_FOLDERS = ("trials", "folds")
_DELIVERED = "nested-delivered.json"
_MAX_OPEN = 32  # ended runs whose files wait: each holds an open file
_log = logging.getLogger(__name__)


class SyncWithNested(RunSync):
    """Uploads a run directory and, after each part of it, the same part of its nested runs.

    ``make_nested(folder, tail)`` makes the upload of a nested run as a child of this one. A run that a store has completely is noted
    in RUN/nested-delivered.json and left alone by later attempts; without ``trusts_notes`` it is compared again.
    """

    def __init__(
        self,
        run_dir: Path,
        tail: MetricsTail,
        connect: Callable[[], RemoteRun],
        facts: FactsSync | None,
        make_nested: Callable[[Path, MetricsTail], RunSync],
        *,
        trusts_notes: bool = True,
    ) -> None:
        super().__init__(run_dir, tail, connect, facts)
        self._run_dir, self._make_nested, self._trusts_notes = run_dir, make_nested, trusts_notes
        self._lock = threading.Lock()  # of the four below: a training adds runs while the uploader's thread works
        self._open: dict[Path, RunSync] = {}
        self._live: set[Path] = set()  # of this process, under way
        self._retired: list[RunSync] = []  # for the uploader's thread to close
        self._retired_live: list[RunSync] = []  # for the end
        self._done: set[Path] = set()  # delivered, or given up
        self._rows_done: set[Path] = set()  # ended, and only files are left
        self._noted_run_id: str | None = None  # the store's id of the outer run

    def add_live(self, folder: Path, tail: MetricsTail) -> RunSync:
        """Add a nested run that begins in this process, in place of its former attempt."""
        folder = self._find_own(folder)
        sync = self._make_nested(folder, tail)
        sync.counts = self.counts
        with self._lock:
            if folder in self._open:
                self._retired.append(self._open[folder])
            self._open[folder] = sync
            self._live.add(folder)
            self._done.discard(folder)
            self.given_up.discard(folder)
            self._rows_done.discard(folder)
        return sync

    def end_live(self, folder: Path) -> None:
        """Note that a nested run's attempt has ended."""
        with self._lock:
            self._live.discard(self._find_own(folder))

    def upload_rows_and_tags(self) -> None:
        """Upload settings, tags and rows. Raises: as ``RunSync``, after which ``reset_connection`` is due."""
        self._upload_rows()
        self._close_retired()
        self._learn_delivered()
        for folder in self._list_pending():
            if folder in self._rows_done:
                continue
            sync, has_ended = self._upload_safely(folder, RunSync.upload_rows_and_tags)
            with self._lock:
                if sync is not None and has_ended and self._open.get(folder) is sync:  # no new attempt has begun
                    self._rows_done.add(folder)
            self._close_idle()
        self._send_run_facts()

    def upload_files(self, *, final: bool) -> None:
        """Upload files. Raises: as ``upload_rows_and_tags``."""
        super().upload_files(final=final)
        for folder in self._list_pending():
            if folder not in self._rows_done and folder not in self._live:
                continue  # its rows come first
            is_last = final or folder in self._rows_done
            sync, _ = self._upload_safely(folder, lambda sync: sync.upload_files(final=is_last))  # noqa: B023 - called here
            if (
                sync is not None
                and folder in self._rows_done
                and self._forget(folder, sync, for_good=True, if_ended=True)
            ):
                self._note_delivered(folder)

    def reset_connection(self) -> None:
        """Reconnect at the next upload."""
        super().reset_connection()
        for sync in self._list_open():
            sync.reset_connection()

    def count_pending_rows(self) -> int:
        """Count the rows of all runs that are not delivered yet, those included that nobody has looked at."""
        count = super().count_pending_rows()
        for sync in self._list_open():
            with contextlib.suppress(OSError):  # delivered and closed in this moment
                count += sync.count_pending_rows()
        with self._lock:
            known = {*self._open, *self._rows_done}
        for folder in self._list_pending():
            if folder not in known:
                with contextlib.suppress(OSError):
                    count += (folder / "metrics.jsonl").read_bytes().count(b"\n")
        return count

    def close(self) -> None:
        """Close all files of rows."""
        super().close()
        for sync in (*self._list_open(), *self._retired, *self._retired_live):
            sync.close()
        self._open, self._retired, self._retired_live = {}, [], []

    def _find_own(self, folder: Path) -> Path:
        """Return a nested run's folder as this run directory lists it: relative where that is."""
        return self._run_dir / folder.parent.name / folder.name

    def _list_open(self) -> list[RunSync]:
        with self._lock:
            return list(self._open.values())

    def _learn_delivered(self) -> None:
        """Learn at the first connection, and when the store has lost the run, which runs it has already."""
        run_id = read_json_or_empty(self._run_dir / "mlflow.json").get("run_id", "")
        if run_id != self._noted_run_id:
            delivered = self._read_delivered() if self._trusts_notes else set()
            with self._lock:
                self._noted_run_id, self._done = run_id, delivered - self._live
                self._rows_done.clear()
                self.given_up.clear()

    def _list_pending(self) -> list[Path]:
        """Return the runs with something to deliver: those under way first, then the newest ones."""
        with self._lock:
            done, live = set(self._done), set(self._live)
        folders = list_nested(self._run_dir, done)
        pending = [(folder not in live, -_modified_at(folder), folder) for folder in folders]
        return [folder for _, _, folder in sorted(pending)]

    def _upload_safely(self, folder: Path, upload: Callable[[RunSync], object]) -> tuple[RunSync | None, bool]:
        """Upload a part of a nested run; return its upload, and whether the run had ended before.

        None: not delivered. A folder that cannot be read is given up.
        """
        for is_again in (False, True):
            sync = None
            try:
                sync, has_ended = self._open_sync(folder)
                if is_again:
                    sync.upload_rows_and_tags()
                upload(sync)
            except MetricsFileReplaced:  # by another attempt, which is opened now: a run that ends has no next round
                self._forget(folder, sync, for_good=False)
                with self._lock:
                    self._rows_done.discard(folder)
            except FovealError as error:
                _log.warning("tracking: %s is not delivered: %s", folder, error)
                self._forget(folder, sync, for_good=True)
                self.given_up.add(folder)
                break
            else:
                self.given_up.discard(folder)
                return sync, has_ended
        return None, False

    def _open_sync(self, folder: Path) -> tuple[RunSync, bool]:
        """Return the upload of a nested run, and whether the run has ended.

        Raises: FovealError if its rows cannot be read; OSError if they may be later, which is as if the store were out of reach.
        """
        with self._lock:
            if folder in self._open:
                return self._open[folder], folder not in self._live
        file = folder / "metrics.jsonl"
        try:
            for _ in read_step_rows(file):  # a damaged line is this run's, and no failure of the store
                pass
            tail = MetricsTail(os.open(file, os.O_RDONLY), file)
        except (FileNotFoundError, PermissionError) as error:
            raise FovealError(f"{file} cannot be read ({error.strerror})") from None
        sync = self._make_nested(folder, tail)
        sync.counts = self.counts
        with self._lock:
            if folder not in self._open:
                self._open[folder] = sync
            else:  # the run has begun in the meantime
                self._retired.append(sync)
            return self._open[folder], folder not in self._live

    def _forget(self, folder: Path, sync: RunSync | None, *, for_good: bool, if_ended: bool = False) -> bool:
        """Close the upload of a nested run; return False if the run has begun again in the meantime."""
        with self._lock:
            if self._open.get(folder) is not sync or (if_ended and folder in self._live):
                return False
            self._open.pop(folder, None)
            self._rows_done -= {folder} if for_good else set()
            if folder in self._live:  # its training still writes through it
                self._retired_live += [sync] if sync is not None else []
                return False
            self._done |= {folder} if for_good else set()
        if sync is not None:
            sync.close()
        return True

    def _close_retired(self) -> None:
        with self._lock:
            retired, self._retired = self._retired, []
        for sync in retired:
            sync.close()

    def _close_idle(self) -> None:
        """Close ended runs above a number; their files are uploaded through a new connection."""
        with self._lock:
            idle = [(folder, sync) for folder, sync in self._open.items() if folder in self._rows_done]
        for folder, sync in idle[: max(len(idle) - _MAX_OPEN, 0)]:
            self._forget(folder, sync, for_good=False, if_ended=True)

    # --- the note of what is delivered ---

    def _read_delivered(self) -> set[Path]:
        """Return the nested runs that the store has as they are now."""
        noted = self._read_note()["runs"]
        return {self._run_dir / name for name, facts in noted.items() if facts == _describe(self._run_dir / name)}

    def _note_delivered(self, folder: Path) -> None:
        note = self._read_note()
        note["runs"][str(folder.relative_to(self._run_dir))] = _describe(folder)
        try:
            write_json(self._run_dir / _DELIVERED, note)
        except OSError as error:  # the next attempt compares it again
            _log.debug("%s is not written: %s", _DELIVERED, error)

    def _read_note(self) -> dict[str, Any]:
        """Return the note of this store's run; an empty one if the store has lost the run or is another."""
        run_id = read_json_or_empty(self._run_dir / "mlflow.json").get("run_id")
        try:
            note = read_json_or_empty(self._run_dir / _DELIVERED)
        except FovealError:
            note = {}
        return note if note.get("run_id") == run_id and "runs" in note else {"run_id": run_id, "runs": {}}


def list_nested(run_dir: Path, without: Collection[Path] = ()) -> list[Path]:
    """Return the folders of a run's nested runs that have begun, without some of them."""
    folders: list[Path] = []
    for name in NESTED_FOLDERS:
        with contextlib.suppress(OSError):  # most runs have no nested runs
            folders += [
                folder
                for folder in (run_dir / name).iterdir()
                if folder not in without and (folder / "metrics.jsonl").exists()
            ]
    return folders


def _modified_at(folder: Path) -> float:
    try:
        return (folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return 0.0


def _describe(folder: Path) -> list[Any]:
    """Return what changes with every later attempt: the size of the rows, the attempt's start and its state."""
    try:
        tags = read_json_or_empty(folder / "tags.json")
        return [(folder / "metrics.jsonl").stat().st_size, tags.get("attempt.started"), tags.get("state")]
    except (OSError, FovealError):
        return []
