"""Pictures at the end of a run: what it learned from, and the inside of the encoder that it exported."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.sample_images import read_sample_images
from foveal.data.tools.show import draw_contact_sheet
from foveal.errors import DataError
from foveal.inspect.encoder.exported import load_inspected_encoder
from foveal.inspect.picture import Picture

_NUM_IMAGES = 6
_MAX_COUNTED_SHARDS = 100  # whose indices are read to count the classes
_MAX_NAMED_CLASSES = 10
_log = logging.getLogger(__name__)

Save = Callable[[str, Callable[[], Picture]], None]  # (name of the file, what draws it)


def save_final_pictures(
    run_dir: Path, export_name: str, dataset: Dataset, cfg: DataConfig, device: torch.device, save: Save
) -> None:
    """Save the pictures of a run's export, export/ or export/<name>; of a run without one, nothing. For rank 0.

    No error leaves this function: one is a warning. No random number of the training is drawn.
    """
    export = run_dir / "export" / export_name
    if not (export / "card.json").exists():
        return
    parts: list[tuple[str, Iterator[tuple[str, Picture]]]] = [
        ("the training images", _draw_data(dataset, cfg.train)),
        ("the encoder", _draw_encoder(export, dataset, cfg, device)),
    ]
    for what, pictures in parts:
        try:
            for name, picture in pictures:
                save(name, lambda picture=picture: picture)
        except Exception as error:  # noqa: BLE001 - a trained model is worth more than its pictures, whatever the error
            reason = str(error).partition("\n")[0] or type(error).__name__
            _log.warning("no picture of %s: %s", what, reason)


def _draw_data(dataset: Dataset, split: str) -> Iterator[tuple[str, Picture]]:
    """Yield the contact sheet of the training split. Raises: DataError."""
    sheet = draw_contact_sheet(dataset, split)
    yield "data", Picture(sheet, "Training images", describe_training_images(dataset, split))


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
    export: Path, dataset: Dataset, cfg: DataConfig, device: torch.device
) -> Iterator[tuple[str, Picture]]:
    """Yield the pictures of an export's encoder, on images that it was not trained on if there are any.

    Raises: DataError, ExportError, torch.OutOfMemoryError.
    """
    split = cfg.val if cfg.val in dataset.manifest.splits else cfg.train
    # A task may evaluate larger images than the encoder takes, in windows.
    images = read_sample_images(dataset, cfg.model_copy(update={"eval_size": None}), split, _NUM_IMAGES).images
    if not len(images):
        raise DataError(f"none of the images of split {split} that were tried decodes")
    yield from load_inspected_encoder(export, device).draw_pictures(images)
