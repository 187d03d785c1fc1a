"""Files that will be needed, copied into the node's cache before anybody waits for them."""

import collections
import logging
import os
import threading
import time
from collections.abc import Sequence

from foveal.data.storage.cache import CacheFullError, DownloadCache, RemoteFile
from foveal.errors import DataError

_log = logging.getLogger(__name__)

_MAX_THREADS = 4  # files
_REPEAT_SECONDS = 5.0  # seconds after which the same files are looked at again, and noted as in use


class Prefetcher:
    """Daemon threads that copy what was asked for last, in its order, and end when there is nothing left to do."""

    def __init__(self, cache: DownloadCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._asked: list[RemoteFile] = []
        self._when = 0.0
        self._waiting: collections.deque[RemoteFile] = collections.deque()
        self._busy: set[RemoteFile] = set()
        self._threads = 0

    def request_files(self, files: Sequence[RemoteFile]) -> None:
        """Copy these files in this order; what was asked for before and has not begun is dropped.

        Copies that are there are noted as in use, so that room is made from others. Never more than the cache holds.
        """
        files = self._limit_to_cache(files)
        with self._lock:
            if files == self._asked and time.monotonic() - self._when < _REPEAT_SECONDS:
                return
            self._asked, self._when = files, time.monotonic()
            self._waiting = collections.deque(each for each in files if each not in self._busy)
            for _ in range(min(_MAX_THREADS, len(self._waiting)) - self._threads):
                self._threads += 1
                threading.Thread(target=self._work, name="foveal-prefetch", daemon=True).start()

    def _limit_to_cache(self, wanted: Sequence[RemoteFile]) -> list[RemoteFile]:
        fitting, total = [], 0
        for each in wanted:
            total += each.size or 0
            if total > self._cache.max_bytes:
                break
            fitting.append(each)
        return fitting

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                wanted = self._waiting.popleft()
                self._busy.add(wanted)
            try:
                os.close(self._cache.open_file(wanted, is_prefetch=True))
            except CacheFullError:
                with self._lock:
                    self._waiting.clear()
            except DataError as error:  # whoever needs it will say so
                _log.warning("not fetched ahead: %s", error)
            finally:
                with self._lock:
                    self._busy.discard(wanted)
