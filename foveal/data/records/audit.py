"""`foveal data audit`: what a run consumed, read from its ledger and from nothing else."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.dataset import open_folder
from foveal.data.records.ledger import FORMAT, ROW, attempts, read_facts, rows_file
from foveal.errors import DataError, FovealError

_ROWS = 1 << 20  # rows looked at at a time
_NAMED = 10  # duplicates that are named


@dataclass(frozen=True)
class Attempt:
    """The rows of one attempt that count: those of the steps after ``start`` up to ``stop``."""

    start: int
    stop: int
    share: int  # rows of a rank in a step
    files: tuple[Path, ...]  # the rows of each rank; not kept open: a long run on many ranks has thousands

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows of the steps start+1..stop, [steps, images], in the order of the slots. Errors: DataError."""
        wanted = np.arange(start + 1, stop + 1)[:, None]
        ranked = []
        for file in self.files:
            count, offset = (stop - start) * self.share, (start - self.start) * self.share * ROW.itemsize
            ranked.append(np.fromfile(file, ROW, count, offset=offset).reshape(-1, self.share))
            if (ranked[-1]["step"] != wanted).any():
                raise DataError(f"{file} is damaged: its steps do not follow one another")
        return np.concatenate(ranked, axis=1)


@dataclass(frozen=True)
class Record:
    """The whole ledger of a run. Steps count from 1; those after ``start`` up to ``stop`` have rows."""

    folder: Path
    facts: dict[str, Any]
    attempts: tuple[Attempt, ...]

    @property
    def start(self) -> int:
        """The step before the first that has rows."""
        return self.attempts[0].start

    @property
    def stop(self) -> int:
        """The last step that has rows."""
        return self.attempts[-1].stop

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows of the steps start+1..stop, [steps, images], in the order of the slots."""
        parts = [
            attempt.rows(max(start, attempt.start), min(stop, attempt.stop))
            for attempt in self.attempts
            if attempt.start < stop and start < attempt.stop
        ]
        return np.concatenate(parts)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All steps with rows, some at a time: (step before the first, last step)."""
        return _blocks(self.start, self.stop, self.facts["batch"])


def _blocks(start: int, stop: int, batch: int) -> Iterator[tuple[int, int]]:
    many = max(1, _ROWS // batch)
    return ((at, min(at + many, stop)) for at in range(start, stop, many))


def read_record(run: Path) -> Record:
    """The ledger of a run directory.

    Errors: DataError if there is none, if it is of another format, or if steps between its first and last have no rows;
    that rows are damaged is found where they are read.
    """
    if not run.is_dir():
        raise DataError(f"{run}: no such run directory")
    folder = run / "ledger"
    numbers = attempts(folder)
    if not numbers and (run / "trials").is_dir():
        raise DataError(f"{run} compares trials, and each has a ledger of its own: audit one of {run / 'trials'}")
    if not numbers:
        raise DataError(f"{run} has no ledger: train with data.ledger=true to have one")
    facts = {number: read_facts(folder, number) for number in numbers}
    for number in numbers:
        if facts[number]["format"] != FORMAT:
            raise DataError(f"{folder}: format {facts[number]['format']}, this foveal reads {FORMAT}")
    found = []
    for at, number in enumerate(numbers):
        begun = facts[number]["start"]
        limit = min((facts[later]["start"] for later in numbers[at + 1 :]), default=None)
        attempt = _attempt(folder, number, begun, facts[number]["ranks"], facts[number]["batch"], limit)
        if attempt is not None:
            found.append(attempt)
    for one, other in itertools.pairwise(found):
        if one.stop != other.start:
            raise DataError(f"{folder} has no rows of the steps {one.stop + 1} to {other.start}: files are missing")
    if not found:
        raise DataError(f"{folder} has no rows yet: the run has not finished a step")
    return Record(folder, facts[numbers[-1]], tuple(found))


def _attempt(folder: Path, number: int, start: int, ranks: int, batch: int, limit: int | None) -> Attempt | None:
    """An attempt with the steps that all of its ranks have written down, up to ``limit``; nothing if there are none."""
    files = tuple(rows_file(folder, number, rank) for rank in range(ranks))
    share = batch // ranks
    sizes = [file.stat().st_size if file.exists() else 0 for file in files]
    steps = min(sizes) // (share * ROW.itemsize)  # a kill may cut the last row
    stop = start + steps if limit is None else min(start + steps, limit)
    return Attempt(start, stop, share, files) if stop > start else None


@dataclass(frozen=True)
class Epoch:
    """How often the samples of one set were seen in one of its epochs.

    seen: samples seen 0, 1, 2 times and more often, each in its own slot; replaced: slots whose sample did not decode;
    stood_in: slots of others that samples filled; twice: positions in the split of samples seen more than once.
    """

    source: int
    epoch: int
    seen: tuple[int, ...]
    replaced: int
    stood_in: int
    twice: tuple[int, ...]


class _Count:
    """The same while rows are still being counted."""

    def __init__(self, samples: int) -> None:
        self.seen = np.zeros(samples, dtype=np.uint16)
        self.replaced = self.stood_in = 0

    def finished(self, source: int, epoch: int) -> Epoch:
        once, two, more = (int(np.count_nonzero(found)) for found in (self.seen == 1, self.seen == 2, self.seen > 2))
        twice = np.flatnonzero(self.seen > 1).tolist()
        seen = (len(self.seen) - once - two - more, once, two, more)
        return Epoch(source, epoch, seen, self.replaced, self.stood_in, tuple(twice))


def audit(record: Record) -> list[Epoch]:
    """How often every sample was seen in every epoch of its set, in the order of sets and epochs.

    An epoch that comes again after it was over has a further entry for every time.
    """
    sizes = [source["samples"] for source in record.facts["sources"]]
    counts: dict[tuple[int, int], _Count] = {}
    found: list[Epoch] = []

    def close(before: dict[int, int]) -> None:
        for source, epoch in [place for place in counts if place[1] < before.get(place[0], 0)]:
            found.append(counts.pop((source, epoch)).finished(source, epoch))

    for start, stop in record.blocks():
        rows = record.rows(start, stop).reshape(-1)
        oldest: dict[int, int] = {}
        replaced = rows["by"] >= 0
        for name, draws in (
            ("seen", rows["draw"][~replaced]),
            ("replaced", rows["draw"][replaced]),
            ("stood_in", rows["by"][replaced]),
        ):
            for (source, epoch), samples in _by_epoch(draws, sizes):
                oldest[source] = min(epoch, oldest.get(source, epoch))
                count = counts.setdefault((source, epoch), _Count(sizes[source]))
                if name == "seen":
                    which, times = np.unique(samples, return_counts=True)  # a block is small, a set may not be
                    count.seen[which] += times.astype(np.uint16)
                else:
                    setattr(count, name, getattr(count, name) + len(samples))
        close(oldest)
    close(dict.fromkeys(range(len(sizes)), np.iinfo(np.int64).max))
    return sorted(found, key=lambda one: (one.source, one.epoch))


def _by_epoch(draws: np.ndarray, sizes: list[int]) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Positions in the split of the samples of some draws, by (set, epoch)."""
    ends = np.cumsum(sizes)
    epochs, ids = np.divmod(draws, ends[-1])
    sources = np.searchsorted(ends, ids, side="right")
    for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
        yield (source, epoch), ids[(sources == source) & (epochs == epoch)] - (ends[source] - sizes[source])


def steps_of(record: Record, source: int, epoch: int, sample: int) -> list[int]:
    """The steps that saw a sample of a set in an epoch in its own slot."""
    sizes = [one["samples"] for one in record.facts["sources"]]
    draw = sum(sizes[:source]) + sample + epoch * sum(sizes)
    steps: list[int] = []
    for start, stop in record.blocks():
        rows = record.rows(start, stop)
        steps += rows["step"][(rows["draw"] == draw) & (rows["by"] < 0)].tolist()
    return steps


def first_difference(one: Record, other: Record) -> int | None:
    """The first step, of those that both have, whose rows are not the same in every slot; nothing if there is none.

    Errors: DataError if the batches differ in size, the data is not the same, or no step is in both.
    """
    if one.facts["batch"] != other.facts["batch"]:
        raise DataError(
            f"{one.folder} has batches of {one.facts['batch']}, {other.folder} of {other.facts['batch']}: "
            f"there is nothing to compare slot by slot"
        )
    if [each["digest"] for each in one.facts["sources"]] != [each["digest"] for each in other.facts["sources"]]:
        raise DataError(f"{one.folder} and {other.folder} are of other data: the same slots mean other samples")
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    if stop <= start:
        raise DataError(f"{one.folder} and {other.folder} have no step in common")
    for at, end in _blocks(start, stop, one.facts["batch"]):
        differing = (one.rows(at, end) != other.rows(at, end)).any(axis=1)
        if differing.any():
            return at + 1 + int(differing.argmax())
    return None


def report(run: Path, against: Path | None) -> tuple[list[str], bool]:
    """The audit of a run in words, and whether all is well: no sample twice in an epoch, no step unlike ``against``'s.

    Errors: as ``read_record`` and ``first_difference``.
    """
    record = read_record(run)
    facts, epochs = record.facts, audit(record)
    lines = [f"{run}: steps {record.start + 1} to {record.stop}, {facts['batch']} images each"]
    for number, source in enumerate(facts["sources"]):
        lines += ["", f"{source['samples']:,} samples of split '{source['split']}' in {source['path']}"]
        lines += ["epoch    not seen        once       twice        more    replaced    stood in"]
        for one in epochs:
            if one.source == number:
                counts = (*one.seen, one.replaced, one.stood_in)
                lines.append(f"{one.epoch:5}" + "".join(f"{count:12,}" for count in counts))
    duplicates = [(one, sample) for one in epochs for sample in one.twice]
    if duplicates:
        lines += ["", f"{len(duplicates):,} samples were seen more than once in an epoch:"]
        lines += [_in_words(record, one, sample) for one, sample in duplicates[:_NAMED]]
        lines += ["..."] if len(duplicates) > _NAMED else []
    again = [one for one, other in itertools.pairwise(epochs) if (one.source, one.epoch) == (other.source, other.epoch)]
    lines += [f"epoch {one.epoch} came again after it was over: its lines are parts of one epoch" for one in again]
    well = not duplicates and not again
    if against is None:
        return lines, well
    other = read_record(against)
    step = first_difference(record, other)
    if step is not None:
        lines += ["", f"not identical to {against}: step {step} is the first that consumed other samples"]
    else:
        start, stop = max(record.start, other.start) + 1, min(record.stop, other.stop)
        lines += ["", f"identical to {against}, slot by slot, in the steps {start} to {stop} that both have"]
    return lines, well and step is None


def _in_words(record: Record, one: Epoch, sample: int) -> str:
    """A sample that was seen twice: its shard and key, where the data is still to be had, and the steps."""
    source = record.facts["sources"][one.source]
    steps = ", ".join(map(str, steps_of(record, one.source, one.epoch, sample)))
    try:
        dataset = open_folder(source["path"], source["index"])
        if dataset.digest(source["split"]) != source["digest"]:
            raise DataError("what lies there now is other data")
        counts = dataset.counts(source["split"])
        shard = int(np.searchsorted(np.cumsum(counts), sample, side="right"))
        index = dataset.index(source["split"], shard)
        name = f"{index.shard}: sample '{index.key(sample - int(counts[:shard].sum()))}'"
    except FovealError:
        name = f"sample {sample} of split '{source['split']}'"
    return f"  {name} in epoch {one.epoch}, at the steps {steps}"
