"""Checkpoints of a run: whole or not at all, checked before they are believed, found by looking.

A checkpoint is a folder ``step-00000100`` with the engine's own files, ``state.json`` and ``checksums.json``. It is
written as a draft by every rank and gets its name by one rename; the newest whole one is found by looking, not by a
pointer that can lie. An engine's files may be pickles: they are loaded from the run's own directory only, and only
after their checksums agree.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from foveal.config import Config, machine
from foveal.errors import CheckpointError
from foveal.files import draft_of, force, publish, sha256, write_json

FORMAT = 1
_log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    """When a checkpoint is written and which are kept."""

    every: int = machine(1000, "Steps between checkpoints; 0: only at the end and when asked to leave.", ge=0)
    keep: int = machine(2, "How many of the newest are kept.", ge=1)
    keep_every: int = machine(0, "Keep also those whose step is a multiple of this; 0: none.", ge=0)


@dataclass(frozen=True, slots=True)
class TrainState:
    """The facts beside the engine's files that decide how a run goes on; skipped: batches that no step takes."""

    step: int
    seconds: float
    ranks: int
    engine: str
    science: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    format: int = FORMAT


class Ranks(Protocol):
    """What the store needs of the world."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def barrier(self) -> None: ...
    def any(self, flag: bool) -> bool: ...
    def broadcast(self, value: Any) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...


class Saves(Protocol):
    """What the store needs of an engine."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class Store:
    """The checkpoints under one folder. Every method is called by every rank."""

    def __init__(self, root: Path, cfg: CheckpointConfig, ranks: Ranks) -> None:
        self._root, self._cfg, self._ranks = root, cfg, ranks
        if ranks.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for old in root.glob(".old-*"):
                folder = root / old.name.removeprefix(".old-")
                if not folder.exists():  # killed between the two renames that replace a checkpoint
                    old.rename(folder)
            for left in [*root.glob(".draft-*"), *root.glob(".old-*")]:
                shutil.rmtree(left)
        ranks.barrier()

    def save(self, engine: Saves, state: TrainState) -> None:
        """Write one checkpoint; ranks write, force and digest their share of the files at the same time."""
        folder = self._root / f"step-{state.step:08d}"
        draft = draft_of(folder)
        if self._ranks.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
        self._ranks.barrier()
        engine.save(draft)
        self._ranks.barrier()
        sums = _merged(self._ranks.gather(_digest(draft, self._share(_files(draft)))))
        if self._ranks.rank == 0:
            write_json(draft / "state.json", asdict(state))
            sums["state.json"] = sha256(draft / "state.json")
            write_json(draft / "checksums.json", sums)
            publish(draft, folder)
            self._prune()
        self._ranks.barrier()

    def newest(self) -> tuple[Path, TrainState] | None:
        """The newest whole checkpoint, the same on every rank; torn and corrupt ones are passed over with a warning.

        Errors: CheckpointError for a checkpoint of another format.
        """
        folders = self._ranks.broadcast(_checkpoints(self._root) if self._ranks.rank == 0 else None)
        for folder in reversed(folders):
            if not self._ranks.any(not self._whole(folder)):
                return folder, _read_state(folder)
            _log.warning("checkpoint %s is torn or corrupt; the one before it is used", folder)
        return None

    def _whole(self, folder: Path) -> bool:
        try:
            sums = json.loads((folder / "checksums.json").read_text())
            names = set(sums) | set(_files(folder)) - {"checksums.json"}
            return all(sha256(folder / name) == sums.get(name) for name in self._share(sorted(names)))
        except (OSError, ValueError):
            return False

    def _share(self, names: list[str]) -> list[str]:
        return names[self._ranks.rank :: self._ranks.size]

    def _prune(self) -> None:
        for folder in _checkpoints(self._root)[: -self._cfg.keep]:
            if not self._cfg.keep_every or _step_of(folder) % self._cfg.keep_every:
                shutil.rmtree(folder)


def check_same_science(was: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to go on under other science, and name what differs.

    Errors: CheckpointError with every differing setting, old and new value.
    """
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if names:
        changes = ", ".join(f"{name} (was {was.get(name)!r}, is {now.get(name)!r})" for name in names)
        raise CheckpointError(
            f"{where} was made with other science: {changes}; set it back, or start anew with another run.dir or run.fresh=true"
        )


def _read_state(folder: Path) -> TrainState:
    tree = json.loads((folder / "state.json").read_text())
    if tree.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {tree.get('format')}; this foveal reads format {FORMAT}")
    return TrainState(**tree)


def _checkpoints(root: Path) -> list[Path]:
    """From the first step to the last; a copy under another name (step-00000100.safe) is none of ours."""
    return sorted((folder for folder in root.glob("step-*") if folder.name[5:].isdecimal()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _digest(folder: Path, names: list[str]) -> dict[str, str]:
    for name in names:
        force(folder / name)
    return {name: sha256(folder / name) for name in names}


def _merged(parts: list[dict[str, str]]) -> dict[str, str]:
    return {name: value for part in parts for name, value in part.items()}
