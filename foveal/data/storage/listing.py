"""Listings of data sets: which rank of a node looks at the files, and what it finds."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from foveal.data.config import is_url
from foveal.data.storage.reader import ShardReader
from foveal.data.storage.remote import PermanentRemoteError
from foveal.errors import DataError, StorageUnreachableError

_lists_files: ContextVar[bool] = ContextVar("lists_files", default=True)


@contextmanager
def list_files_if(is_first_on_node: bool) -> Iterator[None]:
    """Let data sets that are opened here look at their files in one rank of a node only.

    A data set of 10,000 shards has 20,000 files to stat. One rank of each node and not rank 0 alone, because nodes may
    have copies of their own. The caller raises the error of that rank on all.
    """
    token = _lists_files.set(is_first_on_node)
    try:
        yield
    finally:
        _lists_files.reset(token)


def is_listing_rank() -> bool:
    """Return whether this rank looks at the files of data sets: always, outside of ``list_files_if``."""
    return _lists_files.get()


def list_files(reader: ShardReader, expected_names: set[str]) -> dict[str, int | None] | None:
    """Return the files of a folder and their sizes; None if the server gives no listing of this folder."""
    try:
        sizes = reader.folder.file_sizes()
    except PermanentRemoteError:
        return None
    is_web_page = None in sizes.values()  # HTTP reports the links of any page, for example of a site's front page
    return None if is_web_page and expected_names.isdisjoint(sizes) else sizes


def probe_file(reader: ShardReader, name: str) -> None:
    """Read a local file that the listing lacks, for example a FIFO. Raises: StorageUnreachableError if it blocks."""
    if is_url(reader.folder.display_path()):
        return
    try:
        reader.folder.read_up_to(name, 0, 1)
    except StorageUnreachableError:
        raise
    except DataError:
        return
