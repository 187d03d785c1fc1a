"""The audit files of a run: the ledger of samples consumed per step, the quarantine of samples that fail to decode."""

import collections
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.atomic import AppendLog
from foveal.data.batch import Batch
from foveal.data.records.ledger import LedgerWriter, begin_attempt
from foveal.data.records.quarantine import Quarantine, QuarantineEntry, make_entry
from foveal.data.records.rewind import rewind_entries
from foveal.data.sampling.order import batch_index_for_step
from foveal.distributed.world import World
from foveal.training.plan import Plan
from foveal.training.rollback import RollbackController


class DataLog:
    """Records consumed, refused and bad samples on every rank, from the start step of an attempt on.

    Opening it is a collective. Entries of later steps, which are repeated, are removed from the quarantine and from
    refused.jsonl; there the batches stay that no step repeats, because a roll-back skips them.
    """

    def __init__(
        self, run_dir: Path, plan: Plan, world: World, start_step: int, skipped_batches: Sequence[int]
    ) -> None:
        self._world = world
        self._pending_entries: list[QuarantineEntry] = []
        # Ids by step, as long as the step's update may turn out to be refused.
        self._recent_ids: collections.deque[tuple[int, list[Tensor]]] = collections.deque(
            maxlen=RollbackController.steps_in_flight + 1
        )
        self._skipped_batches = skipped_batches
        self._refused_log = AppendLog(run_dir / "refused.jsonl")
        file = run_dir / "quarantine.jsonl"
        entries = world.on_rank0(lambda: rewind_entries(file, start_step))
        world.on_rank0(lambda: rewind_entries(run_dir / "refused.jsonl", start_step, self._is_refused_for_good))
        self._quarantine = Quarantine(file, _max_bad_samples(plan), entries)
        self._ledger: LedgerWriter | None = None
        ledger_dir = run_dir / "ledger"
        if plan.cfg.data.ledger:
            metadata = _ledger_metadata(plan) | {"start": start_step, "skipped": list(skipped_batches)}
            attempt = world.broadcast_object(begin_attempt(ledger_dir, metadata) if world.rank == 0 else 0)
            self._ledger = LedgerWriter(ledger_dir, attempt, world.rank)
        elif world.rank == 0 and ledger_dir.is_dir():  # voids rows past this step, although no rows follow
            begin_attempt(ledger_dir, _ledger_metadata(plan) | {"start": start_step, "skipped": list(skipped_batches)})

    def log_consumed(self, step: int, microbatches: Sequence[Batch]) -> None:
        """Record this rank's microbatches of a finished step."""
        self._recent_ids.append((step, [batch.ids for batch in microbatches]))
        for batch in microbatches:
            if self._ledger is not None:
                self._ledger.add_batch(step, batch)
            self.log_bad_samples(step, batch)

    def log_bad_samples(self, step: int, batch: Batch) -> None:
        """Record the bad samples of a batch, of training or of the evaluation after a step."""
        self._pending_entries += [make_entry(bad, step) for bad in batch.bad_samples]

    def log_refused_update(self, step: int) -> None:
        """Record batch and sample ids of a recent step, whose update was refused. A collective."""
        rank_ids = [sample_id for ids in dict(self._recent_ids)[step] for sample_id in ids.tolist()]
        ids = [sample_id for gathered_ids in self._world.all_gather_objects(rank_ids) for sample_id in gathered_ids]
        if self._world.rank == 0:
            batch = batch_index_for_step(step - 1, self._skipped_batches)
            entry = {"time": time.time(), "step": step, "batch": batch, "samples": ids}
            self._refused_log.append_json_lines([entry])

    def _is_refused_for_good(self, entry: dict[str, Any]) -> bool:
        """Return whether no later step repeats a refused batch: a roll-back skips it; foveal 0.1 wrote no batch."""
        return entry.get("batch") is None or entry["batch"] in self._skipped_batches

    def flush_and_count_bad(self) -> int:
        """Write all pending records and return the number of bad samples in the run so far. A collective."""
        if self._ledger is not None:
            self._ledger.flush()
        entries = [entry for gathered in self._world.all_gather_objects(self._pending_entries) for entry in gathered]
        self._pending_entries = []
        self._quarantine.add_entries(entries, is_writer=self._world.rank == 0)
        return len(self._quarantine)

    def check_bad_limit(self) -> None:
        """Raise DataError, on every rank, if a split has more bad samples than data.max_bad_fraction allows."""
        self._quarantine.check_limits()

    def close(self) -> None:
        """Write this rank's pending records and close its files; no collective."""
        self._refused_log.close()
        self._quarantine.close()
        if self._ledger is not None:
            self._ledger.close()


def _max_bad_samples(plan: Plan) -> dict[str, float]:
    """Return the number of bad samples allowed in each split."""
    data = plan.cfg.data
    sizes = {split: entry.samples for split, entry in plan.dataset.manifest.splits.items()}
    for source in plan.training_set.sources[1:]:
        sizes[source.split] = sizes.get(source.split, 0) + source.dataset.num_samples(source.split)
    return {split: data.max_bad_fraction * size for split, size in sizes.items()}


def _ledger_metadata(plan: Plan) -> dict[str, Any]:
    """Return the facts that a reader of ledger rows needs."""
    data = plan.cfg.data
    indices = [data.index, *(mix_entry.index for mix_entry in data.mix)]
    return {
        "ranks": plan.world_size,
        "batch": plan.cfg.batch.global_size,
        "steps_per_epoch": plan.steps_per_epoch,
        "sources": [
            {
                "path": source.dataset.folder,
                "index": index,
                "split": source.split,
                "samples": source.dataset.num_samples(source.split),
                "digest": source.dataset.samples_digest(source.split),
            }
            for source, index in zip(plan.training_set.sources, indices, strict=True)
        ],
    }
