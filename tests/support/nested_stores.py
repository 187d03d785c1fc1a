"""Stores in memory of a run and its nested runs."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fake_store import Kept
from points import in_jsonl
from uploads import WAIT

from foveal.atomic import write_json
from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.nested import SyncWithNested
from foveal.tracking.nested_tracker import OuterTracker
from foveal.tracking.sync import RemoteRun, RunSync
from foveal.tracking.sync_facts import FactsSync
from foveal.tracking.tail import MetricsTail
from foveal.tracking.uploader import Uploader


@dataclass
class Stores:
    """A store for each run directory, by its name; all fail alike."""

    run: Path
    by_name: dict[str, Kept] = field(default_factory=dict)
    connections: list[str] = field(default_factory=list)
    fail: Callable[[str], object] = lambda _: None
    opened: list[JsonlTracker] = field(default_factory=list)

    def of(self, name: str) -> Kept:
        return self.by_name.setdefault(name, Kept())

    def connect(self, folder: Path) -> Callable[[], RemoteRun]:
        def connected() -> Kept:
            self.connections.append(folder.name)
            kept = self.of(folder.name)
            kept.before = kept.after = self.fail
            kept.run_id = folder.name
            kept.connected()
            if folder == self.run and not (folder / "mlflow.json").exists():
                write_json(folder / "mlflow.json", {"run_id": "outer"})
            return kept

        return connected

    def make_nested(self, folder: Path, tail: MetricsTail) -> RunSync:
        return RunSync(folder, tail, self.connect(folder))

    def begin(self, patience: float = WAIT) -> OuterTracker:
        jsonl = JsonlTracker(self.run, 0)
        self.opened.append(jsonl)
        sync = SyncWithNested(self.run, jsonl.open_tail(), self.connect(self.run), None, self.make_nested)
        return OuterTracker(jsonl, Uploader(sync, self.run, "here", patience), sync)

    def sync_by_hand(self, facts: FactsSync | None = None) -> SyncWithNested:
        file = self.run / "metrics.jsonl"
        tail = MetricsTail(os.open(file, os.O_RDONLY), file)
        return SyncWithNested(self.run, tail, self.connect(self.run), facts, self.make_nested, trusts_notes=False)


def steps(stores: Stores, name: str) -> set[int]:
    """The steps that a store has of a run."""
    return {step for _, step in stores.of(name).numbers()}


def check_delivered(stores: Stores, name: str, state: str = "finished") -> None:
    kept = stores.of(name)
    assert kept.numbers() == in_jsonl(stores.run / "trials" / name)
    assert (kept.tags["state"], kept.settings) == (state, {"seed": 1})
    assert "finished.json" in kept.artifacts
