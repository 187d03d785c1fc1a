"""What a data set says about a recipe: the number, size, channels and labels of its images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.boxes import BoxReader
from foveal.data.image.class_lists import MultiLabelReader
from foveal.data.image.decode import UndecodableError, decode_crop, read_image_size
from foveal.data.image.masks import MaskReader
from foveal.data.image.targets import AppliedCrop, LabelReader
from foveal.data.sampling.sources import SampleLocation, SampleSource, find_image_member
from foveal.data.sampling.subset import SplitSubset
from foveal.data.tools.label_members import find_label_members
from foveal.errors import DataError
from foveal.timeouts import read_with_timeout

_NUM_READ, _NUM_READ_REMOTE = 96, 12  # images that are looked at
_NUM_KEPT = 32  # of their files, for the speed of decoding
_STALL_TIMEOUT = 60.0  # seconds without data after which the command gives up
_STATISTICS_SIDE = 64  # images are reduced to this side before their pixels are averaged
_DEFAULT_IGNORE_ID = 255
# The tasks of fine-tuning by the reader of their labels, the richest labels first.
_TASK_OF_READER = {MaskReader: "segmentation", BoxReader: "detection", MultiLabelReader: "multilabel"}

PixelStats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, pixels in [0, 1]


@dataclass(frozen=True)
class Labels:
    """Labels that a task of fine-tuning can learn: the member that holds them, and the id of ignored pixels.

    ``field`` is None for the one class of an image, which the index holds.
    """

    task: str
    field: str | None = None
    ignore_id: int | None = None


@dataclass(frozen=True)
class DataFacts:
    """A data set as a recipe needs it.

    ``image_hw``: median height and width of the images that were looked at, whose bytes are ``images``. ``channels``: 1 if
    all of them are gray. ``pixel_stats``: mean and standard deviation of their pixels. ``has_pixel_stats``: the manifest
    has such values for as many channels. ``class_counts``: training images of each class; empty without labels.
    ``labels``: what fine-tuning can learn, the richest first. ``num_looked_at``: how many images; ``images`` may be fewer.
    """

    path: str
    index: str | None
    num_train: int
    num_val: int
    class_counts: tuple[int, ...]
    image_hw: tuple[int, int]
    channels: int
    pixel_stats: PixelStats
    has_pixel_stats: bool
    labels: tuple[Labels, ...]
    images: tuple[bytes, ...]
    num_looked_at: int
    bit_depth: int | None = None

    @property
    def short_side(self) -> int:
        """The shorter of the median height and width, in pixels."""
        return min(self.image_hw)

    @property
    def num_classes(self) -> int:
        """Classes that have a training image."""
        return sum(count > 0 for count in self.class_counts)


def read_data_facts(path: str, index: str | None) -> DataFacts:
    """Read the manifest of a data set, its labels, and a few of its images.

    Raises: DataError, ConfigError, as ``Dataset.open``; DataError if no image decodes.
    """
    settings = {"path": path, "index": index, "image_size": 1, "stall_timeout_seconds": _STALL_TIMEOUT}
    dataset = Dataset.open(DataConfig.from_dict(settings, "--data"))
    return read_with_timeout(path, _STALL_TIMEOUT, lambda: _read_data_facts(dataset, path, index))


def _read_data_facts(dataset: Dataset, path: str, index: str | None) -> DataFacts:
    manifest = dataset.manifest
    readers = find_label_members(dataset, _DEFAULT_IGNORE_ID).readers
    images, sizes, pixels = _read_images(dataset, readers)
    channels = 1 if all((image == image[:1]).all() for image in pixels) else 3
    stacked = np.stack(pixels)[:, :channels] / 255
    stats = tuple(tuple(round(float(value), 3) for value in of(stacked, axis=(0, 2, 3))) for of in (np.mean, np.std))
    mean_length = len(manifest.mean or ())
    validation = manifest.splits.get("val")
    return DataFacts(
        path=path,
        index=index,
        num_train=dataset.num_samples("train"),
        num_val=0 if validation is None else validation.samples,
        class_counts=tuple(dataset.class_counts("train").tolist()) if dataset.classes else (),
        image_hw=(int(np.median([height for _, height in sizes])), int(np.median([width for width, _ in sizes]))),
        channels=channels,
        pixel_stats=(stats[0], stats[1]),
        has_pixel_stats=bool(manifest.std) and mean_length in (1, channels),
        labels=tuple(_iter_labels(dataset, readers)),
        images=tuple(images[:_NUM_KEPT]),
        num_looked_at=len(images),
        bit_depth=manifest.bit_depth,
    )


def _read_images(
    dataset: Dataset, readers: tuple[LabelReader, ...]
) -> tuple[list[bytes], list[tuple[int, int]], list[np.ndarray]]:
    """Return bytes, (width, height) and reduced pixels uint8 [3, H, W] of images spread over the training split."""
    images, sizes, pixels = [], [], []
    field = readers[0].field if readers else None
    for location in _spread_locations(dataset):
        index = location.shard_index
        data = dataset.read_range(index.shard, *find_image_member(location, field, decode_version=2))
        try:
            width, height = read_image_size(data)
            pixels.append(_reduce(data, (width, height), dataset.manifest.bit_depth))
        except UndecodableError:
            continue  # training replaces such images and stops if there are many
        images.append(data)
        sizes.append((width, height))
    if not images:
        raise DataError(f"{dataset.folder}: no image of {_NUM_READ} decodes: run `foveal data verify PATH --full`")
    return images, sizes, pixels


def _reduce(data: bytes, size: tuple[int, int], bit_depth: int | None) -> np.ndarray:
    output_hw = (min(_STATISTICS_SIDE, size[1]), min(_STATISTICS_SIDE, size[0]))
    pixels = decode_crop(
        data, 3, lambda width, height: ((0, 0, width, height), False), output_hw, "bilinear", True, bit_depth=bit_depth
    )
    if output_hw == (_STATISTICS_SIDE, _STATISTICS_SIDE):
        return pixels
    rows = np.arange(_STATISTICS_SIDE) * output_hw[0] // _STATISTICS_SIDE
    columns = np.arange(_STATISTICS_SIDE) * output_hw[1] // _STATISTICS_SIDE
    return pixels[:, rows][:, :, columns]


def _spread_locations(dataset: Dataset) -> Iterator[SampleLocation]:
    """Yield training samples at equal distances."""
    source = SampleSource(dataset, "train", SplitSubset(dataset.samples_per_shard("train"), None))
    total, wanted = dataset.num_samples("train"), _NUM_READ_REMOTE if dataset.is_remote else _NUM_READ
    for position in range(min(total, wanted)):
        yield source.locate_sample(position * total // min(total, wanted))


def _iter_labels(dataset: Dataset, readers: tuple[LabelReader, ...]) -> Iterator[Labels]:
    """Yield what can be learned: members of samples that are labels, then the classes of the index."""
    for kind, task in _TASK_OF_READER.items():
        for reader in readers:
            if isinstance(reader, kind):
                ignore_id = _find_ignore_id(dataset, reader) if isinstance(reader, MaskReader) else None
                yield Labels(task, reader.field, ignore_id)
    if dataset.classes and (dataset.labels("train") >= 0).any():
        yield Labels("classification")


def _find_ignore_id(dataset: Dataset, masks: MaskReader) -> int | None:
    """Return the one id of masks that is no class's, as that of pixels without a label; 255 if there is none.

    Several such ids are a fault, which the check of the config names.
    """
    reader, num_classes = MaskReader(masks.field, (), None), len(dataset.classes or ())
    others: set[int] = set()
    for location in _spread_locations(dataset):
        index = location.shard_index
        member = index.find_member_offset_size(location.index_row, masks.field)
        if member is None:
            continue
        image = dataset.read_range(index.shard, *find_image_member(location, masks.field, decode_version=2))
        try:
            crop = AppliedCrop.whole_image(*read_image_size(image))
            ids = np.unique(reader.read_ids(dataset.read_range(index.shard, *member), crop, location.description))
        except UndecodableError:
            continue
        others |= {int(number) for number in ids if number >= num_classes}
    return others.pop() if len(others) == 1 else _DEFAULT_IGNORE_ID
