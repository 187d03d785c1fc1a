"""What a run owes its auditors: the ledger of what every step consumed, and the quarantine of what did not decode."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveal.atomic import Growing
from foveal.data import Batch
from foveal.data.records.ledger import Ledger, begin_attempt
from foveal.data.records.quarantine import Entry, Quarantine, entry_of, read_entries
from foveal.distributed.world import World
from foveal.training.plan import Plan


class Accounts:
    """Kept by every rank from the step that an attempt begins at."""

    def __init__(self, path: Path, plan: Plan, world: World, start: int, skipped: Sequence[int]) -> None:
        self._world = world
        self._met: list[Entry] = []
        self._newest: Sequence[Batch] = ()
        self._refused = Growing(path / "refused.jsonl")
        file = path / "quarantine.jsonl"
        entries = world.broadcast(read_entries(file, start) if world.rank == 0 else [])
        self._quarantine = Quarantine(file, _limits(plan), entries)
        self._ledger: Ledger | None = None
        if plan.cfg.data.ledger:
            facts = _facts(plan) | {"start": start, "skipped": list(skipped)}
            attempt = world.broadcast(begin_attempt(path / "ledger", facts) if world.rank == 0 else 0)
            self._ledger = Ledger(path / "ledger", attempt, world.rank)
        elif world.rank == 0 and (path / "ledger").is_dir():  # rows past this step are void, though none follow
            begin_attempt(path / "ledger", _facts(plan) | {"start": start, "skipped": list(skipped)})

    def consumed(self, step: int, micros: Sequence[Batch]) -> None:
        """This rank's micro-batches of a step that has been taken."""
        self._newest = micros
        for batch in micros:
            if self._ledger is not None:
                self._ledger.add(step, batch)
            self.met(step, batch)

    def met(self, step: int, batch: Batch) -> None:
        """The bad samples of a batch, of training or of an evaluation after a step."""
        self._met += [entry_of(bad, step) for bad in batch.bad]

    def refused(self, step: int) -> None:
        """Write down the samples of the newest step, whose update was refused. A collective."""
        mine = [number for batch in self._newest for number in batch.ids.tolist()]
        ids = [number for rank in self._world.gather(mine) for number in rank]
        if self._world.rank == 0:
            self._refused.add_json([{"time": time.time(), "step": step, "samples": ids}])

    def report(self) -> int:
        """Write everything down; how many bad samples the run has met so far. A collective."""
        if self._ledger is not None:
            self._ledger.flush()
        met = [entry for rank in self._world.gather(self._met) for entry in rank]
        self._met = []
        self._quarantine.add(met, writes=self._world.rank == 0)
        return len(self._quarantine)

    def check(self) -> None:
        """Raise DataError, on every rank, when a split has more bad samples than data.max_bad allows."""
        self._quarantine.check()

    def close(self) -> None:
        """Write what this rank has; no collective."""
        self._refused.close()
        self._quarantine.close()
        if self._ledger is not None:
            self._ledger.close()


def _limits(plan: Plan) -> dict[str, float]:
    """The number of bad samples that every split may have."""
    data = plan.cfg.data
    sizes = {split: entry.samples for split, entry in plan.dataset.manifest.splits.items()}
    for source in plan.training.sources[1:]:
        sizes[source.split] = sizes.get(source.split, 0) + source.dataset.samples(source.split)
    return {split: data.max_bad * size for split, size in sizes.items()}


def _facts(plan: Plan) -> dict[str, Any]:
    """What the rows of a ledger are to be read with."""
    data = plan.cfg.data
    indices = [data.index, *(other.index for other in data.mix)]
    return {
        "ranks": plan.ranks,
        "batch": plan.cfg.batch.images,
        "steps_per_epoch": plan.steps_per_epoch,
        "sources": [
            {
                "path": source.dataset.folder,
                "index": index,
                "split": source.split,
                "samples": source.dataset.samples(source.split),
                "digest": source.dataset.digest(source.split),
            }
            for source, index in zip(plan.training.sources, indices, strict=True)
        ],
    }
