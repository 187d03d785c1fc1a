"""Background downloads into the node's cache, before any reader waits for the files."""

import collections
import logging
import os
import threading
import time
from collections.abc import Sequence

from foveal.data.storage.cache import CacheFullError, DownloadCache, RemoteFile
from foveal.errors import DataError

_log = logging.getLogger(__name__)

_MAX_THREADS = 4  # concurrent downloads
_REFRESH_SECONDS = 5.0  # an unchanged request is repeated only after this time, to mark its copies as in use


class Prefetcher:
    """Daemon threads that download the most recently requested files, in order, and exit when the queue is empty."""

    def __init__(self, cache: DownloadCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._request: list[RemoteFile] = []
        self._request_time = 0.0
        self._queue: collections.deque[RemoteFile] = collections.deque()
        self._in_progress: set[RemoteFile] = set()
        self._unmarked: list[RemoteFile] = []
        self._marking = threading.Lock()
        self._threads = 0

    def replace_requests(self, files: Sequence[RemoteFile]) -> None:
        """Download ``files`` in this order, in place of earlier requests that have not started.

        Existing copies are marked as in use, so that other copies are evicted first. A request is truncated to the size
        of the cache.
        """
        files = self._limit_to_cache(files)
        with self._lock:
            if files == self._request and time.monotonic() - self._request_time < _REFRESH_SECONDS:
                return
            self._request, self._request_time = files, time.monotonic()
            self._queue = collections.deque(file for file in files if file not in self._in_progress)
            self._unmarked = list(files)
            for _ in range(min(_MAX_THREADS, len(self._queue)) - self._threads):
                self._threads += 1
                threading.Thread(target=self._work, name="foveal-prefetch", daemon=True).start()

    def _mark_existing_copies(self) -> None:
        """Mark the copies of a new request, before a download of this request by any thread evicts one of them."""
        with self._marking:
            with self._lock:
                files, self._unmarked = self._unmarked, []
            for file in files:
                self._cache.mark_used(file)

    def _limit_to_cache(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        fitting, total = [], 0
        for file in files:
            total += file.size or 0
            if total > self._cache.max_bytes:
                break
            fitting.append(file)
        return fitting

    def _work(self) -> None:
        while True:
            self._mark_existing_copies()
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                file = self._queue.popleft()
                self._in_progress.add(file)
            try:
                os.close(self._cache.open_file(file, is_prefetch=True))
            except CacheFullError:
                with self._lock:
                    self._queue.clear()
            except DataError as error:  # the reader that needs the file raises the error again
                _log.warning("not fetched ahead: %s", error)
            finally:
                with self._lock:
                    self._in_progress.discard(file)
