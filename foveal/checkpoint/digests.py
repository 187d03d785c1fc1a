"""Verify a checkpoint's checksums: every rank reads a part of the files."""

import errno
import logging
import time
from pathlib import Path

from foveal.atomic import read_json, sha256
from foveal.errors import CheckpointError, StorageUnreachableError

_PAUSES = (0.5, 2.0, 5.0)  # seconds between attempts to read a checkpoint
_log = logging.getLogger(__name__)


def verify_rank_checksums(folder: Path, rank: int, world_size: int) -> bool:
    """Return whether this rank's part of a checkpoint's files matches ``checksums.json``.

    Raises: StorageUnreachableError if the files cannot be read. That is no corruption: a skipped checkpoint is invalid
    for good, and storage that does not answer now may answer at the next start.
    """
    for pause in (*_PAUSES, None):
        try:
            return _checksums_match(folder, rank, world_size)
        except (FileNotFoundError, NotADirectoryError, CheckpointError):
            return False
        except OSError as error:
            if pause is not None:
                time.sleep(pause)
            elif error.errno == errno.EIO:  # also the error of a disk with a lost sector, which is permanent
                _log.warning("%s cannot be read: %s", folder, error)
                return False
            else:
                raise StorageUnreachableError(f"{folder} cannot be read ({error})") from None
    raise AssertionError("the last attempt returns or raises")


def _checksums_match(folder: Path, rank: int, world_size: int) -> bool:
    checksums = read_json(folder / "checksums.json")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    rank_files = sorted(files.union(checksums) - {"checksums.json"})[rank::world_size]
    return all(sha256(folder / name) == checksums.get(name) for name in rank_files)
