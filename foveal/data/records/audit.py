"""`foveal data audit`: how often a run consumed every sample, from its ledger only."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.dataset import open_unchecked_dataset
from foveal.data.records.ledger import FORMAT_VERSION, ROW_DTYPE, ledger_rows_path, list_attempts, read_attempt_metadata
from foveal.errors import DataError, FovealError

_ROWS_PER_READ = 1 << 20  # rows in memory at a time
_MAX_LISTED = 10  # duplicates that the report names


@dataclass(frozen=True)
class LedgerAttempt:
    """The valid rows of one attempt: steps after_step+1..last_step."""

    after_step: int
    last_step: int
    rank_rows_per_step: int  # rows of a rank per step
    row_files: tuple[Path, ...]  # one per rank; not kept open: a long run on many ranks has thousands

    def read_rows(self, after_step: int, last_step: int) -> np.ndarray:
        """Return the rows of the steps after_step+1..last_step, [steps, batch], in slot order. Raises: DataError."""
        steps = np.arange(after_step + 1, last_step + 1)[:, None]
        count = (last_step - after_step) * self.rank_rows_per_step
        offset = (after_step - self.after_step) * self.rank_rows_per_step * ROW_DTYPE.itemsize
        rows_of_ranks = []
        for file in self.row_files:
            rows = np.fromfile(file, ROW_DTYPE, count, offset=offset).reshape(-1, self.rank_rows_per_step)
            if (rows["step"] != steps).any():
                raise DataError(f"{file} is damaged: its steps are not consecutive")
            rows_of_ranks.append(rows)
        return np.concatenate(rows_of_ranks, axis=1)


@dataclass(frozen=True)
class RunLedger:
    """The ledger of a run over all attempts. Steps count from 1; after_step+1..last_step have rows."""

    folder: Path
    metadata: dict[str, Any]
    attempts: tuple[LedgerAttempt, ...]

    @property
    def after_step(self) -> int:
        """The step before the first step with rows."""
        return self.attempts[0].after_step

    @property
    def last_step(self) -> int:
        """The last step with rows."""
        return self.attempts[-1].last_step

    def read_rows(self, after_step: int, last_step: int) -> np.ndarray:
        """Return the rows of the steps after_step+1..last_step, [steps, batch], in slot order. Raises: DataError."""
        rows_of_attempts = [
            attempt.read_rows(max(after_step, attempt.after_step), min(last_step, attempt.last_step))
            for attempt in self.attempts
            if attempt.after_step < last_step and after_step < attempt.last_step
        ]
        return np.concatenate(rows_of_attempts)

    def read_rows_bounds(self) -> Iterator[tuple[int, int]]:
        """Yield ranges that cover all steps with rows: (step before the first, last step)."""
        return _step_ranges(self.after_step, self.last_step, self.metadata["batch"])


def _step_ranges(after_step: int, last_step: int, batch_size: int) -> Iterator[tuple[int, int]]:
    num_steps = max(1, _ROWS_PER_READ // batch_size)
    return ((start, min(start + num_steps, last_step)) for start in range(after_step, last_step, num_steps))


def open_ledger(run_folder: Path) -> RunLedger:
    """Open the ledger of a run directory.

    Raises: DataError if there is no ledger, it has another format, or steps between its first and last have no rows.
    Damaged rows raise where they are read.
    """
    if not run_folder.is_dir():
        raise DataError(f"{run_folder}: no such run directory")
    folder = run_folder / "ledger"
    numbers = list_attempts(folder)
    if not numbers and (run_folder / "trials").is_dir():
        raise DataError(
            f"{run_folder} compares trials, and each trial has its own ledger: audit one of {run_folder / 'trials'}"
        )
    if not numbers:
        raise DataError(f"{run_folder} has no ledger: train with data.ledger=true to have one")
    metadata = {number: read_attempt_metadata(folder, number) for number in numbers}
    for number in numbers:
        if metadata[number]["format"] != FORMAT_VERSION:
            raise DataError(f"{folder}: format {metadata[number]['format']}, this foveal reads {FORMAT_VERSION}")
    attempts: list[LedgerAttempt] = []
    for position, number in enumerate(numbers):
        later_starts = [metadata[later]["start"] for later in numbers[position + 1 :]]
        attempt = _read_attempt(folder, number, metadata[number], min(later_starts, default=None))
        if attempt is not None:
            attempts.append(attempt)
    for previous, following in itertools.pairwise(attempts):
        if previous.last_step != following.after_step:
            raise DataError(
                f"{folder} has no rows of the steps {previous.last_step + 1} to {following.after_step}: "
                f"files are missing"
            )
    if not attempts:
        raise DataError(f"{folder} has no rows yet: the run has not finished a step")
    return RunLedger(folder, metadata[numbers[-1]], tuple(attempts))


def _read_attempt(folder: Path, number: int, metadata: dict[str, Any], limit: int | None) -> LedgerAttempt | None:
    """Return an attempt with the steps that all of its ranks wrote, up to ``limit``; None if it has no such step."""
    after_step, num_ranks = metadata["start"], metadata["ranks"]
    files = tuple(ledger_rows_path(folder, number, rank) for rank in range(num_ranks))
    rows_per_rank = metadata["batch"] // num_ranks
    sizes = [file.stat().st_size if file.exists() else 0 for file in files]
    num_steps = min(sizes) // (rows_per_rank * ROW_DTYPE.itemsize)  # a kill may cut the last row
    last_step = after_step + num_steps if limit is None else min(after_step + num_steps, limit)
    return LedgerAttempt(after_step, last_step, rows_per_rank, files) if last_step > after_step else None


@dataclass(frozen=True)
class EpochAudit:
    """How often the samples of one source were consumed in one of its epochs.

    samples_by_times_seen: samples consumed 0, 1, 2 and more times in their own slot. num_replaced: slots whose sample did not
    decode. num_replacements: samples in the slots of such samples. duplicate_split_positions: positions in the split of samples
    that were consumed more than once.
    """

    source_number: int
    epoch: int
    samples_by_times_seen: tuple[int, ...]
    num_replaced: int
    num_replacements: int
    duplicate_split_positions: tuple[int, ...]


class _EpochCounter:
    """Counts of one source and epoch while rows are read."""

    def __init__(self, num_samples: int) -> None:
        self.visits = np.zeros(num_samples, dtype=np.uint16)
        self.num_replaced = 0
        self.num_replacements = 0

    def to_epoch_audit(self, source: int, epoch: int) -> EpochAudit:
        once, twice, more = (
            int(np.count_nonzero(mask)) for mask in (self.visits == 1, self.visits == 2, self.visits > 2)
        )
        return EpochAudit(
            source_number=source,
            epoch=epoch,
            samples_by_times_seen=(len(self.visits) - once - twice - more, once, twice, more),
            num_replaced=self.num_replaced,
            num_replacements=self.num_replacements,
            duplicate_split_positions=tuple(np.flatnonzero(self.visits > 1).tolist()),
        )


def audit_epochs(ledger: RunLedger) -> list[EpochAudit]:
    """Count how often every sample was consumed in every epoch of its source, in the order of sources and epochs.

    An epoch that comes again after later epochs has one more entry each time.
    """
    sizes = [source["samples"] for source in ledger.metadata["sources"]]
    counters: dict[tuple[int, int], _EpochCounter] = {}
    audits: list[EpochAudit] = []

    def close_epochs(first_open_epochs: dict[int, int]) -> None:
        closed = [key for key in counters if key[1] < first_open_epochs.get(key[0], 0)]
        for source, epoch in closed:
            audits.append(counters.pop((source, epoch)).to_epoch_audit(source, epoch))

    for after_step, last_step in ledger.read_rows_bounds():
        rows = ledger.read_rows(after_step, last_step).reshape(-1)
        first_epochs: dict[int, int] = {}  # of the sources in these rows
        replaced = rows["by"] >= 0
        for column, sample_keys in (
            ("visits", rows["draw"][~replaced]),
            ("num_replaced", rows["draw"][replaced]),
            ("num_replacements", rows["by"][replaced]),
        ):
            for (source, epoch), samples in _group_by_epoch(sample_keys, sizes):
                first_epochs[source] = min(epoch, first_epochs.get(source, epoch))
                counter = counters.setdefault((source, epoch), _EpochCounter(sizes[source]))
                if column == "visits":
                    positions, visits = np.unique(samples, return_counts=True)  # few rows, perhaps many samples
                    counter.visits[positions] += visits.astype(np.uint16)
                elif column == "num_replaced":
                    counter.num_replaced += len(samples)
                else:
                    counter.num_replacements += len(samples)
        close_epochs(first_epochs)
    close_epochs(dict.fromkeys(range(len(sizes)), np.iinfo(np.int64).max))
    return sorted(audits, key=lambda audit: (audit.source_number, audit.epoch))


def _group_by_epoch(sample_keys: np.ndarray, sizes: list[int]) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Yield the positions in the split of some samples, by (source, epoch)."""
    ends = np.cumsum(sizes)
    epochs, ids = np.divmod(sample_keys, ends[-1])
    sources = np.searchsorted(ends, ids, side="right")
    for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
        yield (source, epoch), ids[(sources == source) & (epochs == epoch)] - (ends[source] - sizes[source])


def find_own_slot_steps(ledger: RunLedger, source_number: int, epoch: int, split_position: int) -> list[int]:
    """Return the steps that consumed a sample of a source in an epoch in its own slot."""
    sizes = [entry["samples"] for entry in ledger.metadata["sources"]]
    sample_key = sum(sizes[:source_number]) + split_position + epoch * sum(sizes)
    steps: list[int] = []
    for after_step, last_step in ledger.read_rows_bounds():
        rows = ledger.read_rows(after_step, last_step)
        steps += rows["step"][(rows["draw"] == sample_key) & (rows["by"] < 0)].tolist()
    return steps


def find_first_differing_step(ledger: RunLedger, other_ledger: RunLedger) -> int | None:
    """Return the first step in both ledgers whose rows differ in any slot, or None.

    Raises: DataError if the batch sizes or the data differ, or the ledgers have no step in common.
    """
    if ledger.metadata["batch"] != other_ledger.metadata["batch"]:
        raise DataError(
            f"{ledger.folder} has batches of {ledger.metadata['batch']}, {other_ledger.folder} of "
            f"{other_ledger.metadata['batch']}: their slots cannot be compared"
        )
    digests = [source["digest"] for source in ledger.metadata["sources"]]
    if digests != [source["digest"] for source in other_ledger.metadata["sources"]]:
        raise DataError(
            f"{ledger.folder} and {other_ledger.folder} are of other data: the same slots mean other samples"
        )
    after_step = max(ledger.after_step, other_ledger.after_step)
    last_step = min(ledger.last_step, other_ledger.last_step)
    if last_step <= after_step:
        raise DataError(f"{ledger.folder} and {other_ledger.folder} have no step in common")
    for start, stop in _step_ranges(after_step, last_step, ledger.metadata["batch"]):
        differing = (ledger.read_rows(start, stop) != other_ledger.read_rows(start, stop)).any(axis=1)
        if differing.any():
            return start + 1 + int(differing.argmax())
    return None


def format_audit_report(run_folder: Path, other_run_folder: Path | None) -> tuple[list[str], bool]:
    """Return the lines of a run's audit, and whether it passes.

    It passes if no sample came twice in an epoch and no step differs from the other run's.
    Raises: as ``open_ledger`` and ``find_first_differing_step``.
    """
    ledger = open_ledger(run_folder)
    metadata, audits = ledger.metadata, audit_epochs(ledger)
    lines = [f"{run_folder}: steps {ledger.after_step + 1} to {ledger.last_step}, {metadata['batch']} images each"]
    for number, source in enumerate(metadata["sources"]):
        lines += ["", f"{source['samples']:,} samples of split '{source['split']}' in {source['path']}"]
        lines += ["epoch    not seen        once       twice        more    replaced replacement"]
        for audit in audits:
            if audit.source_number == number:
                counts = (*audit.samples_by_times_seen, audit.num_replaced, audit.num_replacements)
                lines.append(f"{audit.epoch:5}" + "".join(f"{count:12,}" for count in counts))
    duplicates = [(audit, sample) for audit in audits for sample in audit.duplicate_split_positions]
    if duplicates:
        lines += ["", f"{len(duplicates):,} samples were seen more than once in an epoch:"]
        lines += [_describe_duplicate(ledger, audit, sample) for audit, sample in duplicates[:_MAX_LISTED]]
        lines += ["..."] if len(duplicates) > _MAX_LISTED else []
    repeated = [
        audit
        for audit, following in itertools.pairwise(audits)
        if (audit.source_number, audit.epoch) == (following.source_number, following.epoch)
    ]
    lines += [
        f"epoch {audit.epoch} came again after it was over: its lines are parts of one epoch" for audit in repeated
    ]
    passes = not duplicates and not repeated
    if other_run_folder is None:
        return lines, passes
    other_ledger = open_ledger(other_run_folder)
    step = find_first_differing_step(ledger, other_ledger)
    if step is not None:
        lines += ["", f"not identical to {other_run_folder}: step {step} is the first that consumed other samples"]
    else:
        first_step = max(ledger.after_step, other_ledger.after_step) + 1
        last_step = min(ledger.last_step, other_ledger.last_step)
        lines += [
            "",
            f"identical to {other_run_folder}, slot by slot, in the steps {first_step} to {last_step} that both have",
        ]
    return lines, passes and step is None


def _describe_duplicate(ledger: RunLedger, audit: EpochAudit, sample: int) -> str:
    """Describe a duplicate by its steps and, if the data can still be opened, by shard and key."""
    source = ledger.metadata["sources"][audit.source_number]
    steps = ", ".join(map(str, find_own_slot_steps(ledger, audit.source_number, audit.epoch, sample)))
    try:
        dataset = open_unchecked_dataset(source["path"], source["index"])
        if dataset.samples_digest(source["split"]) != source["digest"]:
            raise DataError("the data has changed since the run")
        counts = dataset.samples_per_shard(source["split"])
        shard = int(np.searchsorted(np.cumsum(counts), sample, side="right"))
        index = dataset.shard_index(source["split"], shard)
        name = f"{index.shard}: sample '{index.key(sample - int(counts[:shard].sum()))}'"
    except FovealError:
        name = f"sample {sample} of split '{source['split']}'"
    return f"  {name} in epoch {audit.epoch}, at the steps {steps}"
