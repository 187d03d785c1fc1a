"""Whether a checkpoint is as it was written: every rank reads its share of the files."""

import errno
import logging
import time
from pathlib import Path

from foveal.atomic import read_json, sha256
from foveal.errors import CheckpointError, StorageUnreachableError

_PAUSES = (0.5, 2.0, 5.0)  # seconds between attempts to read one
_log = logging.getLogger(__name__)


def has_valid_checksums(folder: Path, rank: int, world_size: int) -> bool:
    """Whether this rank's share of a checkpoint's files has the digests that it was written with.

    Raises: Unreachable where they cannot be read, which is another matter than to be torn: a checkpoint that is passed
    over once is void for good, and storage that does not answer now may answer the next start.
    """
    for pause in (*_PAUSES, None):
        try:
            return _checksums_match(folder, rank, world_size)
        except (FileNotFoundError, NotADirectoryError, CheckpointError):
            return False
        except OSError as error:
            if pause is not None:
                time.sleep(pause)
            elif error.errno == errno.EIO:  # so does a disk answer that has lost a sector, now and ever after
                _log.warning("%s cannot be read: %s", folder, error)
                return False
            else:
                raise StorageUnreachableError(f"{folder} cannot be read ({error})") from None
    raise AssertionError("the last attempt returns or raises")


def _checksums_match(folder: Path, rank: int, ranks: int) -> bool:
    sums = read_json(folder / "checksums.json")
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    share = sorted(there.union(sums) - {"checksums.json"})[rank::ranks]
    return all(sha256(folder / name) == sums.get(name) for name in share)
