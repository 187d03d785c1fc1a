"""From the order to batches: a plan of micro-batches, threads that decode ahead of it, nothing that must be saved."""

import collections
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.order import Order, micros_per_step, rank_slots
from foveal.data.subset import PartName, choose
from foveal.data.transforms import COLUMNS, Box, decode, evaluation_view, pixels, training_view
from foveal.errors import DataError
from foveal.seeding import key, uniforms_numpy

_CHUNK = 16  # images that one thread decodes before it looks whether it is still wanted: a few hundredths of a second

View = Callable[[Image.Image, int], tuple[Box, bool]]  # of an image and its row in the micro-batch


@dataclass(frozen=True)
class _Micro:
    """A micro-batch still to be read: B sample ids of which the first ``len(ids)`` are real, the rest padding."""

    ids: np.ndarray
    rows: int
    step: int
    epoch: int
    micro: int
    view: View


def order_of(dataset: Dataset, cfg: DataConfig, *, split: str, part: PartName, seed: int, batch: int) -> Order:
    """The order of a part of a split: its samples, steps_per_epoch and dropped are what a plan needs.

    Errors: as ``Order`` and ``choose``.
    """
    counts = choose(dataset, cfg, split=split, part=part, seed=seed).counts
    return Order(counts, batch, cfg.lanes, cfg.window, seed)


@contextmanager
def train_batches(
    dataset: Dataset,
    cfg: DataConfig,
    *,
    split: str,
    part: PartName,
    seed: int,
    batch: int,
    rank: int,
    size: int,
    at_once: int,
    start: int,
    stop: int,
) -> Iterator[Iterator[Batch]]:
    """The micro-batches of one rank for the steps start..stop-1, from micro 0 of ``start``; leaving stops the threads.

    batch: images per step over all ranks; at_once: images of a micro-batch.
    Errors: ConfigError if ranks, lanes or at_once do not divide; ``next`` raises DataError that names shard and sample.
    """
    chosen = choose(dataset, cfg, split=split, part=part, seed=seed)
    order = Order(chosen.counts, batch, cfg.lanes, cfg.window, seed)
    first, last = rank_slots(batch, cfg.lanes, rank, size)
    micros = micros_per_step(batch, size, at_once)
    assert last - first == micros * at_once

    def plan() -> Iterator[_Micro]:
        for step in range(start, stop):
            epoch = order.epoch_of(step)
            ids = chosen.sample_ids(order.slots(step, first, last))
            for micro in range(micros):
                mine = ids[micro * at_once : (micro + 1) * at_once]
                view = _augmented(cfg, uniforms_numpy(key(seed, epoch, "augment"), mine, COLUMNS))
                yield _Micro(mine, at_once, step, epoch, micro, view)

    with closing(_read_ahead(dataset, cfg, split, plan())) as batches:
        yield batches


def eval_batches(
    dataset: Dataset, cfg: DataConfig, *, split: str, part: PartName, seed: int, rank: int, size: int, at_once: int
) -> Generator[Batch, None, None]:
    """Every sample of a part exactly once over all ranks, in batches of ``at_once`` rows, centre-cropped.

    All ranks get the same number of batches; rows that only fill up have valid=False, label and id -1. The micro of a
    batch counts from 0. Closing the generator stops its threads. ``seed`` is that of training: it decides which samples are held out.
    """
    chosen = choose(dataset, cfg, split=split, part=part, seed=seed)
    rounds = -(-len(chosen) // (size * at_once))

    def view(image: Image.Image, _row: int) -> tuple[Box, bool]:
        return evaluation_view(image.width, image.height, cfg.crop_ratio), False

    def plan() -> Iterator[_Micro]:
        for turn in range(rounds):
            begin = (turn * size + rank) * at_once
            positions = np.arange(begin, max(begin, min(begin + at_once, len(chosen))), dtype=np.int64)
            yield _Micro(chosen.sample_ids(positions), at_once, 0, 0, turn, view)

    return _read_ahead(dataset, cfg, split, plan())


def _augmented(cfg: DataConfig, numbers: np.ndarray) -> View:
    return lambda image, row: training_view(image.width, image.height, numbers[row], cfg.augment)


def _read_ahead(dataset: Dataset, cfg: DataConfig, split: str, plan: Iterator[_Micro]) -> Generator[Batch, None, None]:
    """Batches in the order of the plan; cfg.ahead of them are in work while the caller has one."""
    stopped = threading.Event()
    starts = np.cumsum(dataset.counts(split)) - dataset.counts(split)
    pool = ThreadPoolExecutor(cfg.threads, thread_name_prefix="foveal-decode")
    waiting: collections.deque[tuple[Batch, list[Future[None]]]] = collections.deque()

    def begin(micro: _Micro) -> tuple[Batch, list[Future[None]]]:
        batch = _empty(cfg, micro)
        chunk = max(1, min(_CHUNK, -(-len(micro.ids) // cfg.threads)))
        rows = [range(at, min(at + chunk, len(micro.ids))) for at in range(0, len(micro.ids), chunk)]
        return batch, [pool.submit(_fill, dataset, cfg, split, starts, micro, batch, run, stopped) for run in rows]

    try:
        for micro in plan:
            waiting.append(begin(micro))
            if len(waiting) > cfg.ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _empty(cfg: DataConfig, micro: _Micro) -> Batch:
    """Room for a micro-batch, pinned where there is a GPU (by the caller's thread: a worker's would open GPU 0)."""
    pin = torch.cuda.is_available()
    images = torch.empty((micro.rows, cfg.channels, cfg.image_size, cfg.image_size), dtype=torch.uint8, pin_memory=pin)
    images[len(micro.ids) :] = 0
    ids = torch.full((micro.rows,), -1, dtype=torch.int64, pin_memory=pin)
    ids[: len(micro.ids)] = torch.from_numpy(micro.ids)
    return Batch(
        images=images,
        labels=torch.full_like(ids, -1, pin_memory=pin),
        ids=ids,
        valid=torch.empty(micro.rows, dtype=torch.bool, pin_memory=pin).copy_(ids >= 0),
        step=micro.step,
        epoch=micro.epoch,
        micro=micro.micro,
    )


def _fill(
    dataset: Dataset,
    cfg: DataConfig,
    split: str,
    starts: np.ndarray,
    micro: _Micro,
    batch: Batch,
    rows: range,
    stopped: threading.Event,
) -> None:
    """Read, decode and cut the samples of some rows of a micro-batch into its tensors."""
    images, labels = batch.images.numpy(), batch.labels.numpy()
    for row in rows:
        if stopped.is_set():
            return
        sample = micro.ids[row]
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        index, within = dataset.index(split, shard), int(sample - starts[shard])
        data = dataset.read(index.shard, *index.image(within))
        try:
            image = decode(data, cfg.channels)
        except ValueError as error:
            where = f"{dataset.folder}/{index.shard}: sample '{index.key(within)}'"
            raise DataError(f"{where} does not decode ({error}): repair or remove it, and index again") from None
        box, flipped = micro.view(image, row)
        images[row] = pixels(image, box, flipped, cfg.image_size, cfg.augment.interpolation)
        labels[row] = index.labels[within]


def _finished(batch: Batch, parts: list[Future[None]]) -> Batch:
    for part in parts:
        part.result()
    return batch
