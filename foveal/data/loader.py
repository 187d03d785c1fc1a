"""From the order to batches: a plan of micro-batches, threads that decode ahead of it, nothing that must be saved."""

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from foveal.data.batch import Bad, Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import Undecodable, View, pixels
from foveal.data.image.randaugment import COLUMNS as CHANGE_COLUMNS
from foveal.data.image.randaugment import rand_augment
from foveal.data.image.targets import Labels, Seen, labels_of
from foveal.data.image.transforms import COLUMNS, Box, evaluation_view, training_view
from foveal.data.sampling.order import batch_of, micros_per_step, rank_slots
from foveal.data.sampling.sources import Place, Source, TrainingSet
from foveal.data.sampling.subset import PartName, choose
from foveal.data.workers import Crew, Worker
from foveal.errors import DataError, Unreachable
from foveal.seeding import key, uniforms_numpy

_CHUNK = 16  # images that one thread decodes before it looks whether it is still wanted: a few hundredths of a second


@dataclass(frozen=True)
class _Micro:
    """A micro-batch still to be read. Its first ``len(draws)`` rows are samples, the rest is padding.

    samples: ids that there are, a draw's id is the remainder; find: where the sample of a draw lies; view: how a draw is
    cut in a row; others: the draws that may take a row's place when its own does not decode; none: the row is left empty.
    sides: (height, width) of what is seen; labels: how those are read that no index has; changed: what
    becomes of the image of a draw after it was cut.
    """

    draws: np.ndarray
    samples: int
    rows: int
    step: int
    epoch: int
    micro: int
    find: Callable[[int], Place]
    view: Callable[[int, int], View]
    others: Callable[[int], Iterator[int]] | None
    sides: tuple[int, int]
    labels: Labels | None
    changed: Callable[[int, np.ndarray], np.ndarray] | None = None


@contextmanager
def train_batches(
    training: TrainingSet,
    cfg: DataConfig,
    *,
    rank: int,
    size: int,
    at_once: int,
    start: int,
    stop: int,
    skipped: Sequence[int] = (),
) -> Iterator[Iterator[Batch]]:
    """The micro-batches of one rank for the steps start..stop-1, from micro 0 of ``start``; leaving stops the threads.

    at_once: images of a micro-batch; skipped: numbers of the batches that no step takes, ascending.
    Errors: ConfigError if ranks, lanes or at_once do not divide; ``next`` raises DataError that names shard and sample.
    """
    order = training.order
    first, last = rank_slots(order.batch, order.lanes, rank, size)
    micros = micros_per_step(order.batch, size, at_once)
    assert last - first == micros * at_once
    place = key(training.seed, "augment")
    labels, changed = labels_of(cfg, training.sources[0].dataset), _changes(cfg, key(training.seed, "randaugment"))

    def find(draw: int) -> Place:
        return training.find(draw % training.ids)

    def plan() -> Iterator[_Micro]:
        for step in range(start, stop):
            number = batch_of(step, skipped)
            training.prefetch(number, first, last)
            slots = order.slots(number, first, last)
            draws = training.draws(slots)
            for micro in range(micros):
                part = slice(micro * at_once, (micro + 1) * at_once)
                places = [values[part] for values in (slots.sources, slots.positions, slots.epochs)]

                def others(row: int, places: list[np.ndarray] = places) -> Iterator[int]:
                    return training.others(*(int(values[row]) for values in places))

                view, epoch = _augmented(cfg, place, draws[part]), order.epoch_of(number)
                yield _Micro(
                    draws=draws[part],
                    samples=training.ids,
                    rows=at_once,
                    step=step,
                    epoch=epoch,
                    micro=micro,
                    find=find,
                    view=view,
                    others=others,
                    sides=cfg.sides,
                    labels=labels,
                    changed=changed,
                )

    with closing(_read_ahead(cfg, training.pulse, plan())) as batches:
        yield batches


def eval_batches(
    dataset: Dataset, cfg: DataConfig, *, split: str, part: PartName, seed: int, rank: int, size: int, at_once: int
) -> Generator[Batch, None, None]:
    """Every sample of a part exactly once over all ranks, in batches of ``at_once`` rows, centre-cropped.

    All ranks get the same number of batches; rows that only fill up, and samples that do not decode, have valid=False,
    label and id -1. The micro of a batch counts from 0. Closing the generator stops its threads. ``seed`` is that of
    training: it decides which samples are held out.
    """
    source = Source(dataset, split, choose(dataset, cfg, split=split, part=part, seed=seed))
    rounds = -(-len(source.part) // (size * at_once))
    labels = labels_of(cfg, dataset)

    def view(_row: int, _draw: int) -> View:
        return lambda width, height: (evaluation_view(width, height, cfg.crop_ratio, cfg.val_sides), False)

    def plan() -> Iterator[_Micro]:
        for turn in range(rounds):
            begin = (turn * size + rank) * at_once
            positions = np.arange(begin, max(begin, min(begin + at_once, len(source.part))), dtype=np.int64)
            ids = source.part.sample_ids(positions)
            yield _Micro(ids, source.stop, at_once, 0, 0, turn, source.find, view, None, cfg.val_sides, labels)

    return _read_ahead(cfg, dataset.pulse, plan())


def _augmented(cfg: DataConfig, place: int, draws: np.ndarray) -> Callable[[int, int], View]:
    """How the draws of a micro-batch are cut: their numbers are hashed all at once, those of a stand-in when it comes."""
    numbers = uniforms_numpy(place, draws, COLUMNS)

    def view(row: int, draw: int) -> View:
        mine = numbers[row] if draw == draws[row] else uniforms_numpy(place, np.array([draw]), COLUMNS)[0]
        return lambda width, height: training_view(width, height, mine, cfg.augment, cfg.sides)

    return view


def _changes(cfg: DataConfig, place: int) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """What RandAugment makes of the image of a draw, if it is asked for."""
    operations = cfg.augment.operations
    if not operations:
        return None

    def changed(draw: int, image: np.ndarray) -> np.ndarray:
        numbers = uniforms_numpy(place, np.array([draw]), operations * CHANGE_COLUMNS)
        return rand_augment(image, numbers.reshape(operations, CHANGE_COLUMNS), cfg.augment)

    return changed


def _read_ahead(cfg: DataConfig, pulse: Callable[[], int], plan: Iterator[_Micro]) -> Generator[Batch, None, None]:
    """Batches in the order of the plan; cfg.ahead of them are in work while the caller has one."""
    crew = Crew(cfg.threads, cfg.patience_seconds, pulse)
    waiting: collections.deque[tuple[_Begun, list[Future[None]]]] = collections.deque()

    def begin(micro: _Micro) -> tuple[_Begun, list[Future[None]]]:
        begun = _Begun(micro, _empty(cfg, micro), [], [None] * micro.rows)
        chunk = max(1, min(_CHUNK, -(-len(micro.draws) // cfg.threads)))
        jobs = [
            crew.submit(_Fill(cfg, begun, range(at, min(at + chunk, len(micro.draws))), crew))
            for at in range(0, len(micro.draws), chunk)
        ]
        return begun, jobs

    def finished() -> Batch:
        begun, jobs = waiting.popleft()
        crew.wait(jobs)
        return begun.whole()

    try:
        for micro in plan:
            waiting.append(begin(micro))
            if len(waiting) > cfg.ahead:
                yield finished()
        while waiting:
            yield finished()
    finally:
        crew.close()


@dataclass(frozen=True)
class _Begun:
    """A micro-batch that is being filled: its tensors, its bad samples, and the labels that no index has, by row."""

    micro: _Micro
    batch: Batch
    bad: list[Bad]
    marks: list[np.ndarray | None]

    def whole(self) -> Batch:
        """The batch, once every row is filled."""
        micro = self.micro
        marks = None if micro.labels is None else micro.labels.together(self.marks, micro.sides)
        return replace(self.batch, bad=tuple(sorted(self.bad, key=lambda one: one.row)), marks=marks)


def _empty(cfg: DataConfig, micro: _Micro) -> Batch:
    """Room for a micro-batch, pinned where there is a GPU (by the caller's thread: a worker's would open GPU 0)."""
    pin = torch.cuda.is_available()
    images = torch.empty((micro.rows, cfg.channels, *micro.sides), dtype=torch.uint8, pin_memory=pin)
    images[len(micro.draws) :] = 0
    ids, draws = (torch.full((micro.rows,), -1, dtype=torch.int64, pin_memory=pin) for _ in range(2))
    ids[: len(micro.draws)] = torch.from_numpy(micro.draws % micro.samples)
    draws[: len(micro.draws)] = torch.from_numpy(micro.draws)
    return Batch(
        images=images,
        labels=torch.full_like(ids, -1, pin_memory=pin),
        ids=ids,
        draws=draws,
        valid=torch.empty(micro.rows, dtype=torch.bool, pin_memory=pin).copy_(ids >= 0),
        step=micro.step,
        epoch=micro.epoch,
        micro=micro.micro,
    )


@dataclass(frozen=True)
class _Fill:
    """A job: read, decode and cut the samples of some rows of a micro-batch into its tensors."""

    cfg: DataConfig
    begun: _Begun
    rows: range
    crew: Crew

    @property
    def micro(self) -> _Micro:
        return self.begun.micro

    @property
    def batch(self) -> Batch:
        return self.begun.batch

    def __call__(self, worker: Worker) -> None:
        for row in self.rows:
            if self.crew.stopped.is_set():
                return
            self._fill(row, worker)
            worker.finished += 1

    def _fill(self, row: int, worker: Worker) -> None:
        draw = int(self.micro.draws[row])
        try:
            self._take(row, draw, worker)
        except Undecodable as error:
            others = self.micro.others
            taken = self._leave_empty(row) if others is None else self._replace(row, others(row), worker)
            place = self.micro.find(draw)
            key, offset = place.index.key(place.row), place.index.image(place.row)[0]
            shard = place.dataset.where(place.split, place.shard)
            self.begun.bad.append(Bad(row, draw, taken, place.split, shard, key, offset, str(error)))

    def _take(self, row: int, draw: int, worker: Worker) -> None:
        """Put the sample of a draw into a row. Errors: Undecodable, DataError."""
        place = self.micro.find(draw)
        # What is said of a thread that hangs must not hang itself: reading the index, for the key, can.
        worker.doing = lambda: place.dataset.where(place.split, place.shard)
        index, cfg, sides, seen = place.index, self.cfg, self.micro.sides, []
        worker.doing = lambda: f"{place.dataset.where(place.split, place.shard)}: sample '{index.key(place.row)}'"

        def view(width: int, height: int) -> tuple[Box, bool]:
            box, flipped = self.micro.view(row, draw)(width, height)
            seen.append(Seen(width, height, box, flipped, sides))
            return box, flipped

        def image(data: bytes) -> np.ndarray:
            return pixels(data, cfg.channels, view, sides, cfg.augment.interpolation, cfg.jpeg_scaling)

        found = _read(place, index.image(place.row), image)
        changed = self.micro.changed
        self.batch.images.numpy()[row] = found if changed is None else changed(draw, found)
        labels = self.micro.labels
        if labels is not None:
            member = index.member(place.row, labels.field)
            if member is None:
                raise DataError(
                    f"{place.where} has no member .{labels.field}, which is its label: write its shard again"
                )
            self.begun.marks[row] = _read(place, member, lambda data: labels.read(data, seen[0], place.where))
        self.batch.labels.numpy()[row] = index.labels[place.row]

    def _replace(self, row: int, others: Iterator[int], worker: Worker) -> int:
        """Put the first good one of these draws in the row; which one. Errors: DataError if there is none."""
        tried = 0
        for other in others:
            try:
                self._take(row, other, worker)
            except Undecodable:
                tried += 1
                continue
            batch = self.batch
            batch.draws.numpy()[row] = other
            batch.ids.numpy()[row] = other % self.micro.samples
            return other
        place = self.micro.find(int(self.micro.draws[row]))
        raise DataError(
            f"{place.where} does not decode, nor does any of the {tried} samples that could stand in for it: "
            f"run `foveal data verify {place.dataset.folder} --full`"
        )

    def _leave_empty(self, row: int) -> int:
        batch = self.batch
        batch.images.numpy()[row] = 0
        for name in ("ids", "draws", "labels"):
            getattr(batch, name).numpy()[row] = -1
        batch.valid.numpy()[row] = False
        self.begun.marks[row] = None
        return -1


def _read(place: Place, member: tuple[int, int], look: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """What a look at the bytes of a member of a sample gives.

    Errors: Undecodable where it does not decode and is bad for good, not for a moment or on this node only; DataError if
    the shard's bytes are not those of the manifest, or change from one read to the next: replacing the sample then would
    give this run another curve than its twin.
    """
    data = place.dataset.read(place.index.shard, *member)
    try:
        return look(data)
    except Undecodable:
        place.dataset.vouch(place.split, place.shard)
        if place.dataset.read(place.index.shard, *member) != data:
            raise Unreachable(
                f"{place.where} reads differently each time: see whether its storage is sound, and start again"
            ) from None
        raise
