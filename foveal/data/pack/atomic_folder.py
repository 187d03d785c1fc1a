"""A folder that is written beside its target and renamed: whole or not there, also after a kill or a full disk."""

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
    """Whether a folder is a whole data set already; DataError if it is something that must not be overwritten."""
    occupied = False
    try:
        occupied = folder.is_dir() and any(folder.iterdir())  # asked first: another process may finish in between
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
def atomic_dataset_folder(target_folder: Path) -> Iterator[Path]:
    """An empty folder that gets the name ``folder`` when the block ends, and is removed if it ends badly.

    Of two that write the same folder at once, one wins, and the other's draft goes. A draft whose process was killed
    is removed by the next one for the same folder: the kernel gives back the lock that tells them apart.
    Raises: DataError if it cannot be written; a full disk is one of the reasons.
    """
    target = target_folder.resolve()  # "." has no name to put a draft beside
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
    """Hold a draft's lock until the result is closed. The file gets its name only when it is locked."""
    nameless = draft / f"{_LOCK}.new"
    stream = nameless.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: nobody will take this draft for a dead one
        nameless.unlink()
    else:
        nameless.rename(draft / _LOCK)
    return stream


def _remove_dead_drafts(target: Path) -> None:
    for draft in target.parent.glob(f".{glob.escape(target.name)}.draft-*"):
        try:
            with (draft / _LOCK).open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(draft, ignore_errors=True)
        except OSError:  # its process lives
            continue
