"""The log file of a rank, RUN/logs/rank-NNN.log."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from foveal.errors import FovealError
from foveal.redact import RedactingFormatter


@contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Copy the log of this rank to a file, with the error that ends the attempt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:  # to this handler only: the caller prints the error on stderr
        record = {
            "name": __name__,
            "levelno": logging.ERROR,
            "levelname": "ERROR",
            "msg": f"stopped by {type(error).__name__}: {error}",
        }
        if not isinstance(error, FovealError) or error.__cause__:
            record["exc_info"] = sys.exc_info()
        handler.handle(logging.makeLogRecord(record))
        raise
    finally:
        root.removeHandler(handler)
        with suppress(OSError):  # a full disk, already reported
            handler.close()
