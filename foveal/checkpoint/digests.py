"""Verify a checkpoint's checksums: rank 0 lists the files, and every rank reads a part of them."""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from foveal.atomic import list_tree, read_json, sha256
from foveal.checkpoint.protocols import Communicator
from foveal.errors import CheckpointError, StorageUnreachableError

T = TypeVar("T")
_CHECKSUMS_NAME = "checksums.json"
_PAUSES = (0.5, 2.0, 5.0)  # seconds between attempts to read a checkpoint
_log = logging.getLogger(__name__)


def verify_checksums(folder: Path, world: Communicator) -> bool:
    """Return on every rank whether a checkpoint's files are those of ``checksums.json``. Every rank calls it.

    Raises, on every rank: StorageUnreachableError if the files cannot be read. That is no corruption: a skipped
    checkpoint is invalid for good, and storage that does not answer now may answer at the next start.
    """
    # Rank 0 lists for all: a thousand ranks that list a thousand files each would ask for a million.
    checksums = world.on_rank0(lambda: _read_unless_torn(folder, lambda: _list_with_checksums(folder)))
    if checksums is None:
        return False
    own_files = sorted(checksums)[world.rank :: world.size]
    is_valid = world.run_all_or_raise(
        lambda: _read_unless_torn(folder, lambda: all(sha256(folder / name) == checksums[name] for name in own_files))
    )
    return not world.any_rank(not is_valid)


def _list_with_checksums(folder: Path) -> dict[str, str] | None:
    """Return the checksums by file; None if the folder has other files than these."""
    checksums = read_json(folder / _CHECKSUMS_NAME)
    files = {str(file.relative_to(folder)) for file in list_tree(folder)[1]}
    return checksums if files - {_CHECKSUMS_NAME} == set(checksums) else None


def _read_unless_torn(folder: Path, read: Callable[[], T]) -> T | None:
    """Return what ``read`` reads; None if it finds a torn checkpoint. Raises: StorageUnreachableError."""
    for pause in (*_PAUSES, None):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, CheckpointError):
            return None
        except OSError as error:
            if pause is not None:
                time.sleep(pause)
            elif error.errno == errno.EIO:  # also the error of a disk with a lost sector, which is permanent
                _log.warning("%s cannot be read: %s", folder, error)
                return None
            else:
                raise StorageUnreachableError(f"{folder} cannot be read ({error})") from None
    raise AssertionError("the last attempt returns or raises")
