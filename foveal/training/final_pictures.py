"""Pictures at the end of a run: what it learned from, and the inside of the encoder that it exported."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.targets import LabelReader
from foveal.data.sample_images import read_sample_images
from foveal.data.tools.show import draw_contact_sheet
from foveal.errors import DataError
from foveal.inspect.picture import Picture
from foveal.timeouts import call_with_timeout

_NUM_IMAGES = 6
_MAX_COUNTED_SHARDS = 100  # whose indices are read to count the classes
_MAX_NAMED_CLASSES = 10
_READ_SECONDS = 60.0  # to read images or weights; srun ends rank 0 five minutes after the other ranks
_log = logging.getLogger(__name__)

T = TypeVar("T")


def draw_final_pictures(
    export: Path, dataset: Dataset, cfg: DataConfig, label_reader: LabelReader | None, device: torch.device
) -> Iterator[tuple[str, Picture]]:
    """Yield the pictures of a run's export, and their names; of a folder without an export, nothing. For rank 0.

    ``label_reader``: tells labels from images. No error leaves this function: one is a warning, as are images or
    weights that take longer than a minute to read. No random number of the training is drawn.
    """
    parts: list[tuple[str, Callable[[], Iterator[tuple[str, Picture]]]]] = [
        ("the training images", lambda: _draw_data(dataset, cfg.train, label_reader)),
        ("the encoder", lambda: _draw_encoder(export, dataset, cfg, label_reader, device)),
    ]
    for what, draw in parts:
        try:
            if (export / "card.json").exists():
                yield from draw()
        except Exception as error:  # noqa: BLE001 - a trained model is worth more than its pictures, whatever the error
            reason = str(error).partition("\n")[0] or type(error).__name__
            _log.warning("no picture of %s: %s", what, reason)


def _draw_data(dataset: Dataset, split: str, label_reader: LabelReader | None) -> Iterator[tuple[str, Picture]]:
    """Yield the contact sheet of the training split. Raises: DataError."""

    def draw() -> Picture:
        sheet = draw_contact_sheet(dataset, split, label_reader)
        return Picture(sheet, "Training images", describe_training_images(dataset, split))

    yield "data", _read_in_time(draw)


def describe_training_images(dataset: Dataset, split: str) -> str:
    """Return the counts of a split's images and classes in words."""
    counts, classes = dataset.samples_per_shard(split), dataset.classes or ()
    text = f"Some of the {dataset.num_samples(split):,} images of {dataset.manifest.name}, split {split}"
    if not classes:
        return f"{text}; the data set has no classes."
    named = ", ".join(classes[:_MAX_NAMED_CLASSES])
    more = f" and {len(classes) - _MAX_NAMED_CLASSES:,} more" if len(classes) > _MAX_NAMED_CLASSES else ""
    text += f", of {len(classes):,} class{'es' * (len(classes) > 1)}: {named}{more}."
    if len(classes) == 1 or dataset.is_remote or len(counts) > _MAX_COUNTED_SHARDS:
        return text
    per_class = dataset.class_counts(split)
    if not per_class.any():  # labels are masks, boxes or lists
        return text
    largest, smallest = int(np.argmax(per_class)), int(np.argmin(per_class))
    return (
        f"{text} The largest class, {classes[largest]}, has {per_class[largest]:,} images, the smallest, "
        f"{classes[smallest]}, {per_class[smallest]:,}."
    )


def _draw_encoder(
    export: Path, dataset: Dataset, cfg: DataConfig, label_reader: LabelReader | None, device: torch.device
) -> Iterator[tuple[str, Picture]]:
    """Yield the pictures of an export's encoder, on images that it was not trained on if there are any.

    Raises: DataError, ExportError, torch.OutOfMemoryError.
    """
    from foveal.inspect.encoder.exported import load_inspected_encoder  # matplotlib, without which a run ends as well

    split = cfg.val if cfg.val in dataset.manifest.splits else cfg.train
    # A task may evaluate larger images than the encoder takes, in windows.
    crop_cfg = cfg.model_copy(update={"eval_size": None})
    label_field = None if label_reader is None else label_reader.field
    images = _read_in_time(lambda: read_sample_images(dataset, crop_cfg, split, _NUM_IMAGES, label_field).images)
    if not len(images):
        raise DataError(f"none of the images of split {split} that were tried decodes")
    yield from _read_in_time(lambda: load_inspected_encoder(export, device)).draw_pictures(images)


def _read_in_time(read: Callable[[], T]) -> T:
    """Return what ``read()`` returns. Raises: DataError if it takes too long; errors of ``read``."""
    try:
        return call_with_timeout(_READ_SECONDS, read)
    except TimeoutError:
        raise DataError(f"reading takes longer than {_READ_SECONDS:g} s") from None
