"""Pretraining on the ranks of a pool, in one folder; and what skips where a library is missing."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from forked import ranks_of
from ports import free_port
from processes import PYTHON, ROOT, Started
from ranks import Ranks, stage_named

Row = dict[str, float]


class Training:
    """Pretraining runs of one config in one folder, on any ranks."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self._folder = config, folder

    def __call__(self, ranks: Ranks, name: str, *overrides: str) -> list[Row]:
        """Train, or go on with what was trained under this name; the rows of the run's steps."""
        require_libraries(overrides)
        rows = ranks.train(stage_named("pretrain"), self.config, self.run(name), *overrides)
        return [row for row in rows if "loss" in row]

    def run(self, name: str) -> Path:
        """The run directory of that name."""
        return self._folder / name


def require_libraries(words: Iterable[str]) -> None:
    """Skip where a library that overrides (``engine.kind=deepspeed``) or kinds name is not installed."""
    for library in ("deepspeed", "accelerate"):
        if any(word.rpartition("=")[2] == library for word in words) and importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}, which is not installed")


def curve(rows: list[Row], name: str = "loss") -> list[float]:
    """One metric by step."""
    return [row[name] for row in rows]


def start_ranks(size: int, words: Sequence[str | Path], cwd: Path, **environment: str) -> list[Started]:
    """Start Python with these words once per rank, as a launcher does; forks would share what CUDA has begun."""
    shared = {"PYTHONPATH": str(ROOT), **environment}
    return [Started([PYTHON, *words], cwd, **(shared | place)) for place in ranks_of(size, free_port())]
