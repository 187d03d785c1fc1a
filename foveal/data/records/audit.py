"""`foveal data audit`: what a run consumed, read from its ledger and from nothing else."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.dataset import open_dataset
from foveal.data.records.ledger import FORMAT_VERSION, ROW_DTYPE, ledger_rows_path, list_attempts, read_attempt_metadata
from foveal.errors import DataError, FovealError

_ROWS_PER_READ = 1 << 20  # rows looked at at a time
_MAX_LISTED = 10  # duplicates that are named


@dataclass(frozen=True)
class LedgerAttempt:
    """The rows of one attempt that count: those of the steps after ``start`` up to ``stop``."""

    after_step: int
    last_step: int
    rows_per_rank: int  # rows of a rank in a step
    row_files: tuple[Path, ...]  # the rows of each rank; not kept open: a long run on many ranks has thousands

    def read_rows(self, after_step: int, last_step: int) -> np.ndarray:
        """The rows of the steps start+1..stop, [steps, images], in the order of the slots. Raises: DataError."""
        wanted = np.arange(after_step + 1, last_step + 1)[:, None]
        ranked = []
        for file in self.row_files:
            count, offset = (
                (last_step - after_step) * self.rows_per_rank,
                (after_step - self.after_step) * self.rows_per_rank * ROW_DTYPE.itemsize,
            )
            ranked.append(np.fromfile(file, ROW_DTYPE, count, offset=offset).reshape(-1, self.rows_per_rank))
            if (ranked[-1]["step"] != wanted).any():
                raise DataError(f"{file} is damaged: its steps do not follow one another")
        return np.concatenate(ranked, axis=1)


@dataclass(frozen=True)
class RunLedger:
    """The whole ledger of a run. Steps count from 1; those after ``start`` up to ``stop`` have rows."""

    folder: Path
    metadata: dict[str, Any]
    attempts: tuple[LedgerAttempt, ...]

    @property
    def after_step(self) -> int:
        """The step before the first that has rows."""
        return self.attempts[0].after_step

    @property
    def last_step(self) -> int:
        """The last step that has rows."""
        return self.attempts[-1].last_step

    def read_rows(self, after_step: int, last_step: int) -> np.ndarray:
        """The rows of the steps start+1..stop, [steps, images], in the order of the slots."""
        parts = [
            attempt.read_rows(max(after_step, attempt.after_step), min(last_step, attempt.last_step))
            for attempt in self.attempts
            if attempt.after_step < last_step and after_step < attempt.last_step
        ]
        return np.concatenate(parts)

    def step_ranges(self) -> Iterator[tuple[int, int]]:
        """All steps with rows, some at a time: (step before the first, last step)."""
        return _step_ranges(self.after_step, self.last_step, self.metadata["batch"])


def _step_ranges(start: int, stop: int, batch: int) -> Iterator[tuple[int, int]]:
    many = max(1, _ROWS_PER_READ // batch)
    return ((at, min(at + many, stop)) for at in range(start, stop, many))


def read_ledger(run_folder: Path) -> RunLedger:
    """The ledger of a run directory.

    Raises: DataError if there is none, if it is of another format, or if steps between its first and last have no rows;
    that rows are damaged is found where they are read.
    """
    if not run_folder.is_dir():
        raise DataError(f"{run_folder}: no such run directory")
    folder = run_folder / "ledger"
    numbers = list_attempts(folder)
    if not numbers and (run_folder / "trials").is_dir():
        raise DataError(
            f"{run_folder} compares trials, and each has a ledger of its own: audit one of {run_folder / 'trials'}"
        )
    if not numbers:
        raise DataError(f"{run_folder} has no ledger: train with data.ledger=true to have one")
    facts = {number: read_attempt_metadata(folder, number) for number in numbers}
    for number in numbers:
        if facts[number]["format"] != FORMAT_VERSION:
            raise DataError(f"{folder}: format {facts[number]['format']}, this foveal reads {FORMAT_VERSION}")
    found = []
    for at, number in enumerate(numbers):
        begun = facts[number]["start"]
        limit = min((facts[later]["start"] for later in numbers[at + 1 :]), default=None)
        attempt = _read_attempt(folder, number, begun, facts[number]["ranks"], facts[number]["batch"], limit)
        if attempt is not None:
            found.append(attempt)
    for one, other in itertools.pairwise(found):
        if one.last_step != other.after_step:
            raise DataError(
                f"{folder} has no rows of the steps {one.last_step + 1} to {other.after_step}: files are missing"
            )
    if not found:
        raise DataError(f"{folder} has no rows yet: the run has not finished a step")
    return RunLedger(folder, facts[numbers[-1]], tuple(found))


def _read_attempt(
    folder: Path, number: int, start: int, ranks: int, batch: int, limit: int | None
) -> LedgerAttempt | None:
    """An attempt with the steps that all of its ranks have written down, up to ``limit``; nothing if there are none."""
    files = tuple(ledger_rows_path(folder, number, rank) for rank in range(ranks))
    share = batch // ranks
    sizes = [file.stat().st_size if file.exists() else 0 for file in files]
    steps = min(sizes) // (share * ROW_DTYPE.itemsize)  # a kill may cut the last row
    stop = start + steps if limit is None else min(start + steps, limit)
    return LedgerAttempt(start, stop, share, files) if stop > start else None


@dataclass(frozen=True)
class EpochAudit:
    """How often the samples of one set were seen in one of its epochs.

    seen: samples seen 0, 1, 2 times and more often, each in its own slot; replaced: slots whose sample did not decode;
    stood_in: slots of others that samples filled; twice: positions in the split of samples seen more than once.
    """

    source: int
    epoch: int
    seen_counts: tuple[int, ...]
    num_replaced: int
    num_replacements: int
    duplicate_samples: tuple[int, ...]


class _EpochCounter:
    """The same while rows are still being counted."""

    def __init__(self, samples: int) -> None:
        self.seen = np.zeros(samples, dtype=np.uint16)
        self.replaced = self.stood_in = 0

    def to_epoch_audit(self, source: int, epoch: int) -> EpochAudit:
        once, two, more = (int(np.count_nonzero(found)) for found in (self.seen == 1, self.seen == 2, self.seen > 2))
        twice = np.flatnonzero(self.seen > 1).tolist()
        seen = (len(self.seen) - once - two - more, once, two, more)
        return EpochAudit(source, epoch, seen, self.replaced, self.stood_in, tuple(twice))


def audit_epochs(ledger: RunLedger) -> list[EpochAudit]:
    """How often every sample was seen in every epoch of its set, in the order of sets and epochs.

    An epoch that comes again after it was over has a further entry for every time.
    """
    sizes = [source["samples"] for source in ledger.metadata["sources"]]
    counts: dict[tuple[int, int], _EpochCounter] = {}
    found: list[EpochAudit] = []

    def close(before: dict[int, int]) -> None:
        for source, epoch in [place for place in counts if place[1] < before.get(place[0], 0)]:
            found.append(counts.pop((source, epoch)).to_epoch_audit(source, epoch))

    for start, stop in ledger.step_ranges():
        rows = ledger.read_rows(start, stop).reshape(-1)
        oldest: dict[int, int] = {}
        replaced = rows["by"] >= 0
        for name, draws in (
            ("seen", rows["draw"][~replaced]),
            ("replaced", rows["draw"][replaced]),
            ("stood_in", rows["by"][replaced]),
        ):
            for (source, epoch), samples in _group_by_epoch(draws, sizes):
                oldest[source] = min(epoch, oldest.get(source, epoch))
                count = counts.setdefault((source, epoch), _EpochCounter(sizes[source]))
                if name == "seen":
                    which, times = np.unique(samples, return_counts=True)  # a block is small, a set may not be
                    count.seen[which] += times.astype(np.uint16)
                else:
                    setattr(count, name, getattr(count, name) + len(samples))
        close(oldest)
    close(dict.fromkeys(range(len(sizes)), np.iinfo(np.int64).max))
    return sorted(found, key=lambda one: (one.source, one.epoch))


def _group_by_epoch(draws: np.ndarray, sizes: list[int]) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Positions in the split of the samples of some draws, by (set, epoch)."""
    ends = np.cumsum(sizes)
    epochs, ids = np.divmod(draws, ends[-1])
    sources = np.searchsorted(ends, ids, side="right")
    for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
        yield (source, epoch), ids[(sources == source) & (epochs == epoch)] - (ends[source] - sizes[source])


def find_sample_steps(ledger: RunLedger, source: int, epoch: int, split_position: int) -> list[int]:
    """The steps that saw a sample of a set in an epoch in its own slot."""
    sizes = [one["samples"] for one in ledger.metadata["sources"]]
    draw = sum(sizes[:source]) + split_position + epoch * sum(sizes)
    steps: list[int] = []
    for start, stop in ledger.step_ranges():
        rows = ledger.read_rows(start, stop)
        steps += rows["step"][(rows["draw"] == draw) & (rows["by"] < 0)].tolist()
    return steps


def find_first_differing_step(ledger: RunLedger, other_ledger: RunLedger) -> int | None:
    """The first step, of those that both have, whose rows are not the same in every slot; nothing if there is none.

    Raises: DataError if the batches differ in size, the data is not the same, or no step is in both.
    """
    if ledger.metadata["batch"] != other_ledger.metadata["batch"]:
        raise DataError(
            f"{ledger.folder} has batches of {ledger.metadata['batch']}, {other_ledger.folder} of {other_ledger.metadata['batch']}: "
            f"there is nothing to compare slot by slot"
        )
    if [each["digest"] for each in ledger.metadata["sources"]] != [
        each["digest"] for each in other_ledger.metadata["sources"]
    ]:
        raise DataError(
            f"{ledger.folder} and {other_ledger.folder} are of other data: the same slots mean other samples"
        )
    start, stop = max(ledger.after_step, other_ledger.after_step), min(ledger.last_step, other_ledger.last_step)
    if stop <= start:
        raise DataError(f"{ledger.folder} and {other_ledger.folder} have no step in common")
    for at, end in _step_ranges(start, stop, ledger.metadata["batch"]):
        differing = (ledger.read_rows(at, end) != other_ledger.read_rows(at, end)).any(axis=1)
        if differing.any():
            return at + 1 + int(differing.argmax())
    return None


def format_audit_report(run_folder: Path, other_run_folder: Path | None) -> tuple[list[str], bool]:
    """The audit of a run in words, and whether all is well: no sample twice in an epoch, no step unlike ``against``'s.

    Raises: as ``read_record`` and ``first_difference``.
    """
    record = read_ledger(run_folder)
    facts, epochs = record.metadata, audit_epochs(record)
    lines = [f"{run_folder}: steps {record.after_step + 1} to {record.last_step}, {facts['batch']} images each"]
    for number, source in enumerate(facts["sources"]):
        lines += ["", f"{source['samples']:,} samples of split '{source['split']}' in {source['path']}"]
        lines += ["epoch    not seen        once       twice        more    replaced    stood in"]
        for one in epochs:
            if one.source == number:
                counts = (*one.seen_counts, one.num_replaced, one.num_replacements)
                lines.append(f"{one.epoch:5}" + "".join(f"{count:12,}" for count in counts))
    duplicates = [(one, sample) for one in epochs for sample in one.duplicate_samples]
    if duplicates:
        lines += ["", f"{len(duplicates):,} samples were seen more than once in an epoch:"]
        lines += [_describe_duplicate(record, one, sample) for one, sample in duplicates[:_MAX_LISTED]]
        lines += ["..."] if len(duplicates) > _MAX_LISTED else []
    again = [one for one, other in itertools.pairwise(epochs) if (one.source, one.epoch) == (other.source, other.epoch)]
    lines += [f"epoch {one.epoch} came again after it was over: its lines are parts of one epoch" for one in again]
    well = not duplicates and not again
    if other_run_folder is None:
        return lines, well
    other = read_ledger(other_run_folder)
    step = find_first_differing_step(record, other)
    if step is not None:
        lines += ["", f"not identical to {other_run_folder}: step {step} is the first that consumed other samples"]
    else:
        start, stop = max(record.after_step, other.after_step) + 1, min(record.last_step, other.last_step)
        lines += ["", f"identical to {other_run_folder}, slot by slot, in the steps {start} to {stop} that both have"]
    return lines, well and step is None


def _describe_duplicate(record: RunLedger, one: EpochAudit, sample: int) -> str:
    """A sample that was seen twice: its shard and key, where the data is still to be had, and the steps."""
    source = record.metadata["sources"][one.source]
    steps = ", ".join(map(str, find_sample_steps(record, one.source, one.epoch, sample)))
    try:
        dataset = open_dataset(source["path"], source["index"])
        if dataset.digest(source["split"]) != source["digest"]:
            raise DataError("what lies there now is other data")
        counts = dataset.samples_per_shard(source["split"])
        shard = int(np.searchsorted(np.cumsum(counts), sample, side="right"))
        index = dataset.shard_index(source["split"], shard)
        name = f"{index.shard}: sample '{index.key(sample - int(counts[:shard].sum()))}'"
    except FovealError:
        name = f"sample {sample} of split '{source['split']}'"
    return f"  {name} in epoch {one.epoch}, at the steps {steps}"
