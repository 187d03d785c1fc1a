"""What a run owes its auditors: the ledger of what every step consumed, and the quarantine of what did not decode."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog
from foveal.data import Batch
from foveal.data.records.ledger import LedgerWriter, begin_attempt
from foveal.data.records.quarantine import Quarantine, QuarantineEntry, make_entry, rewind_entries
from foveal.distributed.world import World
from foveal.training.plan import Plan


class DataLog:
    """Kept by every rank from the step that an attempt begins at."""

    def __init__(
        self, run_dir: Path, plan: Plan, world: World, start_step: int, skipped_batches: Sequence[int]
    ) -> None:
        self._world = world
        self._met: list[QuarantineEntry] = []
        self._newest: Sequence[Batch] = ()
        self._refused = AppendLog(run_dir / "refused.jsonl")
        file = run_dir / "quarantine.jsonl"
        entries = world.broadcast_object(rewind_entries(file, start_step) if world.rank == 0 else [])
        self._quarantine = Quarantine(file, _max_bad_samples(plan), entries)
        self._ledger: LedgerWriter | None = None
        if plan.cfg.data.ledger:
            facts = _ledger_facts(plan) | {"start": start_step, "skipped": list(skipped_batches)}
            attempt = world.broadcast_object(begin_attempt(run_dir / "ledger", facts) if world.rank == 0 else 0)
            self._ledger = LedgerWriter(run_dir / "ledger", attempt, world.rank)
        elif world.rank == 0 and (run_dir / "ledger").is_dir():  # rows past this step are void, though none follow
            begin_attempt(
                run_dir / "ledger", _ledger_facts(plan) | {"start": start_step, "skipped": list(skipped_batches)}
            )

    def log_consumed(self, step: int, microbatches: Sequence[Batch]) -> None:
        """This rank's micro-batches of a step that has been taken."""
        self._newest = microbatches
        for batch in microbatches:
            if self._ledger is not None:
                self._ledger.add_batch(step, batch)
            self.log_bad_samples(step, batch)

    def log_bad_samples(self, step: int, batch: Batch) -> None:
        """The bad samples of a batch, of training or of an evaluation after a step."""
        self._met += [make_entry(bad, step) for bad in batch.bad_samples]

    def log_refused_update(self, step: int) -> None:
        """Write down the samples of the newest step, whose update was refused. A collective."""
        mine = [number for batch in self._newest for number in batch.ids.tolist()]
        ids = [number for rank in self._world.all_gather_objects(mine) for number in rank]
        if self._world.rank == 0:
            self._refused.append_json_lines([{"time": time.time(), "step": step, "samples": ids}])

    def flush_and_count(self) -> int:
        """Write everything down; how many bad samples the run has met so far. A collective."""
        if self._ledger is not None:
            self._ledger.flush()
        met = [entry for rank in self._world.all_gather_objects(self._met) for entry in rank]
        self._met = []
        self._quarantine.add_entries(met, is_writer=self._world.rank == 0)
        return len(self._quarantine)

    def check_bad_limit(self) -> None:
        """Raise DataError, on every rank, when a split has more bad samples than data.max_bad allows."""
        self._quarantine.check_limits()

    def close(self) -> None:
        """Write what this rank has; no collective."""
        self._refused.close()
        self._quarantine.close()
        if self._ledger is not None:
            self._ledger.close()


def _max_bad_samples(plan: Plan) -> dict[str, float]:
    """The number of bad samples that every split may have."""
    data = plan.cfg.data
    sizes = {split: entry.samples for split, entry in plan.dataset.manifest.splits.items()}
    for source in plan.training_set.sources[1:]:
        sizes[source.split] = sizes.get(source.split, 0) + source.dataset.num_samples(source.split)
    return {split: data.max_bad * size for split, size in sizes.items()}


def _ledger_facts(plan: Plan) -> dict[str, Any]:
    """What the rows of a ledger are to be read with."""
    data = plan.cfg.data
    indices = [data.index, *(other.index for other in data.mix)]
    return {
        "ranks": plan.world_size,
        "batch": plan.cfg.batch.images,
        "steps_per_epoch": plan.steps_per_epoch,
        "sources": [
            {
                "path": source.dataset.folder,
                "index": index,
                "split": source.split,
                "samples": source.dataset.num_samples(source.split),
                "digest": source.dataset.digest(source.split),
            }
            for source, index in zip(plan.training_set.sources, indices, strict=True)
        ],
    }
