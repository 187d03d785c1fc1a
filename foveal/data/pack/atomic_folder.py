"""Atomic creation of a data set folder: a draft beside the target, renamed when it is complete.

Not ``foveal.atomic.atomic_folder``: its draft has a fixed name, which the next writer removes, and it replaces an
existing folder. Two packs may run at once, and an existing folder is never replaced.
"""

import fcntl
import glob
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from foveal.data.format.manifest import MANIFEST_NAME, read_manifest
from foveal.errors import DataError

_LOCK = ".packing"


def is_packed(folder: Path) -> bool:
    """Return whether a folder is a complete data set. Raises: DataError if it holds something else."""
    occupied = False
    try:
        occupied = folder.is_dir() and any(
            folder.iterdir()
        )  # before the manifest: another process may finish in between
        read_manifest(folder)
    except FileNotFoundError:
        if occupied:
            raise DataError(f"{folder} holds other files and no {MANIFEST_NAME}: choose another folder") from None
        return False
    except NotADirectoryError:
        raise DataError(f"{folder} is a file: choose another folder") from None
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error}): choose another folder") from None
    return True


@contextmanager
def atomic_new_dataset_folder(target_folder: Path) -> Iterator[Path]:
    """Yield an empty draft folder; rename it to the target when the block ends, remove it if the block fails.

    Of two processes that write the same target at once, the first to finish wins, and the other's draft is removed. A
    killed process loses the lock on its draft; the next writer of the same target removes unlocked drafts.
    Raises: DataError if the folder cannot be written, for example on a full disk.
    """
    target = target_folder.resolve()  # "." has no name for a draft beside it
    draft = target.with_name(f".{target.name}.draft-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_drafts(target)
        draft.mkdir()
        with _lock_draft(draft):
            yield draft
            draft.rename(target)
            (target / _LOCK).unlink(missing_ok=True)
    except OSError as error:
        if not is_packed(target_folder):
            raise DataError(f"{target_folder} cannot be packed ({error})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _lock_draft(draft: Path) -> IO[str]:
    """Lock a draft until the returned stream is closed. The lock file gets its name once it is locked."""
    unlocked = draft / f"{_LOCK}.new"
    stream = unlocked.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: without a lock file, no other process removes this draft
        unlocked.unlink()
    else:
        unlocked.rename(draft / _LOCK)
    return stream


def _remove_dead_drafts(target: Path) -> None:
    for draft in target.parent.glob(f".{glob.escape(target.name)}.draft-*"):
        try:
            with (draft / _LOCK).open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(draft, ignore_errors=True)
        except OSError:  # the process of this draft is alive, or the draft has no lock file
            continue
