"""Ranks that are threads of one process, and a count of their file operations: many ranks in little time."""

import io
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.errors import FovealError

_WAIT = 60  # seconds for all ranks to reach a collective


class ThreadWorld:
    """What a checkpoint store and an evaluation use of ``World``, over memory that threads share."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._slots = barrier, slots

    def all_gather_objects(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(_WAIT)
        values = list(self._slots)
        self._barrier.wait(_WAIT)
        return values

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.all_gather_objects(tensor)).sum(dim=0)

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_objects(value)[0]

    def any_rank(self, flag: bool) -> bool:
        return any(self.all_gather_objects(flag))

    def run_all_or_raise(self, function: Callable[[], Any]) -> Any:
        result, failure = None, None
        try:
            result = function()
        except FovealError as error:
            failure = error
        failures = [error for error in self.all_gather_objects(failure) if error is not None]
        if failures:
            raise failures[0]
        return result

    def on_rank0(self, function: Callable[[], Any]) -> Any:
        return self.broadcast_object(self.run_all_or_raise(lambda: function() if self.rank == 0 else None))


def run_ranks(size: int, function: Callable[[ThreadWorld], Any]) -> list[Any]:
    """Call a function in ``size`` threads, one a rank; return what each returned, by rank."""
    barrier, slots = threading.Barrier(size), [None] * size

    def call(rank: int) -> Any:
        try:
            return function(ThreadWorld(rank, size, barrier, slots))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size)))


class FileOperations:
    """Counts the opens, stats and listings of paths under a folder, in all threads."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        self._root, self._lock = str(root), threading.Lock()
        for owner, name, kind in ((io, "open", "open"), (os, "stat", "stat"), (os, "scandir", "list")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), kind))
        for module in [module for name, module in sys.modules.items() if name.startswith("foveal.checkpoint")]:
            if hasattr(module, "safe_open"):  # opens in Rust, which no hook of Python's sees
                monkeypatch.setattr(module, "safe_open", self._counting(module.safe_open, "open"))

    def pop(self) -> Counter[str]:
        """Return the counts since the last call, by kind."""
        counts, self.counts = self.counts, Counter()
        return counts

    def _counting(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            if arguments and isinstance(arguments[0], str | os.PathLike):
                path = os.fspath(arguments[0])
                if str(path).startswith(self._root):
                    with self._lock:
                        self.counts[kind] += 1
            return call(*arguments, **options)

        return count
